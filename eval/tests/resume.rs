//! `longctx eval` on a tiny model: killed again and again, sharded, resumed, refused. Needs no fetched files.
#![cfg(feature = "models")]

mod common;

use common::longctx;
use eval::results::{Journal, Row, read_predictions};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

const TASKS: [&str; 3] = ["qa_1", "vt", "niah_single_1"];
const SAMPLES: usize = 5;

/// A model and its samples.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        common::tiny_model(&folder.path().join("model"));
        let mut lines = String::new();
        for task in TASKS {
            for n in 0..SAMPLES {
                let record = json!({
                    // Of every task the last two share a context.
                    "context": format!("The {task} of {}. ", n.min(SAMPLES - 2)).repeat(6), "question": format!("Who is {n}? "),
                    "answer_prefix": "A:", "answer": [n.to_string()], "task": task, "max_new_tokens": 16,
                });
                lines += &format!("{record}\n");
            }
        }
        fs::write(folder.path().join("samples.jsonl"), lines).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, out: &str, more: &[&str]) -> Command {
        let mut command = longctx(&["eval", "--threads", "1", "--window", "16", "--model"]);
        command.arg(self.path("model"));
        command.arg("--data").arg(self.path("samples.jsonl")).arg("--out").arg(self.path(out));
        if !more.contains(&"--method") {
            command.args(["--method", "full", "recency"]);
        }
        command.args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, out: &str, more: &[&str]) -> Output {
        self.command(out, more).output().unwrap()
    }

    #[track_caller]
    fn finish(&self, out: &str, more: &[&str]) -> String {
        let output = self.run(out, more);
        let [text, error] = [output.stdout, output.stderr].map(|b| String::from_utf8(b).unwrap());
        assert!(output.status.success(), "{error}");
        text
    }

    /// The rows of both methods, without what took how long.
    fn rows(&self, out: &str) -> [Vec<Row>; 2] {
        ["no_press__0.00", "streaming_llm__0.50"].map(|method| {
            let folder = self.path(out).join(format!("ruler__samples__model__{method}"));
            let (_, mut rows) = Journal::merged(&folder).unwrap();
            rows.sort_by(|a, b| (&a.task, a.index).cmp(&(&b.task, b.index)));
            for row in &mut rows {
                (row.prefill_seconds, row.decode_seconds, row.together) = (0.0, 0.0, 0);
            }
            rows
        })
    }
}

#[test]
fn a_run_that_is_killed_at_any_moment_loses_no_sample_and_runs_none_twice() {
    let bench = Bench::new();
    let start = Instant::now();
    bench.finish("whole", &[]);
    let whole = start.elapsed();
    let wanted = bench.rows("whole");
    assert!(wanted.iter().all(|rows| rows.len() == TASKS.len() * SAMPLES));
    assert!(wanted[0].iter().all(|row| row.compression_ratio == 0.0));
    assert!(wanted[1].iter().all(|row| row.compression_ratio > 0.1), "{:?}", wanted[1][0]);

    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let lines = || -> usize {
        let journals = fs::read_dir(bench.path("killed")).into_iter().flatten();
        let texts = journals.map(|f| fs::read_to_string(f.unwrap().path().join("journal.jsonl")));
        texts.map(|text| text.unwrap_or_default().lines().count()).sum()
    };
    let mut grown = BTreeSet::new();
    for _ in 0..10 {
        let mut child = bench.command("killed", &[]).spawn().unwrap();
        std::thread::sleep(whole.mul_f64(random.random_range(0.05..0.9)));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        grown.insert(lines());
    }
    bench.finish("killed", &[]);
    assert_eq!(bench.rows("killed"), wanted);
    assert_eq!(
        lines(),
        2 * (1 + TASKS.len() * SAMPLES),
        "a line for the settings and one a sample"
    );
    assert!(grown.len() > 1, "the kills came too late or too early to show anything: {grown:?}");
    bench.finish("killed", &[]);
    assert_eq!(lines(), 2 * (1 + TASKS.len() * SAMPLES), "nothing is left to do");
}

#[test]
fn methods_that_share_a_reading_answer_as_each_does_alone() {
    let bench = Bench::new();
    // Greedy, this model writes one token again and again.
    let warm = ["--temperature", "0.8"];
    for more in [&warm[..], &[&warm[..], &["--prune-while-decoding"]].concat()] {
        let out = |what: &str| format!("{what}{}", more.len());
        let methods = |names: &[&'static str]| [more, &["--method"], names].concat();
        bench.finish(&out("together"), &methods(&["full", "recency", "snapkv", "h2o"]));
        let together = bench.rows(&out("together"));
        // A part of the methods is there already, as after a kill between two answers of a sample.
        for method in ["recency", "full"] {
            bench.finish(&out("each"), &methods(&[method]));
        }
        assert_eq!(bench.rows(&out("each")), together, "{more:?}");
        // The last two share a context: here they are asked one after the other, above side by side.
        bench.finish(&out("some"), &[&methods(&["recency"])[..], &["--samples", "4"]].concat());
        bench.finish(&out("some"), &methods(&["full", "recency", "full"])); // twice is once
        assert_eq!(bench.rows(&out("some")), together, "{more:?}");
        let texts = |rows: &[Row]| -> Vec<String> {
            rows.iter().map(|row| row.predicted_answer.clone()).collect()
        };
        assert_ne!(texts(&together[0]), texts(&together[1]), "forgetting half changes nothing");
        let kept = |row: &Row| row.kept.len() == 2 && row.kept[0][1] < row.context_tokens;
        assert!(together[1].iter().all(kept));
    }
}

#[test]
fn rollouts_that_are_resumed_are_those_of_a_run_that_was_not_stopped() {
    let bench = Bench::new();
    let problem = "{\"problem\": \"What is 2 plus 2?\", \"answer\": 4}\n";
    fs::write(bench.path("samples.jsonl"), problem).unwrap();
    let rollouts = |out: &str| -> BTreeSet<(u64, String)> {
        let folder = bench.path(out).join("aime25__model__no_press__0.00");
        let (_, rows) = Journal::merged(&folder).unwrap();
        rows.into_iter().map(|row| (row.index, row.predicted_answer)).collect()
    };
    let aime = ["--task", "aime25", "--max-tokens", "12"];
    bench.finish("whole", &aime);
    for samples in ["2", "4"] {
        bench.finish("parts", &[&aime[..], &["--samples", samples]].concat());
    }
    let whole = rollouts("whole");
    assert_eq!(rollouts("parts"), whole);
    let texts: BTreeSet<&String> = whole.iter().map(|(_, text)| text).collect();
    assert!(whole.len() == 4 && texts.len() > 2, "each draws by a seed of its own: {texts:?}");
}

#[test]
fn samples_that_were_written_for_others_are_the_ones_that_are_asked() {
    let bench = Bench::new();
    let written = bench.path("written.jsonl");
    bench.finish("none", &["--samples", "3", "--write-samples", written.to_str().unwrap()]);
    assert!(!bench.path("none").exists(), "nothing is asked");
    let lines = |path: &std::path::Path| -> BTreeSet<String> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap().to_string()).collect()
    };
    let (some, all) = (lines(&written), lines(&bench.path("samples.jsonl")));
    assert!(some.len() == 9 && some.is_subset(&all));
}

#[test]
fn shards_give_what_the_whole_gives_and_the_last_one_writes_the_files() {
    let bench = Bench::new();
    bench.finish("whole", &[]);
    let file = |out: &str, name: &str| {
        bench.path(out).join("ruler__samples__model__no_press__0.00").join(name)
    };
    for shard in ["2/3", "1/3", "3/3"] {
        assert!(!file("shards", "metrics.json").exists());
        bench.finish("shards", &["--shard", shard]);
    }
    assert_eq!(bench.rows("shards"), bench.rows("whole"));
    for name in ["metrics.json", "predictions.csv"] {
        let [one, other] =
            ["shards", "whole"].map(|out| fs::read_to_string(file(out, name)).unwrap());
        assert_eq!(one, other);
    }
    let rows = read_predictions(&file("whole", "predictions.csv")).unwrap();
    assert_eq!(rows.len(), TASKS.len() * SAMPLES);
    for shard in ["0/3", "4/3", "1", "a/b"] {
        let error = String::from_utf8(bench.run("shards", &["--shard", shard]).stderr).unwrap();
        assert!(error.contains("is no shard"), "{error}");
    }
}

#[test]
fn another_setting_in_the_same_folder_is_refused_by_name() {
    let bench = Bench::new();
    bench.finish("out", &["--samples", "2"]);
    bench.finish("out", &["--samples", "3"]); // more of the same
    assert!(bench.rows("out").iter().all(|rows| rows.len() == 9));
    let refused = |more: &[&str], wanted: &str| {
        let output = bench.run("out", more);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(wanted), "{wanted}: {error}");
    };
    refused(&["--seed", "1"], "its seed is 42, now it is 1");
    refused(&["--max-tokens", "3"], "its max_tokens is null, now it is 3");
    refused(&["--dtype", "bf16"], "its dtype is");
    refused(&["--prune-while-decoding"], "its prune_while_decoding is false, now it is true");
    refused(&["--temperature", "1"], "its temperature is");
    let samples = fs::read_to_string(bench.path("samples.jsonl")).unwrap();
    fs::write(bench.path("samples.jsonl"), samples.replace("Who is 2", "Who was 2")).unwrap();
    refused(&[], "its data_files is");
    fs::write(bench.path("samples.jsonl"), samples).unwrap();
    let mut model = fs::read(bench.path("model/model.safetensors")).unwrap();
    *model.last_mut().unwrap() ^= 1;
    fs::write(bench.path("model/model.safetensors"), model).unwrap();
    refused(&[], "its model_files is");
}

#[test]
fn bad_data_and_contexts_past_the_model_are_errors_that_say_what_to_do() {
    let bench = Bench::new();
    let samples = fs::read_to_string(bench.path("samples.jsonl")).unwrap();
    let first: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    let refused = |text: &str, more: &[&str], wanted: &[&str]| {
        fs::write(bench.path("samples.jsonl"), text).unwrap();
        let output = bench.run("bad", more);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{wanted:?}");
        assert!(wanted.iter().all(|wanted| error.contains(wanted)), "{wanted:?}: {error}");
    };
    refused(&samples[..samples.len() - 20], &[], &["samples.jsonl line 15", "cut off"]);
    let mut without = first.clone();
    without.as_object_mut().unwrap().remove("answer");
    refused(&without.to_string(), &[], &["sample 1", "field answer is missing"]);
    refused(&samples, &["--only", "cwe"], &["no task is named cwe"]);
    refused(&samples, &["--task", "longbench"], &["LongBench has no data set samples"]);
    let mut long = first;
    long["context"] = "word ".repeat(700).into();
    refused(&long.to_string(), &[], &["qa_1 sample 0", "has room for", "--cut end"]);
    for cut in ["end", "middle"] {
        bench.finish(cut, &["--cut", cut]);
        let [rows, _] = bench.rows(cut);
        assert_eq!(rows[0].facts["cut"], cut);
        assert!((300..512).contains(&rows[0].context_tokens), "{}", rows[0].context_tokens);
    }
}
