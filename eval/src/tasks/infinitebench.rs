//! InfiniteBench (arXiv 2402.13718): eleven tasks of 100,000 tokens and more; several questions share a book.
//!
//! Read from the published records, a task a file (`passkey.jsonl`: context, input, answer, options), or from those that
//! kvpress made of them. Prompts are the benchmark's, split where its question begins; the summary of a book is left out, as
//! kvpress does not score it.

use crate::metrics::infinite::*;
use crate::records::{self, Record, answers, groups, text, value};
use crate::task::{Sample, Task};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::path::Path;

/// A task's name, what stands before its context, what its answer is made to begin with, and the most tokens of it.
type Prompt = (&'static str, &'static str, &'static str, usize);

const HIDDEN: &str = "There is an important info hidden inside a lot of irrelevant text. Find it";
const PROMPTS: [Prompt; 11] = [
    (
        "passkey",
        " and memorize them. I will quiz you about the important information there.",
        "The pass key is:",
        6,
    ),
    (
        "number_string",
        ". I will quiz you about the important information there.",
        "The sequence of digits is",
        12,
    ),
    (
        "kv_retrieval",
        "Extract the value corresponding to the specified key in the JSON object below.",
        "The value associated with the specified key is",
        50,
    ),
    (
        "longdialogue_qa_eng",
        "Below is a dialogue script where one random occurrence of a character name is replaced with \"$$MASK$$\", and you \
         should try to guess who that character is.",
        "The name that has been replaced with $$MASK$$ is likely",
        40,
    ),
    (
        "longbook_qa_eng",
        "Read the book below and answer a question. Be very concise in your answer.",
        "Answer:",
        40,
    ),
    ("longbook_qa_chn", "请根据以下书籍回答我的问题。", "答案：", 40),
    (
        "longbook_choice_eng",
        "Read the book and answer the question.",
        "The letter of the correct answer is",
        40,
    ),
    (
        "code_debug",
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it crash.",
        "The correct option is:",
        5,
    ),
    (
        "code_run",
        "There is a function called func_{func} in the following Python code.",
        "The return value is:",
        5,
    ),
    ("math_find", "What is the {what} in the following list?", "", 3),
    (
        "math_calc",
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\nExpression: 8 \
         - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression:",
        "Values:",
        30_000,
    ),
];

/// Tokens that kvpress allows beyond the official length of an answer.
const MORE_TOKENS: usize = 20;

/// One of the tasks.
#[derive(Debug)]
pub struct InfiniteBench {
    name: &'static str,
    samples: Vec<Sample>,
    groups: Vec<u64>,
}

impl InfiniteBench {
    /// The names of the tasks.
    pub fn names() -> impl Iterator<Item = &'static str> {
        PROMPTS.iter().map(|(name, ..)| *name)
    }

    /// Reads a task, whose name is the file's or folder's.
    ///
    /// # Errors
    /// If the name is none of InfiniteBench's; with the sample, if a field is missing or of another kind.
    pub fn load(path: &Path) -> Result<Self> {
        let stem = &*records::name(path);
        let Some(prompt) = PROMPTS.iter().find(|(name, ..)| *name == stem) else {
            let known: Vec<_> = Self::names().collect();
            bail!(
                "{}: InfiniteBench has no task {stem}; name the file after one: {}",
                path.display(),
                known.join(", ")
            );
        };
        ensure!(
            cfg!(feature = "chinese") || stem != "longbook_qa_chn",
            "{}: Chinese is left out of this build; build with the feature `chinese`",
            path.display()
        );
        let records = records::read(path)?;
        let samples = records.iter().zip(1..).map(|(record, line)| {
            sample(record, prompt).with_context(|| format!("{} sample {line}", path.display()))
        });
        let samples = samples.collect::<Result<_>>()?;
        Ok(Self { name: prompt.0, groups: groups(&records, "context"), samples })
    }
}

fn sample(record: &Record, &(name, before, answer_prefix, tokens): &Prompt) -> Result<Sample> {
    let own = |field| text(record, field);
    let answer = value(record, "answer")?;
    let mut sample = Sample {
        answers: answers(answer).context("field answer")?,
        answer_prefix: answer_prefix.to_owned(),
        max_new_tokens: tokens + MORE_TOKENS,
        ..Sample::default()
    };
    let chooses = ["code_debug", "longbook_choice_eng"].contains(&name);
    if record.contains_key("question") {
        // kvpress's records hold the prompt's parts already, the options at the end of the question.
        sample.context = own("context")?.to_owned();
        sample.question = own("question")?.to_owned();
        sample.answer_prefix = own("answer_prefix")?.to_owned();
        if chooses {
            let options = printed_options(&sample.question);
            let options = options.context("field question does not end in options A to D")?;
            sample.facts.insert("options".into(), options.into());
        }
        return Ok(sample);
    }
    let (context, input) = (own("context")?, own("input")?);
    let before = match name {
        "passkey" | "number_string" => format!("{HIDDEN}{before}"),
        "code_run" => before.replace("{func}", between(input, "func_", "(")?),
        "math_find" => before.replace("{what}", &between(input, "The ", " of")?.to_lowercase()),
        _ => before.to_owned(),
    };
    let break_or_blank = if name == "math_calc" { " " } else { "\n\n" };
    sample.context = format!("{before}{break_or_blank}{context}\n\n");
    sample.question = match name {
        // The answer's beginning says it.
        "kv_retrieval" => input.replace("The value associated with the specified key is:", ""),
        _ => input.to_owned(),
    };
    if chooses {
        let options = value(record, "options")?;
        let options = answers(options).context("field options")?;
        let [a, b, c, d] = &*options else { bail!("{} options, wanted 4", options.len()) };
        sample.question += match name {
            "code_debug" => "\n\nOptions:",
            _ => {
                "\n\nOnly one of the following options is correct, tell me the answer using one single letter (A, B, C, or D). \
                 Don't say anything else."
            }
        };
        sample.question += &format!("\nA. {a}\nB. {b}\nC. {c}\nD. {d}");
        let right = options.iter().position(|option| *option == sample.answers[0]);
        let right = right.with_context(|| format!("no option is {:?}", sample.answers[0]))?;
        sample.answers = vec!["ABCD"[right..=right].to_owned()];
        sample.facts.insert("options".into(), options.into());
    }
    Ok(sample)
}

/// What stands between two marks of a question.
fn between<'t>(text: &'t str, start: &str, end: &str) -> Result<&'t str> {
    let found = text.split_once(start).and_then(|(_, rest)| Some(rest.split_once(end)?.0));
    found
        .with_context(|| format!("field input has nothing between {start:?} and {end:?}: {text:?}"))
}

/// The four options at the end of a question.
fn printed_options(question: &str) -> Option<Vec<String>> {
    let lines: Vec<&str> = question.rsplitn(5, '\n').collect();
    let option = |(place, line): (usize, &&str)| {
        line.strip_prefix(["D. ", "C. ", "B. ", "A. "][place]).map(str::to_owned)
    };
    let mut options: Vec<String> = lines.iter().take(4).enumerate().map_while(option).collect();
    options.reverse();
    (options.len() == 4).then_some(options)
}

impl Task for InfiniteBench {
    fn name(&self) -> &str {
        self.name
    }

    fn samples(&self) -> Option<u64> {
        Some(self.samples.len() as u64)
    }

    fn group(&self, index: u64) -> u64 {
        self.groups[index as usize]
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        Ok(self.samples[index as usize].clone())
    }

    fn score(&self, sample: &Sample, text: &str) -> f64 {
        let right = &sample.answers;
        let first = right.first().map_or("", String::as_str);
        // The words of the right option.
        let chosen = || {
            let options = sample.facts.get("options").and_then(Value::as_array);
            let place = ["A", "B", "C", "D"].iter().position(|letter| *letter == first);
            place.and_then(|place| options?.get(place)?.as_str()).unwrap_or_default()
        };
        match self.name {
            "passkey" | "number_string" => f64::from(first_digits(text, first)),
            "kv_retrieval" => f64::from(is_word(text, first)),
            "longdialogue_qa_eng" => f64::from(names_one(text, right)),
            "longbook_qa_eng" => best_f1(text, right),
            #[cfg(feature = "chinese")]
            "longbook_qa_chn" => best_f1_zh(text, right),
            "longbook_choice_eng" => f64::from(chooses_option(text, first, chosen())),
            "code_debug" => f64::from(chooses_function(text, first, chosen())),
            "code_run" => f64::from(last_number(text, first)),
            "math_find" => f64::from(first_number(text, first)),
            "math_calc" => numbers_in_order(text, right),
            _ => 0.0, // refused when loaded
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn load(task: &str, lines: &[Value]) -> Result<InfiniteBench> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(task).with_extension("jsonl");
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, text).unwrap();
        InfiniteBench::load(&path)
    }

    fn record(input: &str, answer: Value, options: Value) -> Value {
        json!({"id": 0, "context": "All of it.", "input": input, "answer": answer, "options": options})
    }

    #[test]
    fn each_task_knows_its_right_answer_and_another() {
        let none = json!([]);
        let options = json!(["f_a", "f_b", "f_c", "f_d"]);
        for (task, input, answer, options, right) in [
            ("passkey", "What is the pass key?", json!("71432"), &none, "71432."),
            ("number_string", "What is the sequence number?", json!(["2200"]), &none, " 2200"),
            (
                "kv_retrieval",
                "Key: \"k\" The value associated with the specified key is:",
                json!("v-1"),
                &none,
                "\"v-1\"",
            ),
            (
                "longdialogue_qa_eng",
                "Which character is $$MASK$$ ?",
                json!(["ACE", "ACE R"]),
                &none,
                "Ace",
            ),
            ("longbook_qa_eng", "Who?", json!("Peyton"), &none, "Peyton"),
            ("longbook_choice_eng", "Which?", json!(["f_b"]), &options, "B"),
            ("code_debug", "Which function?", json!(["f_c"]), &options, "f_c"),
            ("code_run", "What is func_12(-3)?", json!(7), &none, "It is 7"),
            (
                "math_find",
                "One number. The largest number of the list is:",
                json!(12.5),
                &none,
                "12.5",
            ),
            ("math_calc", "", json!([1, 4, 8]), &none, "[1, 4, 8]"),
        ] {
            let data = load(task, &[record(input, answer, options.clone())]).unwrap();
            let sample = data.sample(0).unwrap();
            assert_eq!(data.score(&sample, right), 1.0, "{task}");
            for wrong in ["", "0", "x"] {
                assert_eq!(data.score(&sample, wrong), 0.0, "{task} {wrong:?}");
            }
            assert!(
                !sample.context.contains('{') && sample.context.ends_with("All of it.\n\n"),
                "{task}"
            );
        }
    }

    #[test]
    fn prompts_are_filled_and_kvpresss_records_are_taken_as_they_are() {
        let of = |task, input: &str| {
            load(task, &[record(input, json!("7"), json!([]))]).unwrap().sample(0).unwrap()
        };
        let run = of("code_run", "What is func_12(-3)?");
        assert!(run.context.starts_with("There is a function called func_12 in"));
        let find = of("math_find", "One number. The largest number of the list is:");
        assert!(find.context.starts_with("What is the largest number in"));
        let key = of("kv_retrieval", "Key: \"k\" The value associated with the specified key is:");
        assert_eq!(key.question, "Key: \"k\" ");

        let theirs = json!({
            "context": "Book", "question": "Which?\n\nOptions:\nA. f_a\nB. f_b\nC. f_c\nD. f_d", "answer_prefix": "It is", "answer": ["B"],
        });
        let data = load("code_debug", &[theirs.clone(), theirs]).unwrap();
        let sample = data.sample(1).unwrap();
        assert_eq!((&*sample.context, &*sample.answer_prefix, data.group(1)), ("Book", "It is", 0));
        assert_eq!((data.score(&sample, "f_b"), data.score(&sample, "f_c")), (1.0, 0.0));
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let bad = |task, line: Value| format!("{:#}", load(task, &[line]).unwrap_err());
        let whole = record("Which?", json!(["f_b"]), json!(["f_a", "f_b", "f_c", "f_d"]));
        for field in ["context", "input", "answer", "options"] {
            let mut line = whole.clone();
            line.as_object_mut().unwrap().remove(field);
            let error = bad("longbook_choice_eng", line);
            assert!(error.contains(field) && error.contains("sample 1"), "{error}");
        }
        let error =
            bad("longbook_choice_eng", record("Which?", json!("f_x"), whole["options"].clone()));
        assert!(error.contains("no option is \"f_x\""), "{error}");
        assert!(bad("code_run", record("What?", json!(1), json!([]))).contains("func_"));
        assert!(bad("longbook_sum_eng", whole).contains("passkey, number_string"));
    }
}
