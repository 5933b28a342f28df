//! RULER's samples as kvpress published them (`simonjegou/ruler`), in parquet or as JSON lines: context, question,
//! answer_prefix, answer, task, max_new_tokens. Any data set with these fields will do, and samples of the same context share a reading.

use crate::records::{Record, answers, files, groups, read, text, value};
use crate::task::{Sample, Task};
use crate::tasks::ruler;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// One task of such a data set.
#[derive(Debug)]
pub struct Published {
    name: String,
    samples: Vec<Sample>,
    groups: Vec<u64>,
}

impl Published {
    /// The tasks of a file, or of all in a folder.
    ///
    /// # Errors
    /// With file, task and field, if a line is cut off or a field is missing or of another kind.
    pub fn load(path: &Path) -> Result<Vec<Self>> {
        let mut tasks: BTreeMap<String, Vec<Record>> = BTreeMap::new();
        for file in files(path)? {
            let records = read(&file)?;
            let named = |line: usize| format!("{} sample {line}", file.display());
            for (line, record) in (1..).zip(records) {
                let task = text(&record, "task").with_context(|| named(line))?.to_owned();
                tasks.entry(task).or_default().push(record);
            }
        }
        let published = |(name, records): (String, Vec<Record>)| {
            let samples = records.iter().zip(1..).map(|(record, line)| {
                sample(record).with_context(|| format!("{}: {name} sample {line}", path.display()))
            });
            let samples = samples.collect::<Result<_>>()?;
            Ok(Self { groups: groups(&records, "context"), name, samples })
        };
        tasks.into_iter().map(published).collect()
    }
}

/// A sample of `task` as a line of such a data set.
#[cfg(any(feature = "models", test))] // only the command writes
pub fn record(task: &str, sample: &Sample) -> serde_json::Value {
    serde_json::json!({
        "context": sample.context,
        "question": sample.question,
        "answer_prefix": sample.answer_prefix,
        "answer": sample.answers,
        "task": task,
        "max_new_tokens": sample.max_new_tokens,
    })
}

fn sample(record: &Record) -> Result<Sample> {
    let text = |field| text(record, field).map(str::to_owned);
    let answer = value(record, "answer")?;
    let limit = record.get("max_new_tokens").and_then(|limit| limit.as_u64());
    Ok(Sample {
        context: text("context")?,
        question: text("question")?,
        answer_prefix: text("answer_prefix")?,
        answers: answers(answer).context("field answer")?,
        max_new_tokens: limit.context("field max_new_tokens is missing or no number; give it")?
            as usize,
        ..Sample::default()
    })
}

impl Task for Published {
    fn name(&self) -> &str {
        &self.name
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
        ruler::score(&self.name, &sample.answers, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn load(lines: &[Value]) -> Result<Vec<Published>> {
        let folder = tempfile::tempdir().unwrap();
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(folder.path().join("4096.jsonl"), text).unwrap();
        Published::load(folder.path())
    }

    fn record(task: &str, context: &str, answer: Value) -> Value {
        json!({"context": context, "question": "Q? ", "answer_prefix": "Answer:", "answer": answer, "task": task, "max_new_tokens": 32})
    }

    #[test]
    fn samples_that_were_written_are_read_again() {
        let written = Sample {
            context: "Some \"text\",\nin lines.".into(),
            question: "Who? ".into(),
            answer_prefix: "It is".into(),
            answers: vec!["a".into(), "b".into()],
            max_new_tokens: 7,
            ..Sample::default()
        };
        let tasks = load(&[super::record("vt", &written)]).unwrap();
        assert_eq!((tasks[0].name(), tasks[0].sample(0).unwrap()), ("vt", written));
    }

    #[test]
    fn tasks_are_told_apart_and_same_contexts_are_one_group() {
        let lines = [
            record("vt", "a", json!(["X", "Y"])),
            record("qa_1", "b", json!(["X", "Y"])),
            record("qa_1", "c", json!("Z")),
            record("qa_1", "b", json!("['Z']")),
        ];
        let tasks = load(&lines).unwrap();
        let [qa, vt] = &*tasks else { panic!("{tasks:?}") };
        assert_eq!((qa.name(), vt.name(), qa.samples()), ("qa_1", "vt", Some(3)));
        assert_eq!([0, 1, 2].map(|index| qa.group(index)), [0, 1, 0]);
        // Any answer will do for a question, all of them are wanted elsewhere.
        assert_eq!(qa.score(&qa.sample(0).unwrap(), "it is x"), 1.0);
        assert_eq!(vt.score(&vt.sample(0).unwrap(), "it is x"), 0.5);
        assert_eq!(qa.sample(2).unwrap().answers, ["Z"]);
    }

    #[test]
    fn a_field_that_is_missing_or_of_another_kind_is_named() {
        for field in ["context", "question", "answer_prefix", "answer", "task", "max_new_tokens"] {
            for wrong in [None, Some(Value::Null), Some(json!({}))] {
                let mut bad = record("vt", "a", json!(["X"]));
                match &wrong {
                    None => drop(bad.as_object_mut().unwrap().remove(field)),
                    Some(value) => bad[field] = value.clone(),
                }
                let error =
                    format!("{:#}", load(&[record("vt", "a", json!(["X"])), bad]).unwrap_err());
                assert!(error.contains(field) && error.contains("sample 2"), "{error}");
            }
        }
    }
}
