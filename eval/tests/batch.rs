//! `longctx generate --batch` on a tiny model: answers as `generate` gives them one by one, in order; what is refused,
//! and what a kill leaves behind. Needs no fetched files.
#![cfg(feature = "models")]

mod common;

use common::longctx;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

struct Batch(tempfile::TempDir);

impl Batch {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        common::tiny_model(&folder.path().join("model"));
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command =
            longctx(&["generate", "--threads", "1", "--window", "16", "--method", "recency"]);
        command
            .args(["--budget", "0.5", "--protect", "9", "--model"])
            .arg(self.path("model"))
            .args(more);
        command
    }

    /// Runs a file of these lines.
    fn run(&self, lines: &str, more: &[&str]) -> Output {
        let file = self.path("batch.jsonl");
        fs::write(&file, lines).unwrap();
        self.command(&["--batch", file.to_str().unwrap()]).args(more).output().unwrap()
    }

    fn answers(&self, lines: &[Value], more: &[&str]) -> Vec<Value> {
        let lines = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        let output = self.run(&lines, more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        parse(&output.stdout)
    }
}

fn parse(bytes: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(bytes).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn requests() -> Vec<Value> {
    let prompt = |n: usize| format!("The keeper of house {n} had a lamp. ").repeat(1 + n % 4);
    let request = |n: usize| {
        json!({
            // Every third shares its prompt with the one before.
            "id": format!("request {n}"), "prompt": prompt(n - usize::from(n % 3 == 2)),
            "question": format!("Who is {n}?"), "max_tokens": 9 + n * 37 % 120,
            "temperature": if n.is_multiple_of(2) { 0.0 } else { 1.2 }, "seed": n, "top_k": 40,
        })
    };
    (0..12).map(request).collect()
}

#[test]
fn a_batch_answers_as_one_by_one_and_in_order() {
    let batch = Batch::new();
    let requests = requests();
    let answers = batch.answers(&requests, &[]);
    assert_eq!(answers.len(), requests.len());
    for (request, answer) in requests.iter().zip(&answers) {
        assert_eq!(answer["id"], request["id"]);
        let text = |field: &str| request[field].to_string().trim_matches('"').to_owned();
        let arguments = ["prompt", "question", "max_tokens", "temperature", "seed", "top_k"];
        let arguments =
            arguments.map(|name| format!("--{}={}", name.replace('_', "-"), text(name)));
        let arguments = arguments.each_ref().map(String::as_str);
        let alone = batch.command(&arguments).arg("--json").output().unwrap();
        assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stderr));
        let alone: Value = serde_json::from_slice(&alone.stdout).unwrap();
        assert_eq!(answer["text"], alone["answers"][0]["text"]);
        assert_eq!(answer["usage"]["new_tokens"], alone["answers"][0]["new_tokens"]);
        assert_eq!(answer["usage"]["context_tokens"], alone["context_tokens"]);
    }
    let shared = answers.iter().filter(|answer| answer["usage"]["shared_tokens"] != 0).count();
    assert!((1..=4).contains(&shared), "{shared}");
    let removed = |answer: &Value| answer["usage"]["removed"].as_f64().unwrap() > 0.0;
    assert!(answers.iter().any(removed));

    // In so little memory that they make room for each other, to a file, with a summary.
    let out = batch.path("out.jsonl");
    let small = ["--memory", "0.0002", "--json", "--output", out.to_str().unwrap()];
    let lines = requests.iter().map(|line| format!("{line}\n")).collect::<String>();
    let summary: Value = serde_json::from_slice(&batch.run(&lines, &small).stdout).unwrap();
    assert!(summary["preemptions"].as_u64().unwrap() > 0, "{summary}");
    assert!(summary["mean_batch"].as_f64().unwrap() > 1.5, "{summary}");
    let again = parse(&fs::read(&out).unwrap());
    let texts = |answers: &[Value]| answers.iter().map(|a| a["text"].clone()).collect::<Vec<_>>();
    assert_eq!(texts(&again), texts(&answers));
}

#[test]
fn messages_are_rendered_and_one_failure_is_its_own() {
    let batch = Batch::new();
    let out = batch.path("out.jsonl");
    let lines = [
        json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}),
        json!({"prompt": "word ".repeat(600)}),
        json!({"prompt": "Hello", "max_tokens": 4}),
    ];
    let lines = lines.map(|line| format!("{line}\n")).concat();
    let output = batch.run(&lines, &["--output", out.to_str().unwrap()]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("1 of 3 requests failed"), "{error}");
    let answers = parse(&fs::read(&out).unwrap());
    assert_eq!(answers.iter().map(|a| a["id"].clone()).collect::<Vec<_>>(), [1, 2, 3]);
    let failure = answers[1]["error"].as_str().unwrap();
    assert!(failure.contains("do not fit the model's context of 512"), "{failure}");
    // The template makes the same of a prompt as of a message; only where it is pruned differs.
    let context = |i: usize| answers[i]["usage"]["context_tokens"].as_u64().unwrap();
    let question = answers[2]["usage"]["question_tokens"].as_u64().unwrap();
    assert_eq!(context(0), context(2) + question);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_written() {
    let batch = Batch::new();
    let out = batch.path("out.jsonl");
    let to = ["--output", out.to_str().unwrap()];
    let good = "{\"prompt\": \"a\"}\n";
    for (lines, more, wanted) in [
        ("{\"promt\": \"a\"}\n", &[][..], "batch.jsonl line 1: wanted"),
        (&*format!("{good}{{\"prompt\": "), &[], "batch.jsonl line 2: wanted"),
        ("", &[], "holds no requests"),
        (good, &["--at-once", "65"], "batch is 65; give 1 to 64 texts"),
        (good, &["--at-once", "0"], "give 1 to 64 texts"),
        (good, &["--memory=-1"], "give more than 0 gigabytes"),
        (good, &["--memory", "0.000001"], "give enough for a page"),
        (good, &["--memory", "1000000"], "of memory"),
        (good, &["--prompt", "b"], "cannot be used with"),
    ] {
        let output = batch.run(lines, &[&to[..], more].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(wanted), "{wanted}: {error}");
        assert!(!error.contains("panicked") && !out.exists());
    }
    let nowhere = batch.path("nowhere/out.jsonl");
    let output = batch.run(good, &["--output", nowhere.to_str().unwrap()]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("nowhere/out.jsonl; does its folder exist"), "{error}");
    let output = batch.run(good, &["--json"]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("say by --output"));
    assert_eq!(fs::read_dir(batch.0.path()).unwrap().count(), 2, "the model and the batch alone");
}

/// Killed on its way it leaves no answers under their name, and the next run is not held up by what it did leave.
#[test]
fn a_batch_that_is_killed_leaves_no_half_answers_and_starts_again() {
    let batch = Batch::new();
    let out = batch.path("out.jsonl");
    let lines =
        (0..40).map(|n| format!("{}\n", json!({"prompt": format!("{n}"), "max_tokens": 400})));
    let lines = lines.collect::<String>();
    fs::write(batch.path("batch.jsonl"), &lines).unwrap();
    let file = batch.path("batch.jsonl");
    let arguments = ["--batch", file.to_str().unwrap(), "--output", out.to_str().unwrap()];
    let mut child = batch.command(&arguments).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    child.kill().unwrap();
    let killed = !child.wait().unwrap().success();
    assert!(!killed || !out.exists(), "all answers or none");
    let lines = lines.replace("400", "5");
    assert!(batch.run(&lines, &["--output", out.to_str().unwrap()]).status.success());
    assert_eq!(parse(&fs::read(&out).unwrap()).len(), 40);
}

#[test]
fn a_model_in_parts_answers_as_the_whole() {
    let batch = Batch::new();
    let file = batch.path("batch.jsonl");
    let lines = requests().iter().map(|line| format!("{line}\n")).collect::<String>();
    fs::write(&file, lines).unwrap();
    let run = |more: &[&str]| {
        let mut command = longctx(&["generate", "--threads", "1", "--window", "16", "--model"]);
        command.arg(batch.path("model")).arg("--batch").arg(&file).args(more).output().unwrap()
    };
    let (whole, parts) = (run(&[]), run(&["--cards", "2"]));
    assert!(parts.status.success(), "{}", String::from_utf8_lossy(&parts.stderr));
    let untimed = |output: &Output| {
        let mut answers = parse(&output.stdout);
        let usages = answers.iter_mut().filter_map(|answer| answer["usage"].as_object_mut());
        usages.for_each(|usage| usage.retain(|key, _| !key.ends_with("_seconds")));
        answers
    };
    assert_eq!(untimed(&parts), untimed(&whole), "texts, stops and what was held");
    let refused = |more: &[&str]| String::from_utf8(run(more).stderr).unwrap();
    assert!(refused(&["--cards", "3"]).contains("kv heads (2) cannot be cut into 3 equal parts"));
    let other = refused(&["--cards", "2", "--method", "recency", "--budget", "0.5"]);
    assert!(other.contains("only a surrogate's threshold"), "{other}");
}
