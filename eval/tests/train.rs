//! `longctx train kvzap` and `calibrate` on the default model: interrupted, resumed, and asked for other things.
#![cfg(feature = "models")]

mod common;

use common::longctx;
use std::path::Path;
use std::process::Output;

/// Some documents of words that do not repeat in the same order.
fn write_text(path: &Path) {
    let words = [
        "river", "engine", "paper", "winter", "carries", "slowly", "the", "old", "a", "under",
        "seven", "writes",
    ];
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        words[(state >> 33) as usize % words.len()]
    };
    let documents = (0..40).map(|_| {
        let text: Vec<&str> = (0..60).map(|_| word()).collect();
        format!("{{\"text\": \"{}.\"}}\n", text.join(" "))
    });
    std::fs::write(path, documents.collect::<String>()).unwrap();
}

fn asked(arguments: &[&str]) -> Output {
    let model = std::env::var("LONGCTX_MODEL").expect("`cargo xtask ci` names the default model");
    longctx(arguments).args(["--model", &model]).output().unwrap()
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn a_collection_goes_on_where_it_was_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, samples, out) = (path("text.jsonl"), path("samples"), path("out"));
    write_text(Path::new(&text));
    let train = |more: &[&str]| {
        let common = ["train", "kvzap", "--text", &text, "--samples", &samples, "--out", &out];
        let sizes = ["--pieces", "12", "--held-out", "4", "--tokens", "40", "--rows", "30"];
        asked(&[&common[..], &sizes, more].concat())
    };
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let first = train(&[]);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let (shard, weights) = ("samples/text/shard-00001.safetensors", "out/model.safetensors");
    let whole = (read(shard), read(weights));
    assert!(read("out/r2.svg").starts_with(b"<svg"));
    let report: serde_json::Value = serde_json::from_slice(&read("out/training.json")).unwrap();
    assert!(report["held-out_r2"].as_f64().is_some_and(|r2| (0.0..=1.0).contains(&r2)));

    // As if it had been stopped before this shard was there, and again while it was written.
    std::fs::remove_file(folder.path().join(shard)).unwrap();
    assert!(train(&[]).status.success());
    assert!((read(shard), read(weights)) == whole, "resumed, it ends with other bytes");
    std::fs::write(folder.path().join(shard), &whole.0[..whole.0.len() / 2]).unwrap();
    let damaged = String::from_utf8(train(&[]).stderr).unwrap();
    assert!(damaged.contains("shard-00001") && damaged.contains("made again"), "{damaged}");
    std::fs::remove_file(folder.path().join(shard)).unwrap();

    let other = String::from_utf8(train(&["--seed", "7"]).stderr).unwrap();
    assert!(other.contains("samples of other settings"), "{other}");

    let mlp = train(&["--form", "mlp", "--epochs", "2", "--batch", "64"]);
    assert!(mlp.status.success(), "{}", String::from_utf8_lossy(&mlp.stderr));
    let calibrate = |tokens: &str| {
        asked(&[
            "calibrate",
            "--surrogate",
            &out,
            "--text",
            &text,
            "--pieces",
            "2",
            "--tokens",
            tokens,
        ])
    };
    let short = String::from_utf8(calibrate("100").stderr).unwrap();
    assert!(short.contains("nothing to judge"), "{short}");
    let calibrated = calibrate("200");
    assert!(calibrated.status.success(), "{}", String::from_utf8_lossy(&calibrated.stderr));
    assert!(folder.path().join("out/calibration.json").exists());
    let long = ["river"; 300].join(" ");
    let generate = |remove: &str| {
        asked(&[
            "generate",
            "--surrogate",
            &out,
            "--remove",
            remove,
            "--prompt",
            &long,
            "--max-tokens",
            "1",
            "--json",
        ])
    };
    let answer: serde_json::Value = serde_json::from_slice(&generate("0.3").stdout).unwrap();
    assert!(answer["removed"].as_f64().is_some_and(|share| share > 0.0), "{answer}");
    let most = String::from_utf8(generate("0.9").stderr).unwrap();
    assert!(most.contains("more than can go"), "{most}");
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn texts_that_are_too_short_or_too_long_are_refused_with_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.jsonl");
    write_text(&text);
    for (arguments, wanted) in
        [(["--tokens", "5000"], "the model reads 8192"), (["--pieces", "100000"], "the text holds")]
    {
        let out = folder.path().join("out");
        let common =
            ["train", "kvzap", "--text", text.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let refused = asked(&[&common[..], &arguments].concat());
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success() && said.contains(wanted), "{said}");
    }
}
