//! `longctx curve` on the default model: what it measures, draws, merges and refuses.
#![cfg(feature = "models")]

mod common;

use common::{longctx, ok, refused};
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

fn curve(arguments: &[&str]) -> Command {
    let model = std::env::var("LONGCTX_MODEL").expect("`cargo xtask ci` names the default model");
    let data = std::env::var("LONGCTX_DATA").expect("and the folder of texts");
    let mut command = longctx(&["curve", "--model", &model, "--texts", &data]);
    command.args(arguments);
    command
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn every_method_is_asked_at_every_share_of_one_prefill() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (one, both, svg) = (path("one.json"), path("both.json"), path("svg"));
    let mlp = concat!(env!("CARGO_MANIFEST_DIR"), "/../kvzap/surrogates/smollm2-135m-instruct-mlp");
    let sizes = ["--tokens", "500", "--samples", "1", "--remove", "0.25", "0.5"];
    let methods = ["--method", "smollm2-135m-instruct-mlp", "KVzip+", "StreamingLLM"];
    let common = [&["--surrogate", mlp, "--threshold", "-3"][..], &sizes, &methods].concat();
    ok(curve(&[&common[..], &["--task", "niah_single_1", "--json", &one]].concat()));
    let more = ["--task", "answer-nll", "--merge", &one, "--json", &both, "--svg", &svg];
    ok(curve(&[&common[..], &more].concat()));

    let report: Value = serde_json::from_slice(&std::fs::read(&both).unwrap()).unwrap();
    assert!(report["r2"]["smollm2-135m-instruct-mlp"].as_f64().is_some());
    let rows = report["curve"].as_array().unwrap();
    // The full cache; the surrogate with its first tokens protected and free, and its threshold; two more.
    assert_eq!(rows.len(), 2 * (1 + 2 + 2 + 1 + 2 + 2), "{rows:?}");
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap();
        let (asked, removed) = (number("asked"), number("removed"));
        assert!(asked < 0.0 || (removed - asked).abs() < 0.01, "{row}");
        assert!(number("low") <= number("score") && number("score") <= number("high"), "{row}");
    }
    let full = rows.iter().find(|row| row["task"] == "niah_single_1" && row["method"] == "full");
    assert_eq!(full.unwrap()["score"], 1.0, "a needle in 350 tokens of noise is found");
    for name in ["niah_single_1-500.svg", "answer-nll-500.svg"] {
        let picture = std::fs::read_to_string(folder.path().join("svg").join(name)).unwrap();
        assert!(picture.contains("StreamingLLM"), "{name}");
    }
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn unknown_names_are_refused_with_the_known_ones() {
    for (arguments, wanted) in [
        (&["--task", "niah"][..], "niah_multikey_1"),
        (&["--task", "niah_single_1", "--method", "h20"], "StreamingLLM"),
        (&["--task", "perplexity"], "--documents"),
        (&["--task", "niah_single_1", "--remove", "1.5"], "from 0 to 1"),
        (&["--merge", "/no/such/file"], "cannot read"),
    ] {
        let said = refused(curve(arguments));
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn rows_are_merged_without_a_model_and_nothing_is_asked_without_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let row = |method: &str, score: f64| {
        serde_json::json!({
            "task": "niah_single_1", "context": 500, "method": method, "asked": 0.5, "removed": 0.5,
            "removed_of_judged": 0.6, "score": score, "low": 0.0, "high": 1.0, "n": 4,
        })
    };
    for (name, rows) in
        [("old", vec![row("a", 0.25), row("b", 0.5)]), ("new", vec![row("a", 0.75)])]
    {
        let report = serde_json::json!({"r2": {}, "settings": [{"seed": 42}], "curve": rows});
        std::fs::write(path(name), report.to_string()).unwrap();
    }
    let curve = |arguments: &[&str]| longctx(&[&["curve"], arguments].concat());
    let merge = ["--merge", &path("old"), &path("new")];
    ok(curve(&[&merge[..], &["--json", &path("both")]].concat()));
    let both: Value = serde_json::from_slice(&std::fs::read(path("both")).unwrap()).unwrap();
    let scores: Vec<f64> = both["curve"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["score"].as_f64().unwrap())
        .collect();
    assert_eq!(scores, [0.5, 0.75]);
    assert_eq!(both["settings"], serde_json::json!([{"seed": 42}]), "each once");

    let mut report = both;
    let said = refused(curve(&["--merge", &path("both"), "--against", "a"]));
    assert!(said.contains("measure it with --each"), "{said}");
    for (row, scores) in [(0, "1 1 0 0"), (1, "1 1 1 0")] {
        report["curve"][row]["scores"] = scores.into();
    }
    std::fs::write(path("both"), report.to_string()).unwrap();
    let paired = ["--merge", &path("both"), "--against", "b", "--json", &path("paired")];
    ok(curve(&paired));
    let paired: Value = serde_json::from_slice(&std::fs::read(path("paired")).unwrap()).unwrap();
    assert_eq!(paired["curve"], report["curve"]);
    let found = &paired["paired"][1];
    assert_eq!(found["method"], "a", "{paired}");
    assert_eq!((&found["difference"], &found["n"]), (&0.25.into(), &4.into()), "{paired}");

    let asked = ["--task", "niah_single_1", "--texts", &path("")];
    let said = refused(curve(&asked));
    assert!(said.contains("give --model"), "{said}");

    for (more, wanted) in [
        (["--json", "/dev/null"], "/dev/null is no plain file"),
        (["--tokens", "132"], "have nothing to forget"),
    ] {
        let said = refused(curve(&[&merge[..], &asked, &more].concat()));
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn a_run_that_is_killed_goes_on_where_it_stopped_and_no_other_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    common::tiny_model(&folder.path().join("model"));
    let documents: Vec<String> = (0..SAMPLES)
        .map(|n| {
            serde_json::json!({"text": format!("Of {n} and {}: ", n * n).repeat(60)}).to_string()
        })
        .collect();
    std::fs::write(path("documents.jsonl"), documents.join("\n")).unwrap();
    let command = |out: &str, more: &[&str]| {
        let mut command =
            longctx(&["curve", "--threads", "1", "--window", "8", "--remove", "0.25", "0.5"]);
        command.args(["--model", &path("model"), "--documents", &path("documents.jsonl")]);
        command.args(["--task", "perplexity", "--tokens", "30", "150"]);
        command.args(["--method", "KVzip", "KVzip+", "H2O", "--json", &path(out)]).args(more);
        command.args(["--samples", &SAMPLES.to_string()]).stderr(Stdio::piped());
        command.stdout(Stdio::piped());
        command
    };
    let finish = |out: &str| {
        ok(command(out, &[]));
        read(&path(out)).unwrap()
    };
    let whole = finish("whole");

    let mut child = command("killed", &[]).spawn().unwrap();
    let left = || read(&path("killed")).map_or(Value::Null, |report| report["unfinished"].clone());
    let kept = |left: &Value| left["samples"].as_array().map_or(0, Vec::len);
    while left()["cells"] != 1 || kept(&left()) < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before a sample was kept");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let (cut_off, kept) = (read(&path("killed")).unwrap(), kept(&left()));
    let rows = cut_off["curve"].as_array().unwrap();
    let few = rows.iter().filter(|row| row["n"] == kept).count();
    assert!(kept < SAMPLES && few == 7 && rows.len() == 14, "{rows:?}");

    let said = refused(command("killed", &["--seed", "7"]));
    assert!(said.contains("whose seed is 42, and now it is 7"), "{said}");
    assert_eq!(read(&path("killed")).unwrap(), cut_off, "what is there is left alone");

    // A sample that is there is not measured again.
    let mut marked = cut_off.clone();
    marked["unfinished"]["samples"][0][0][2] = 1000.0.into();
    std::fs::write(path("marked"), marked.to_string()).unwrap();
    let full = |report: &Value| report["curve"][7]["score"].as_f64().unwrap();
    let more = full(&finish("marked")) - full(&whole);
    assert!((more - 1000.0 / SAMPLES as f64).abs() < 1.0, "{more}");

    let resumed = finish("killed");
    assert!(resumed.get("unfinished").is_none());
    let [resumed, whole] = [&resumed, &whole].map(|report| report["curve"].as_array().unwrap());
    assert_eq!(resumed.len(), whole.len());
    for (a, b) in resumed.iter().zip(whole) {
        for name in ["task", "context", "method", "asked", "n"] {
            assert_eq!(a[name], b[name]);
        }
        for name in ["removed", "removed_of_judged", "score", "low", "high"] {
            let [a, b] = [a, b].map(|row| row[name].as_f64().unwrap());
            assert!((a - b).abs() < 1e-12, "{name}: {a} and {b}"); // but for the last digit of what was written
        }
    }
}

const SAMPLES: usize = 60;

fn read(path: &str) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

#[test]
fn a_reader_that_leaves_ends_the_command_without_a_word() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let row = |method: &str| {
        serde_json::json!({
            "task": "niah_single_1", "context": 500, "method": method, "asked": 0.5, "removed": 0.5,
            "removed_of_judged": 0.6, "score": 0.5, "low": 0.0, "high": 1.0, "n": 2, "scores": "1 0",
        })
    };
    let report =
        serde_json::json!({"r2": {}, "settings": [], "curve": [row("mlp"), row("linear")]});
    std::fs::write(&file, report.to_string()).unwrap();
    let mut command = longctx(&["curve", "--against", "mlp", "--merge"]);
    command.arg(file.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
    assert_eq!(ended.status.signal(), Some(13), "SIGPIPE");
}
