//! LongBench-v2 (arXiv 2412.15204): questions with four options about texts of 8,000 to 2,000,000 words.
//!
//! Read from the published records (`THUDM/LongBench-v2`), or from those that kvpress made of them.

use crate::metrics::says_letter;
use crate::records::{self, Record, answers, files, groups, text, value};
use crate::task::{Sample, Task};
use anyhow::{Context, Result};
use std::path::Path;

/// All questions.
#[derive(Debug)]
pub struct LongBenchV2 {
    samples: Vec<Sample>,
    groups: Vec<u64>,
}

impl LongBenchV2 {
    /// Reads a file, or all of a folder.
    ///
    /// # Errors
    /// With file, sample and field, if one is missing or of another kind.
    pub fn load(path: &Path) -> Result<Self> {
        let mut all = Vec::new();
        for file in files(path)? {
            for (line, record) in (1..).zip(records::read(&file)?) {
                let sample = sample(&record);
                let sample = sample.with_context(|| format!("{} sample {line}", file.display()))?;
                all.push((record, sample));
            }
        }
        let (records, samples): (Vec<Record>, _) = all.into_iter().unzip();
        Ok(Self { groups: groups(&records, "context"), samples })
    }
}

fn sample(record: &Record) -> Result<Sample> {
    let own = |field| text(record, field);
    let answer = value(record, "answer")?;
    let mut sample = Sample {
        context: own("context")?.to_owned(),
        question: own("question")?.to_owned(),
        answers: answers(answer).context("field answer")?,
        max_new_tokens: 16,
        ..Sample::default()
    };
    // kvpress's records hold the prompt's parts already.
    if !record.contains_key("answer_prefix") {
        sample.context = format!(
            "Please read the following text and answer the question below.\n<text>\n{}\n</text>\n\n",
            sample.context
        );
        sample.question = format!(
            "What is the correct answer to this question: {}\nChoices:\n(A) {}\n(B) {}\n(C) {}\n(D) {}\n\nFormat your response as \
             follows: \"The correct answer is (insert answer here).",
            sample.question,
            own("choice_A")?,
            own("choice_B")?,
            own("choice_C")?,
            own("choice_D")?,
        );
    }
    for fact in ["_id", "domain", "difficulty", "length"] {
        if let Some(value) = record.get(fact).filter(|value| !value.is_null()) {
            sample.facts.insert(fact.to_owned(), value.clone());
        }
    }
    Ok(sample)
}

impl Task for LongBenchV2 {
    fn name(&self) -> &str {
        "longbench-v2"
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
        f64::from(sample.answers.iter().any(|letter| says_letter(text, letter)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn load(lines: &[Value]) -> Result<LongBenchV2> {
        let folder = tempfile::tempdir().unwrap();
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(folder.path().join("data.jsonl"), text).unwrap();
        LongBenchV2::load(folder.path())
    }

    fn published() -> Value {
        json!({
            "_id": "1", "domain": "d", "difficulty": "easy", "length": "short", "question": "Who?", "choice_A": "Ann",
            "choice_B": "Bea", "choice_C": "Cy", "choice_D": "Di", "answer": "B", "context": "Bea did it.",
        })
    }

    #[test]
    fn options_stand_in_the_question_and_the_letter_counts() {
        let data = load(&[published(), published()]).unwrap();
        assert_eq!((data.samples(), data.group(1)), (Some(2), 0));
        let sample = data.sample(0).unwrap();
        assert!(sample.context.contains("<text>\nBea did it.\n</text>"));
        assert!(sample.question.contains("(B) Bea\n(C) Cy"));
        assert_eq!(sample.facts["difficulty"], "easy");
        assert_eq!(data.score(&sample, "The correct answer is (B)."), 1.0);
        for text in ["The correct answer is (A)", "B", ""] {
            assert_eq!(data.score(&sample, text), 0.0, "{text}");
        }
    }

    #[test]
    fn kvpresss_records_are_taken_as_they_are_and_missing_fields_are_named() {
        let mut theirs = published();
        theirs["answer_prefix"] = "".into();
        let sample = load(&[theirs]).unwrap().sample(0).unwrap();
        assert_eq!((&*sample.context, &*sample.question), ("Bea did it.", "Who?"));
        for field in ["context", "question", "answer", "choice_C"] {
            let mut bad = published();
            bad.as_object_mut().unwrap().remove(field);
            let error = format!("{:#}", load(&[published(), bad]).unwrap_err());
            assert!(error.contains(field) && error.contains("sample 2"), "{error}");
        }
    }
}
