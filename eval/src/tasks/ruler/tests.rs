//! Prompts beside those of RULER's own generators on the same values, and what holds at any length.

use super::*;
use serde_json::Value;
use std::collections::{HashMap, HashSet};

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/ruler/prompts.json")).unwrap()
}

fn cases(task: &str) -> Vec<Value> {
    let cases = golden()["cases"].as_array().unwrap().clone();
    cases.into_iter().filter(|case| case["task"] == task).collect()
}

fn strings(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

fn numbers(value: &Value) -> Vec<usize> {
    serde_json::from_value(value.clone()).unwrap()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

#[track_caller]
fn same(sample: &Sample, case: &Value) {
    let prompt = [&*sample.context, &sample.question, &sample.answer_prefix].concat();
    // RULER puts a space before an answer's beginning; kvpress's split leaves it to the question.
    assert_eq!(prompt, case["prompt"].as_str().unwrap());
    assert_eq!(sample.answers, strings(&case["answers"]));
    assert!(sample.question.ends_with(' ') && !sample.answer_prefix.starts_with(' '));
    let starts = ["What is", "What are all", "Question: ", "Answer the question based on"];
    assert!(starts.iter().any(|start| sample.question.starts_with(start)), "{}", sample.question);
}

/// A folder with the texts of the golden file, and lists of words.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let golden = golden();
    write("PaulGrahamEssays.json", &serde_json::json!({"text": golden["essay"]}).to_string());
    write("squad.json", golden["squad"].as_str().unwrap());
    write("hotpotqa.json", golden["hotpot"].as_str().unwrap());
    let words = |kind: &str| (0..200).map(|n| format!("{kind}{n}\n")).collect::<String>();
    write("nounlist.txt", &words("noun"));
    write("adjectivelist.txt", &words("adj"));
    write("verblist.txt", &words("verb"));
    folder
}

fn count(text: &str) -> Result<usize> {
    Ok(text.split_whitespace().count())
}

#[test]
fn needle_prompts_are_rulers() {
    let folder = folder();
    let texts = Texts::new(folder.path());
    let mut seen = 0;
    for (name, kind) in TASKS {
        let Kind::Needles(kind) = kind else { continue };
        for case in cases(name) {
            let pair = |pair: &Value| (strings(pair)[0].clone(), strings(pair)[1].clone());
            let pairs =
                |list: &Value| list.as_array().unwrap().iter().map(pair).collect::<Vec<_>>();
            let places = if case["words"].is_u64() {
                assert!(numbers(&case["depths"]).is_sorted());
                niah::Places::Essays {
                    words: number(&case["words"]),
                    depths: numbers(&case["depths"]),
                }
            } else {
                let lines = match &case["lines"] {
                    Value::Number(_) => vec![texts::NOISE.to_owned(); number(&case["lines"])],
                    others => pairs(others).iter().map(|(k, v)| kind.needle(k, v)).collect(),
                };
                niah::Places::Lines { lines, before: numbers(&case["before"]) }
            };
            let drawn = niah::Drawn {
                kind,
                needles: pairs(&case["needles"]),
                queries: strings(&case["queries"]),
                answers: strings(&case["answers"]),
                places,
            };
            assert_eq!(drawn.needles.len(), kind.keys * kind.values);
            same(&drawn.write(&texts).unwrap(), &case);
            seen += 1;
        }
    }
    assert_eq!(seen, 8);
}

#[test]
fn variable_tracking_prompts_are_rulers() {
    for case in cases("vt") {
        let drawn = |case: &Value| vt::Drawn {
            names: strings(&case["names"]),
            value: case["value"].as_str().unwrap().to_owned(),
            lines: number(&case["lines"]),
            before: numbers(&case["before"]),
        };
        same(&drawn(&case).write(Some(drawn(&case["example"]))), &case);
    }
}

#[test]
fn common_words_prompts_are_rulers_and_so_are_their_counts() {
    for case in cases("cwe") {
        let list = |list: &Value| cwe::List { common: strings(&list[0]), words: strings(&list[1]) };
        let drawn = cwe::Drawn { example: list(&case["example"]), list: list(&case["list"]) };
        same(&drawn.write(), &case);

        let words: Vec<String> = (0..200).map(|n| n.to_string()).collect();
        let short = case["tokens"] == 1024;
        let random = &mut ChaCha8Rng::seed_from_u64(1);
        let ours = cwe::Drawn::new(random, &words, number(&case["size"]), short);
        assert_eq!(histogram(&ours.example.words), histogram(&drawn.example.words));
        assert_eq!(histogram(&ours.list.words), histogram(&drawn.list.words));
    }
}

#[test]
fn frequent_words_prompts_are_rulers_and_so_are_their_counts() {
    for case in cases("fwe") {
        let words = strings(&case["words"]);
        let vocabulary = [vec!["...".to_owned()], strings(&case["answers"])].concat();
        same(&fwe::Drawn { vocabulary, words: words.clone() }.write(), &case);

        let random = &mut ChaCha8Rng::seed_from_u64(1);
        let ours = fwe::Drawn::new(random, number(&case["ranks"]), number(&case["size"]));
        assert_eq!(histogram(&ours.words), histogram(&words));
    }
}

/// How many words appear how often.
fn histogram(words: &[String]) -> Vec<usize> {
    let mut counts: HashMap<&String, usize> = HashMap::new();
    words.iter().for_each(|word| *counts.entry(word).or_default() += 1);
    let mut counts: Vec<usize> = counts.into_values().collect();
    counts.sort_unstable();
    counts
}

#[test]
fn document_prompts_are_rulers_and_so_are_the_sets_they_come_from() {
    let folder = folder();
    let texts = Texts::new(folder.path());
    for (task, set) in [("qa_1", texts.squad().unwrap()), ("qa_2", texts.hotpot().unwrap())] {
        for case in cases(task) {
            let index = number(&case["question"]) as u64;
            let question = set.question(index).unwrap();
            let documents = numbers(&case["documents"]);
            let texts = documents.iter().map(|&at| set.documents[at].as_str()).collect();
            same(&qa::Drawn { question, documents: texts, dropped: 0 }.write(), &case);

            assert_eq!(set.documents.len(), number(&case["all"]));
            let mut own = [question.gold.clone(), question.beside.clone()].concat();
            own.sort_unstable();
            assert_eq!(own, numbers(&case["own"]));
            assert_eq!(question.near, numbers(&case["near"]));
            // As many of each kind as there, for the same number of documents.
            let kinds = |documents: &HashSet<&str>| {
                let of = |places: &[usize]| {
                    places.iter().filter(|&&at| documents.contains(&*set.documents[at])).count()
                };
                [documents.len(), of(&own), of(&question.near)]
            };
            let random = &mut ChaCha8Rng::seed_from_u64(1);
            let ours = set.draw(random, index, documents.len()).unwrap();
            let theirs = documents.iter().map(|&at| set.documents[at].as_str()).collect();
            assert_eq!(kinds(&ours.documents.into_iter().collect()), kinds(&theirs), "{task}");
        }
    }
}

#[test]
fn every_task_fits_its_length_and_depends_on_seed_and_index_alone() {
    let folder = folder();
    let texts = Texts::new(folder.path());
    for name in Ruler::names() {
        for tokens in [700, 1000, 2500, 4096] {
            let make = |seed| Ruler::new(name, &texts, &count, tokens, seed).unwrap();
            let task = make(42);
            let sample = task.sample(1).unwrap();
            assert!(task.tokens_of(&sample).unwrap() <= tokens, "{name} {tokens}");
            // Essays, words and documents are few here; what grows without end fills its length.
            if ["niah_single_1", "niah_multikey_2", "vt", "fwe"].contains(&name) {
                assert!(task.tokens_of(&sample).unwrap() + 60 > tokens, "{name} {tokens}");
            }
            assert_eq!(sample, make(42).sample(1).unwrap(), "{name}");
            assert_ne!(sample.context, make(43).sample(1).unwrap().context, "{name}");
            assert_ne!(sample, task.sample(2).unwrap(), "{name}");
            assert!(!sample.answers.is_empty() && sample.max_new_tokens > 0, "{name}");
            for answer in &sample.answers {
                let text = sample.context.to_lowercase();
                let found = text.contains(&answer.to_lowercase());
                assert!(found || name == "qa_2", "{name}: {answer} is not in the text");
            }
            assert_eq!(task.score(&sample, &sample.answers.join(" ")), 1.0, "{name}");
            assert_eq!(task.score(&sample, ""), 0.0, "{name}");
        }
    }
}

#[test]
fn a_length_that_holds_no_sample_is_refused_with_the_one_that_it_needs() {
    let folder = folder();
    let texts = Texts::new(folder.path());
    for name in Ruler::names() {
        let error = Ruler::new(name, &texts, &count, 60, 1).unwrap().sample(0).unwrap_err();
        let needed = error.downcast::<TooShort>().expect(name).needed;
        let enough = Ruler::new(name, &texts, &count, needed + 10, 1).unwrap().sample(0);
        assert!(needed > 60 && enough.is_ok(), "{name} at {needed}: {enough:?}");
    }
}

#[test]
fn paragraphs_without_the_answer_go_first_where_ten_do_not_fit() {
    let folder = folder();
    let texts = Texts::new(folder.path());
    let task = Ruler::new("qa_2", &texts, &count, 150, 1).unwrap();
    let sample = task.sample(0).unwrap();
    let kept = sample.context.matches("Document ").count();
    assert_eq!(sample.facts["paragraphs_dropped"], 10 - kept);
    assert!((2..10).contains(&kept), "{kept}");
    assert!(sample.context.contains("Title 0-3\n") && sample.context.contains("Title 0-7\n"));
    assert!(task.sample(3).unwrap_err().to_string().contains("there are 3 questions"));
}

#[test]
fn what_is_not_there_is_named_with_what_gets_it() {
    let folder = tempfile::tempdir().unwrap();
    let texts = Texts::new(folder.path());
    for name in Ruler::names().filter(|name| !["vt", "fwe", "niah_multikey_3"].contains(name)) {
        let error = Ruler::new(name, &texts, &count, 1000, 1).unwrap().sample(0).unwrap_err();
        assert!(error.to_string().contains("cargo xtask fetch"), "{name}: {error}");
    }
    std::fs::write(folder.path().join("squad.json"), "{\"data\": [{\"par").unwrap();
    let error = Ruler::new("qa_1", &texts, &count, 1000, 1).unwrap().sample(0).unwrap_err();
    assert!(format!("{error:#}").contains("squad.json is not RULER's"), "{error:#}");
    assert!(Ruler::new("niah", &texts, &count, 1000, 1).unwrap_err().to_string().contains("vt"));
}
