//! Many ways to forget one text, asked at once, against each way alone.

mod common;

use anyhow::Result;
use common::{assert_close, golden, logits};
use kvzap::{Random, Threshold};
use models::{CausalLm, Decoder, Dense, Error, Fan, Hooks, KvCache, Pruning, Weights, open};
use tch::{Device, Kind, Tensor};

const WINDOW: usize = 16;

fn model() -> Result<Decoder> {
    Ok(Decoder::load(&Weights::new(open(&golden("kvzap/model"))?, Kind::Float, Device::Cpu)?)?)
}

fn ids(first: i64, tokens: i64) -> Tensor {
    (Tensor::arange_start(first, first + tokens, (Kind::Int64, Device::Cpu)) * 37 + 11)
        .remainder(128)
}

fn random(seed: u64, threshold: f32) -> Result<Hooks> {
    let (scorer, policy) = (Box::new(Random::new(seed)), Box::new(Threshold::new(threshold)?));
    Ok(Hooks::pruning(Pruning { scorer, policy, while_decoding: false }))
}

/// A text of 60 tokens that forgot what `hooks` say, and its drop bits of each layer.
fn read(lm: &Decoder, hooks: &Hooks) -> Result<(Dense, Vec<Tensor>)> {
    let layers = lm.config().layers;
    let mut dense = Dense::new(layers, WINDOW);
    let _ = logits(lm, &ids(0, 60), &mut dense, hooks)?;
    let masked = (0..layers).map(|layer| Ok(dense.masked(layer)?.expect("it was read")));
    let masked = masked.collect::<Result<Vec<_>>>()?;
    Ok((dense, masked))
}

#[test]
fn each_text_of_a_fan_is_continued_as_it_would_be_alone() -> Result<()> {
    let lm = model()?;
    let ways = [Hooks::default(), random(1, 0.3)?, random(2, 0.7)?, random(3, f32::INFINITY)?];
    let read = ways.iter().map(|hooks| read(&lm, hooks)).collect::<Result<Vec<_>>>()?;
    let drops: Vec<Tensor> = (0..lm.config().layers)
        .map(|layer| Tensor::cat(&read.iter().map(|(_, bits)| &bits[layer]).collect::<Vec<_>>(), 0))
        .collect();
    let mut fan = Fan::new(&read[0].0, &drops)?;
    fan.mark()?;
    for round in 0..2 {
        let mut at = 60;
        for count in [7, 1, 3] {
            let each = ids(at, count).unsqueeze(0).expand([4, count], false);
            let hidden = lm.forward(&each, &mut fan, &Hooks::default())?;
            let found = lm.logits(&hidden)?;
            if round == 0 {
                continue; // a first round, to be forgotten
            }
            for (text, hooks) in ways.iter().enumerate() {
                let mut alone = self::read(&lm, hooks)?.0;
                let wanted = logits(&lm, &ids(60, at - 60 + count), &mut alone, &Hooks::default())?;
                let wanted = wanted.narrow(0, at - 60, count);
                assert_close(&found.get(text as i64), &wanted, 1e-5, &format!("text {text}, {at}"));
            }
            at += count;
        }
        assert_eq!(fan.tokens(), 71);
        fan.rewind()?;
        assert_eq!(fan.tokens(), 60);
    }
    let usage = fan.usage();
    let rows: usize = read.iter().map(|(dense, _)| dense.usage().rows).sum();
    assert_eq!((usage.rows, usage.dense_rows), (rows, 4 * read[0].0.usage().dense_rows));
    Ok(())
}

#[test]
fn drop_bits_of_another_text_are_refused() -> Result<()> {
    let lm = model()?;
    let (dense, bits) = read(&lm, &Hooks::default())?;
    let short: Vec<Tensor> = bits.iter().map(|bits| bits.narrow(2, 0, 59)).collect();
    for wrong in [&bits[1..], &short] {
        let error = Fan::new(&dense, wrong).unwrap_err();
        assert!(matches!(error, Error::DropBits { .. }), "{error}");
    }
    let empty = Dense::new(lm.config().layers, WINDOW);
    assert!(matches!(Fan::new(&empty, &bits), Err(Error::EmptyPrompt)));
    assert!(matches!(Fan::new(&dense, &bits)?.rewind(), Err(Error::NoMark)));
    Ok(())
}
