//! Journals that were killed, that belong to another run, and the files that are made of them.

use super::*;
use serde_json::json;
use std::fs;

fn settings(threshold: f64) -> Settings {
    json!({"dataset": "ruler", "threshold": threshold}).as_object().unwrap().clone()
}

fn row(task: &str, index: u64, score: f64) -> Row {
    Row {
        task: task.to_owned(),
        index,
        question: "Which, \"or\"\nwhere? ".to_owned(),
        answers: vec!["it's".to_owned(), "a \"b\", c".to_owned()],
        predicted_answer: "one\r\ntwo, 'three' \u{fffd}\0".to_owned(),
        score,
        compression_ratio: 0.75,
        ..Row::default()
    }
}

#[test]
fn a_journal_that_was_cut_at_any_byte_goes_on_without_losing_or_doubling_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let mut journal = Journal::open(folder.path(), "journal.jsonl", &settings(-2.5)).unwrap();
    (0..3).for_each(|index| journal.append(&row("vt", index, 1.0)).unwrap());
    drop(journal);
    let whole = fs::read(&path).unwrap();
    for cut in 0..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let mut journal = Journal::open(folder.path(), "journal.jsonl", &settings(-2.5)).unwrap();
        for index in 0..3 {
            if !journal.has("vt", index) {
                journal.append(&row("vt", index, 1.0)).unwrap();
            }
        }
        drop(journal);
        assert_eq!(fs::read(&path).unwrap(), whole, "cut at {cut}");
    }
}

#[test]
fn another_run_of_the_same_folder_is_refused_by_the_setting_that_differs() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, settings: &Settings| Journal::open(folder.path(), name, settings);
    let first = open("journal-1-of-2.jsonl", &settings(-2.5)).unwrap();
    let error = open("journal-1-of-2.jsonl", &settings(-2.5)).unwrap_err().to_string();
    assert!(error.contains("is being written by another run"), "{error}");
    drop(first);
    for (other, wanted) in [
        (settings(-3.0), "threshold is -2.5, now it is -3.0"),
        (
            json!({"dataset": "ruler"}).as_object().unwrap().clone(),
            "threshold is -2.5, now it is nothing",
        ),
    ] {
        for name in ["journal-1-of-2.jsonl", "journal-2-of-2.jsonl"] {
            let error = open(name, &other).unwrap_err().to_string();
            assert!(error.contains(wanted) && error.contains("--out"), "{error}");
            let _ = fs::remove_file(folder.path().join("journal-2-of-2.jsonl"));
        }
    }
    fs::write(folder.path().join("journal.jsonl"), "{}\n").unwrap();
    let error = open("journal-2-of-2.jsonl", &settings(-2.5)).unwrap_err().to_string();
    assert!(error.contains("does not begin with its settings"), "{error}");
}

#[test]
fn shards_know_each_others_rows_and_are_merged_with_each_row_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut one = Journal::open(folder.path(), "journal-1-of-2.jsonl", &settings(1.0)).unwrap();
    one.append(&row("vt", 0, 1.0)).unwrap();
    let mut two = Journal::open(folder.path(), "journal-2-of-2.jsonl", &settings(1.0)).unwrap();
    assert!(two.has("vt", 0) && !two.has("vt", 1) && !two.has("cwe", 0));
    two.append(&row("vt", 0, 0.0)).unwrap(); // as two machines may both do
    two.append(&row("vt", 1, 0.0)).unwrap();
    let (_, rows) = Journal::merged(folder.path()).unwrap();
    assert_eq!(
        rows.iter().map(|row| (row.index, row.score)).collect::<Vec<_>>(),
        [(0, 1.0), (1, 0.0)]
    );
}

#[test]
fn predictions_are_read_back_as_they_were_and_as_kvpress_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(folder.path(), "journal.jsonl", &settings(1.0)).unwrap();
    let mut second = row("cwe", 0, 0.5);
    second.facts.insert("paragraphs_dropped".into(), 3.into());
    journal.append(&row("vt", 0, 1.0)).unwrap();
    journal.append(&second).unwrap();
    write(
        folder.path(),
        Summary::StringMatch,
        &[("dataset", "ruler".into()), ("data_dir", json!(null))],
    )
    .unwrap();

    let rows = read_predictions(&folder.path().join("predictions.csv")).unwrap();
    assert_eq!(rows.iter().map(|row| &*row.task).collect::<Vec<_>>(), ["cwe", "vt"]);
    for found in rows {
        assert_eq!(found.answers, second.answers);
        assert_eq!(found.predicted_answer, second.predicted_answer);
        assert_eq!(found.compression_ratio, 0.75);
    }
    let text = |name| fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(
        text("metrics.json"),
        "{\n    \"cwe\": {\n        \"string_match\": 50.0\n    },\n    \"vt\": {\n        \"string_match\": 100.0\n    }\n}"
    );
    assert!(
        text("config.yaml")
            .starts_with("dataset: \"ruler\"\ndata_dir: null\nlongctx:\n  dataset: \"ruler\"\n")
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4, "nothing is left beside");

    // numpy's print of a list, one of Python's, and a plain text; columns in any order.
    let path = folder.path().join("theirs.csv");
    fs::write(
        &path,
        "compression_ratio,answer,task,predicted_answer\n0.5,\"['1234567' '7654321']\",vt,x\n,\"['70']\",vt,\n0.5,Paris,qa_1,\"a\nb\"\n",
    )
    .unwrap();
    let rows = read_predictions(&path).unwrap();
    let answers: Vec<_> = rows.iter().map(|row| row.answers.join("|")).collect();
    assert_eq!(answers, ["1234567|7654321", "70", "Paris"]);
    fs::write(&path, "compression_ratio,answer,predicted_answer\nhalf,70,x\n").unwrap();
    let error = format!("{:#}", read_predictions(&path).unwrap_err());
    assert!(error.contains("row 2, column compression_ratio") && error.contains("half"), "{error}");
    fs::write(&path, "task,predicted_answer\nvt,x\n").unwrap();
    assert!(read_predictions(&path).unwrap_err().to_string().contains("no column answer"));
}

#[test]
fn folders_are_named_as_kvpress_names_them() {
    let name = Name {
        dataset: "ruler".into(),
        data_dir: "4096".into(),
        model: "Qwen/Qwen3-8B".into(),
        press: "kvzap_mlp".into(),
        level: -4.0,
        more: vec![],
    };
    assert_eq!(name.to_string(), "ruler__4096__Qwen--Qwen3-8B__kvzap_mlp__-4.00");
    let more = vec!["max_context8192".to_owned()];
    let name = Name { data_dir: String::new(), level: 0.875, more, ..name };
    assert_eq!(name.to_string(), "ruler__Qwen--Qwen3-8B__kvzap_mlp__0.88__max_context8192");
}

#[test]
fn each_benchmark_prints_what_kvpress_prints() {
    let rows = |scores: &[f64], facts: &[Value]| -> Vec<Row> {
        let one = |(score, facts): (&f64, &Value)| Row {
            facts: facts.as_object().unwrap().clone(),
            predicted_answer: if *score < 0.2 { "none" } else { "boxed{1}" }.to_owned(),
            ..row("x", 0, *score)
        };
        scores.iter().zip(facts).map(one).collect()
    };
    let lengths = [3999, 4000, 8000, 9000].map(|length| json!({"length": length}));
    let of_lengths = rows(&[1.0, 0.5, 0.25, 0.0], &lengths);
    assert_eq!(Summary::Number.metrics(&of_lengths), json!(43.75));
    assert_eq!(
        Summary::Lengths.metrics(&of_lengths),
        json!({"0-4k": 100.0, "4-8k": 50.0, "8k+": 12.5})
    );
    assert_eq!(Summary::Lengths.metrics(&of_lengths[..1])["8k+"], Value::Null);
    let problems = [0, 0, 1, 1].map(|problem| json!({"problem": problem}));
    assert_eq!(
        Summary::Rollouts.metrics(&rows(&[0.0, 1.0, 0.0, 0.0], &problems)),
        json!({"correct": 1, "answered": 1, "accuracy": 0.25, "total": 4, "pass@2": 0.5})
    );
    let groups = [("easy", "short"), ("hard", "short"), ("hard", "long"), ("hard", "long")];
    let groups = groups.map(|(hard, long)| json!({"difficulty": hard, "length": long}));
    let of_groups = rows(&[1.0, 1.0, 0.0, 0.0], &groups);
    assert_eq!(Summary::Share.metrics(&of_groups), json!(0.5));
    assert_eq!(
        Summary::Groups.metrics(&of_groups),
        json!({"average": 0.5, "easy": 1.0, "hard": 1.0 / 3.0, "short": 1.0, "long": 0.0})
    );
    let mut likely = vec![row("q", 0, 1.0), row("q", 1, 0.0)];
    (likely[0].nll, likely[1].nll) = (Some(1.0), Some(2.0));
    assert_eq!(
        Summary::StringMatch.metrics(&likely),
        json!({"q": {"string_match": 50.0, "nll": 1.5}})
    );
}
