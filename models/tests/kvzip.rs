//! KVzip and KVzip+ through a whole model against kvpress 0.5.5: tests/golden/kvzip/make.py made the numbers.

mod common;

use anyhow::Result;
use common::{get, golden, tensors};
use kvzap::{Allocation, Kvzip, Rule, Rules};
use models::{CausalLm, Decoder, Error, Weights, kvzip_passes, open};
use serde::Deserialize;
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

#[derive(Deserialize)]
struct Golden {
    first: Vec<u32>,
    next: Vec<u32>,
    suffix: Vec<u32>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    tokens: usize,
    prefix: usize,
    chunk: usize,
    plus: bool,
}

fn model() -> Result<Decoder> {
    let source = open(&golden("kvzip/model"))?;
    Ok(Decoder::load(&Weights::new(source, Kind::Float, Device::Cpu)?)?)
}

fn read() -> Result<(Golden, HashMap<String, Tensor>, Vec<u32>)> {
    let golden = serde_json::from_slice(&std::fs::read(golden("kvzip/kvzip.json"))?)?;
    let tensors = tensors("kvzip/kvzip.safetensors")?;
    let ids = Vec::<i64>::try_from(get(&tensors, "ids")?)?.iter().map(|&id| id as u32).collect();
    Ok((golden, tensors, ids))
}

/// `[layers, kv_heads, tokens]`
fn scores(
    lm: &Decoder,
    golden: &Golden,
    case: &Case,
    context: &[u32],
    rules: Rules,
) -> Result<Tensor> {
    let rules = Rules { chunk: case.chunk, ..rules };
    let instructions = [&golden.first[..], &golden.next];
    let passes = rules.passes(context, case.prefix, instructions, &golden.suffix);
    let projections =
        (0..lm.config().layers).map(|layer| lm.output_projection(layer).shallow_clone());
    let kvzip = if case.plus {
        Kvzip::plus(rules, case.prefix, projections.collect())
    } else {
        Kvzip::new(rules, case.prefix)
    };
    let mut told = Vec::new();
    let each = &mut |done, all| told.push((done, all));
    kvzip_passes(lm, Device::Cpu, context, &passes, &kvzip, each)?;
    assert_eq!(told, (0..=passes.len()).map(|done| (done, passes.len())).collect::<Vec<_>>());
    Ok(Tensor::cat(&kvzip.scores()?, 0))
}

fn drops(scores: &Tensor, share: f64, rule: Rule) -> Result<Tensor> {
    let layers = scores.split(1, 0);
    Ok(Tensor::cat(&Allocation::new(share, 0, 0, rule)?.drops(&layers)?, 0))
}

#[test]
fn scores_and_pruned_sets_are_those_of_kvpress_under_its_rules() -> Result<()> {
    let ((golden, wanted, ids), lm) = (read()?, model()?);
    for case in &golden.cases {
        let name = &case.name;
        let found = scores(&lm, &golden, case, &ids[..case.tokens], Rules::kvpress())?;
        let kvpress = get(&wanted, &format!("{name}.scores"))?;
        assert_eq!((found.size(), found.kind()), (kvpress.size(), Kind::Float));
        // The four sinks are protected last in kvpress, after its scores were written down.
        let body = |scores: &Tensor| scores.narrow(2, 4, case.tokens as i64 - 4);
        let error = common::difference(&body(&found), &body(kvpress));
        let each = (body(&found) / body(kvpress) - 1.0).abs().nan_to_num(0.0, None, None).max();
        let exact = body(get(&wanted, &format!("{name}.exact"))?);
        let [ours, theirs] =
            [&found, kvpress].map(|scores| common::difference(&body(scores), &exact));
        println!("{name}: {error:.1e}, of each score {:.1e}", each.double_value(&[]));
        println!("from f64: {ours:.1e}, kvpress {theirs:.1e}");
        // So what lies between the two is rounding: either is as far from f64.
        assert!(ours <= 4e-6 && theirs <= 4e-6, "{name}: {ours:.1e}, {theirs:.1e}");
        assert!(error <= 2e-6 && each.double_value(&[]) <= 1e-5, "{name}: {error:.1e}, {each}");
        assert_eq!(found.narrow(2, 0, 4).isinf().all().int64_value(&[]), 1);

        for ratio in ["0.1", "0.25", "0.5", "0.9"] {
            for (suffix, rule) in [("", Rule::Model), (".layer", Rule::Layer)] {
                let masked = get(&wanted, &format!("{name}.{ratio}{suffix}"))?.to_kind(Kind::Bool);
                let share = masked.to_kind(Kind::Double).mean(None).double_value(&[]);
                assert_eq!(drops(&found, share, rule)?, masked, "{name}, {ratio}{suffix}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_prefix_stays_where_kvpress_drops_it_before_all_else() -> Result<()> {
    let ((golden, _, ids), lm) = (read()?, model()?);
    for case in golden.cases.iter().filter(|case| case.prefix > 4) {
        let context = &ids[..case.tokens];
        let gone = |rules| -> Result<(Tensor, i64)> {
            let scores = scores(&lm, &golden, case, context, rules)?;
            let header = drops(&scores, 0.3, Rule::Model)?.narrow(2, 0, case.prefix as i64);
            Ok((scores, header.sum(Kind::Int64).int64_value(&[])))
        };
        let ((ours, kept), (kvpress, dropped)) = (gone(Rules::default())?, gone(Rules::kvpress())?);
        assert_eq!((kept, dropped), (0, 2 * 2 * (case.prefix as i64 - 4)), "{}", case.name);
        let body = |scores: &Tensor| {
            scores.narrow(2, case.prefix as i64, (case.tokens - case.prefix) as i64)
        };
        assert_eq!(body(&ours), body(&kvpress), "the scores themselves are the same");
    }
    Ok(())
}

#[test]
fn contexts_that_cannot_be_repeated_are_refused() -> Result<()> {
    let lm = model()?;
    let run = |context: &[u32]| {
        let rules = Rules::default();
        let passes = rules.passes(context, 0, [&[1], &[2]], &[3]);
        let kvzip = Kvzip::new(rules, 0);
        kvzip_passes(&lm, Device::Cpu, context, &passes, &kvzip, &mut |_, _| {}).unwrap_err()
    };
    assert!(matches!(run(&[]), Error::EmptyPrompt));
    assert!(matches!(run(&[64]), Error::UnknownToken { id: 64, vocabulary: 64 }));
    // The passes need room after the context: 7000 and a chunk of 2048.
    let error = run(&vec![0; 7000]);
    assert!(matches!(error, Error::ContextTooLong { wanted: 9058, limit: 8192 }), "{error}");
    Ok(())
}
