//! Spoils small models at random and loads them: success and typed errors are fine, a panic is not,
//! nor memory beyond the files' means. `cargo run --example fuzz_loaders -- gguf 300` spends 300
//! seconds on GGUF files, `folder` instead of `gguf` on Hugging Face folders; a third argument is
//! the first seed. Leave it unoptimised: overflow is a panic then. A panic names the seed of its
//! case, which `-- gguf 1 SEED` repeats.

use anyhow::{Context, Result, bail};
use models::{Error, Source, Weights, open};
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tch::{Device, Kind};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [target, seconds, seed @ ..] = &arguments[..] else {
        bail!("usage: fuzz_loaders gguf|folder SECONDS [SEED]");
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = match &target[..] {
        "gguf" => vec![golden.join("gguf/gqa2_llama31.gguf")],
        "folder" => std::fs::read_dir(golden.join("llama/gqa8_sharded"))?
            .map(|entry| Ok(entry?.path()))
            .filter(|path| !matches!(path, Ok(path) if path.ends_with("expected.safetensors")))
            .collect::<Result<_>>()?,
        other => bail!("target {other} is neither gguf nor folder"),
    };
    let mut models = Vec::new();
    for path in &files {
        let name = path.file_name().context("a golden file has a name")?;
        models.push((name, std::fs::read(path)?));
    }
    let folder = tempfile::tempdir()?;
    for (name, bytes) in &models {
        std::fs::write(folder.path().join(name), bytes)?;
    }
    let model: PathBuf = match &target[..] {
        "gguf" => folder.path().join(models[0].0),
        _ => folder.path().to_owned(),
    };

    tch::set_num_threads(1);
    let mut seed: u64 = seed.first().map_or(Ok(0), |seed| seed.parse())?;
    let (end, mut outcomes) =
        (Instant::now() + Duration::from_secs(seconds.parse()?), BTreeMap::new());
    while Instant::now() < end {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (name, bytes) = &models[rng.random_range(0..models.len())];
        std::fs::write(folder.path().join(name), spoil(bytes, &mut rng))?;
        let outcome = std::panic::catch_unwind(|| load(&model))
            .map_err(|_| anyhow::anyhow!("a panic with seed {seed}"))?;
        std::fs::write(folder.path().join(name), bytes)?;
        *outcomes.entry(outcome).or_insert(0u64) += 1;
        seed += 1;
    }
    println!("{} cases: {outcomes:?}; {}", outcomes.values().sum::<u64>(), peak_memory()?);
    Ok(())
}

/// Loads all that the original model has; says how it ended.
fn load(path: &Path) -> &'static str {
    let result = open(path).and_then(|source| {
        if let Source::Gguf(gguf) = &source {
            let metadata = gguf.metadata();
            metadata.texts("tokenizer.ggml.tokens")?;
            metadata.i32s("tokenizer.ggml.token_type")?;
            metadata.text("tokenizer.ggml.model")?;
        }
        let weights = Weights::new(source, Kind::BFloat16, Device::Cpu)?;
        let _ = weights.tensor("model.embed_tokens.weight", &[96, 32])?;
        let _ = weights.tensor("lm_head.weight", &[96, 32])?;
        let _ = weights.tensor("model.norm.weight", &[32])?;
        let keys = (weights.config().kv_heads * weights.config().head_dim) as i64;
        for layer in 0..2 {
            for projection in ["k_proj", "v_proj"] {
                let name = format!("model.layers.{layer}.self_attn.{projection}.weight");
                let _ = weights.tensor(&name, &[keys, 32])?;
            }
        }
        Ok(())
    });
    match result {
        Ok(()) => "loaded",
        Err(error) => {
            // Its text must not panic either.
            let _ = error.to_string();
            name(&error)
        }
    }
}

fn name(error: &Error) -> &'static str {
    match error {
        Error::Io { .. } => "Io",
        Error::Format { .. } => "Format",
        Error::Unsupported { .. } => "Unsupported",
        Error::UnknownArchitecture { .. } => "UnknownArchitecture",
        Error::MissingTensor { .. } => "MissingTensor",
        Error::WrongShape { .. } => "WrongShape",
        Error::WrongDtype { .. } => "WrongDtype",
        Error::NotFinite { .. } => "NotFinite",
        Error::DuplicateTensor { .. } => "DuplicateTensor",
        Error::OutsideFolder { .. } => "OutsideFolder",
        _ => "other",
    }
}

/// One to four faults, most of them near the file's start, where headers are.
fn spoil(bytes: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    const NUMBERS: [u64; 10] =
        [0, 1, 2, 31, 1 << 31, u32::MAX as u64, 1 << 32, 1 << 61, 1 << 63, u64::MAX];
    const TEXTS: [&[u8]; 9] = [
        b"null",
        b"-1",
        b"[]",
        b"{}",
        b"\"",
        b"1e999",
        b"18446744073709551615",
        b"\\u0000",
        b"../",
    ];
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        let header = if rng.random() { bytes.len().min(4096) } else { bytes.len() };
        if header == 0 {
            break;
        }
        let at = rng.random_range(0..header);
        let length = rng.random_range(0..64).min(bytes.len() - at);
        match rng.random_range(0..7) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << rng.random_range(0..8),
            2 => bytes[at] = rng.random(),
            3 => {
                let number = NUMBERS.choose(rng).unwrap_or(&0).to_le_bytes();
                let width = if rng.random() { 4 } else { 8 };
                bytes
                    .iter_mut()
                    .skip(at)
                    .zip(&number[..width])
                    .for_each(|(byte, new)| *byte = *new);
            }
            4 => drop(bytes.drain(at..at + length)),
            5 => {
                let copy = bytes[at..at + length].to_vec();
                let to = rng.random_range(0..=bytes.len());
                bytes.splice(to..to, copy);
            }
            _ => {
                let text = TEXTS.choose(rng).copied().unwrap_or_default();
                let over = if rng.next_u32().is_multiple_of(2) {
                    0
                } else {
                    text.len().min(bytes.len() - at)
                };
                drop(bytes.splice(at..at + over, text.iter().copied()));
            }
        }
    }
    bytes
}

/// The peak of resident memory; an error beyond what libtorch and these small models can need.
fn peak_memory() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak =
        status.lines().find(|line| line.starts_with("VmHWM")).context("Linux tells the peak")?;
    let kilobytes: u64 = peak.split_whitespace().nth(1).unwrap_or_default().parse()?;
    if kilobytes > 1 << 19 {
        bail!("{kilobytes} kB at the peak: a file made us allocate far more than it holds");
    }
    Ok(format!("{kilobytes} kB at the peak"))
}
