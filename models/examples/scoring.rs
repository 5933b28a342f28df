//! What a surrogate's scores cost beside the prefill that they are made in, as time:
//!
//! ```text
//! cargo run --release -p models --example scoring -- MODEL SURROGATE [TOKENS [PAIRS [cuda [TEXTS]]]]
//! ```
//!
//! Passes with and without scores take turns, so that whatever else the machine does falls on both. Compared are medians
//! of the clock, and on the CPU the seconds that the process computed, which others lengthen little. MODEL may be a
//! folder that holds no more than config.json, whose weights are then drawn; SURROGATE is a folder, or `mlp` or
//! `linear` for one of the published shape, which costs what a trained one does. On a card it is bf16 and TEXTS at
//! once, 16,384 tokens of them if left out, as single texts of a small model leave it waiting for launches.

use anyhow::{Context, Result, ensure};
use kvzap::{Affine, Surrogate, Threshold, TorchSurrogate};
use models::{CausalLm, Decoder, Dense, Hooks, Pruning, Random, Source, WINDOW, Weights, open};
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, surrogate, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("give MODEL SURROGATE [TOKENS [PAIRS [cuda [TEXTS]]]]");
    };
    let number = |index: usize, default: i64| -> Result<i64> {
        let given = rest.get(index).map(|text| text.parse());
        Ok(given
            .transpose()
            .context("TOKENS, PAIRS and TEXTS are whole numbers")?
            .unwrap_or(default))
    };
    let (tokens, pairs) = (number(0, 2048)?, number(1, 9)?);
    ensure!(tokens > 0 && pairs > 0, "TOKENS and PAIRS must be 1 or more");
    let (kind, device, texts) = match rest.get(2).map(String::as_str) {
        Some("cuda") => (Kind::BFloat16, models::cuda()?, number(3, (16_384 / tokens).max(1))?),
        _ => (Kind::Float, Device::Cpu, 1),
    };
    ensure!(texts > 0, "TEXTS must be 1 or more");
    let path = Path::new(model);
    let drawn = path.is_dir() && std::fs::read_dir(path)?.count() == 1;
    let source = if drawn { Source::Random(Random::open(path, 1)?) } else { open(path)? };
    let model = Decoder::load(&Weights::new(source, kind, device)?)?;
    let config = model.config();
    let map = |inputs: usize, outputs: usize| {
        Affine::new(vec![0.01; inputs * outputs], vec![-3.0; outputs])
    };
    let (hidden, heads, layers) = (config.hidden_size, config.kv_heads, 0..config.layers);
    let surrogate = match surrogate.as_str() {
        "linear" => {
            Surrogate::linear(layers.map(|_| map(hidden, heads)).collect::<Result<_, _>>()?)
        }
        "mlp" => Surrogate::mlp(
            layers
                .map(|_| Ok([map(hidden, hidden / 8)?, map(hidden / 8, heads)?]))
                .collect::<kvzap::Result<_>>()?,
        ),
        folder => Surrogate::load(folder),
    }?;
    surrogate.check(config.layers, hidden, heads)?;
    let scored = Hooks::pruning(Pruning {
        scorer: Box::new(TorchSurrogate::new(&surrogate, kind, device)?),
        policy: Box::new(Threshold::new(-3.0)?),
        while_decoding: true,
    });
    let ids = Tensor::f_randint(1000, [texts, tokens], (Kind::Int64, device))?;
    // By the clock, and computed: milliseconds.
    let read = |hooks: &Hooks| -> Result<[f64; 2]> {
        let (start, computed) = (Instant::now(), cpu_ms()?);
        let mut cache = Dense::new(config.layers, WINDOW);
        let hidden = tch::no_grad(|| model.forward(&ids, &mut cache, hooks))?;
        let _ = hidden.f_double_value(&[0, 0, 0])?; // waits for a card
        Ok([1e3 * start.elapsed().as_secs_f64(), cpu_ms()? - computed])
    };
    let plain = Hooks::default();
    read(&plain)?;
    read(&scored)?; // a first time is slower
    let (mut times, mut computed) = ([Vec::new(), Vec::new()], [0.0; 2]);
    for pair in 0..pairs {
        let mut turns = [(0, &plain), (1, &scored)];
        turns.rotate_left(pair as usize % 2);
        for (index, hooks) in turns {
            let [time, cpu] = read(hooks)?;
            times[index].push(time);
            computed[index] += cpu;
        }
    }
    let mut ratios: Vec<f64> =
        times[1].iter().zip(&times[0]).map(|(with, without)| with / without).collect();
    let quarters = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        [1, 2, 3].map(|quarter| values[quarter * (values.len() - 1) / 4])
    };
    let [plain, scored] = times.map(|mut times| quarters(&mut times));
    let [low, median, high] = quarters(&mut ratios).map(|ratio| 100.0 * (ratio - 1.0));
    println!("{texts} x {tokens} tokens, {pairs} pairs, medians and quartiles");
    println!("without scores  {:9.2} ms ({:.2} to {:.2})", plain[1], plain[0], plain[2]);
    println!("with scores     {:9.2} ms ({:.2} to {:.2})", scored[1], scored[0], scored[2]);
    println!(
        "of medians {:+.2} %; pair by pair {median:+.2} % ({low:+.2} to {high:+.2})",
        100.0 * (scored[1] / plain[1] - 1.0)
    );
    if device == Device::Cpu {
        let [without, with] = computed.map(|ms| ms / 1e3);
        println!(
            "CPU seconds {without:.2} and {with:.2}: {:+.2} %",
            100.0 * (with / without - 1.0)
        );
    }
    Ok(())
}

/// What the process has computed so far, all threads, in the kernel's steps of 10 ms.
fn cpu_ms() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|ticks| ticks.parse::<f64>().ok());
    Ok(10.0 * (ticks(11).context("no utime")? + ticks(12).context("no stime")?))
}
