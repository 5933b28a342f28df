//! Tiny samples of our own making in both published formats.

use super::*;
use serde_json::json;

fn load(name: &str, lines: &[Value]) -> Result<LongBench> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("{name}.jsonl"));
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, text).unwrap();
    LongBench::load(&path)
}

fn official(name: &str) -> Value {
    let answer = match name.trim_end_matches("_e") {
        "trec" | "lsht" => "Human",
        "passage_count" => "7",
        "passage_retrieval_en" => "Paragraph 7",
        "passage_retrieval_zh" => "段落7",
        _ => "天安门 x = read(y)",
    };
    json!({
        "input": "Where? Type:", "context": "The {input} text.", "answers": [answer], "length": 5000, "dataset": name,
        "language": "en", "all_classes": ["Human", "Hum", "Entity"], "_id": "abc",
    })
}

#[test]
fn every_data_set_scores_its_own_answers_100_and_nothing_0() {
    for name in LongBench::names() {
        for name in [name.to_owned(), format!("{name}_e")] {
            let task = load(&name, &[official(&name)]).unwrap();
            let sample = task.sample(0).unwrap();
            let score = task.score(&sample, &sample.answers[0]);
            assert!((score - 1.0).abs() < 1e-6, "{name}: {score}");
            for text in ["", "\n\n", "\u{fffd}\0", &"zz ".repeat(5000)] {
                assert_eq!(task.score(&sample, text), 0.0, "{name}: {text:.9}");
            }
            assert_eq!((task.name(), sample.max_new_tokens > 50), (name.as_str(), true));
            assert!(sample.context.contains("The {input} text."), "{name}");
            assert!(!sample.question.contains("{input}"), "{name}");
        }
    }
}

#[test]
fn a_prompt_is_the_official_one_in_three_parts() {
    let sample = load("hotpotqa", &[official("hotpotqa")]).unwrap().sample(0).unwrap();
    assert_eq!(
        [&*sample.context, &sample.question, &sample.answer_prefix].concat(),
        "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe \
         following are given passages.\nThe {input} text.\n\nAnswer the question based on the given passages. Only give me \
         the answer and do not output any other words.\n\nQuestion: Where? Type:\nAnswer:"
    );
    assert_eq!(sample.max_new_tokens, 52);
    // The input ends in what the answer is made to begin with.
    let sample = load("trec", &[official("trec")]).unwrap().sample(0).unwrap();
    assert_eq!((&*sample.question, &*sample.answer_prefix), ("Where? ", "Type:"));
}

#[test]
fn kvpresss_records_are_taken_as_they_are() {
    let record = json!({
        "context": "All of it.", "question": "Who?", "answer_prefix": "So:", "answers": ["A", "B"], "all_classes": null,
        "task": "qasper", "max_new_tokens": 148, "length": 3,
    });
    let task = load("qasper", &[record.clone(), record]).unwrap();
    let sample = task.sample(1).unwrap();
    assert_eq!(
        (&*sample.context, &*sample.question, &*sample.answer_prefix),
        ("All of it.", "Who?", "So:")
    );
    assert_eq!(sample.max_new_tokens, 148);
    assert_eq!([task.group(0), task.group(1)], [0, 0]);
}

#[test]
fn the_best_reference_and_the_first_line_count() {
    let with = |name: &str, answers: Value| {
        let mut record = official(name);
        record["answers"] = answers;
        load(name, &[record])
    };
    let score = |task: &LongBench, text| task.score(&task.sample(0).unwrap(), text);
    let two = with("qasper", json!(["paris", "Paris, France"])).unwrap();
    assert_eq!(score(&two, "Paris, France"), 1.0);
    let first = with("qasper", json!(["paris"])).unwrap();
    assert!((score(&first, "Paris, France") - 2.0 / 3.0).abs() < 1e-9);
    let bare = with("triviaqa", json!("Paris")).unwrap();
    assert_eq!(bare.sample(0).unwrap().answers, ["Paris"], "never five letters");
    assert_eq!(score(&bare, "\n\nParis\nQuestion: next"), 1.0);
    assert_eq!(score(&bare, "\n  Paris \nfoo"), 1.0);
    assert!(score(&first, "\n\nParis\nQuestion: next") < 1.0, "only where it is asked for");
    let error = format!("{:#}", with("qasper", json!([])).unwrap_err());
    assert!(
        error.contains("sample 1") && error.contains("the list of answers is empty"),
        "{error}"
    );
}

#[test]
fn bad_data_is_named_by_file_sample_and_field() {
    let error = load("hotpot", &[official("hotpot")]).unwrap_err().to_string();
    assert!(error.contains("no data set hotpot") && error.contains("hotpotqa"), "{error}");
    for (name, field, wanted) in [
        ("qasper", "context", "field context is missing"),
        ("qasper", "input", "field input is missing"),
        ("qasper", "answers", "field answers is missing"),
        ("trec", "all_classes", "field all_classes is missing"),
    ] {
        let mut record = official(name);
        record.as_object_mut().unwrap().remove(field);
        let error = format!("{:#}", load(name, &[official(name), record]).unwrap_err());
        assert!(error.contains("sample 2") && error.contains(wanted), "{error}");
    }
    let mut record = official("passage_retrieval_en");
    record["answers"] = json!(["the third"]);
    let error = format!("{:#}", load("passage_retrieval_en", &[record]).unwrap_err());
    assert!(error.contains("names no paragraph"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qasper.jsonl");
    for (bytes, wanted) in [
        (&b"{\"input\": \"a\"}\n{\"inp"[..], "line 2 is no JSON object, or cut off"),
        (b"{\"input\": \"\xff\"}\n", "line 1 is no JSON object"),
        (b"[1]\n", "line 1 is no JSON object"),
        (b"\n\n", "holds no samples"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", LongBench::load(&path).unwrap_err());
        assert!(error.contains(wanted), "{error}");
    }
}
