//! LongBench (arXiv 2308.14508): 21 data sets, English, Chinese and code, and the eleven of -E whose lengths are even.
//!
//! Read from the published records, JSON lines or parquet (`hotpotqa.jsonl`, `hotpotqa_e.jsonl`, `hotpotqa/test-….parquet`), or
//! from those that kvpress made of them. The
//! protocol is kvpress's: question and answer's beginning are split off the official prompts, the chat template is always
//! applied, answers may have 20 tokens more, and of a triviaqa, trec, samsum or lsht answer the first line counts.

mod prompts;

#[cfg(test)]
mod tests;

use crate::metrics::{classes, code_similarity, count, retrieval, rouge_l, token_f1};
#[cfg(feature = "chinese")]
use crate::metrics::{rouge_l_zh, token_f1_zh};
use crate::records::{self, ADVICE, Record, answers, groups, text, value};
use crate::task::{Sample, Task};
use anyhow::{Context, Result, bail, ensure};
use prompts::{Metric, Prompt};
use serde_json::Value;
use std::path::Path;

/// Tokens that kvpress allows beyond the official length of an answer.
const MORE_TOKENS: usize = 20;

/// One of the data sets.
#[derive(Debug)]
pub struct LongBench {
    name: String,
    even: bool,
    prompt: &'static Prompt,
    records: Vec<Record>,
    groups: Vec<u64>,
}

impl LongBench {
    /// The names of the data sets.
    pub fn names() -> impl Iterator<Item = &'static str> {
        prompts::PROMPTS.iter().map(|prompt| prompt.name)
    }

    /// Reads a data set, whose name is the file's or folder's: `hotpotqa.jsonl`, of LongBench-E `hotpotqa_e.jsonl`.
    ///
    /// # Errors
    /// If the name is none of LongBench's; with the sample, if a field is missing or it has no answer.
    pub fn load(path: &Path) -> Result<Self> {
        let stem = &*records::name(path);
        let base = stem.strip_suffix("_e").or_else(|| stem.strip_suffix("-e"));
        let prompt = prompts::PROMPTS.iter().find(|p| Some(p.name) == base.or(Some(stem)));
        let Some(prompt) = prompt else {
            let known: Vec<_> = Self::names().collect();
            bail!(
                "{}: LongBench has no data set {stem}; name the file after one: {}",
                path.display(),
                known.join(", ")
            );
        };
        if cfg!(not(feature = "chinese")) && matches!(prompt.metric, Metric::F1Zh | Metric::RougeZh)
        {
            bail!(
                "{}: Chinese is left out of this build; build with the feature `chinese`",
                prompt.name
            );
        }
        let records = records::read(path)?;
        let groups = groups(&records, "context");
        let data = Self { name: stem.to_owned(), even: base.is_some(), prompt, records, groups };
        for index in 0..data.records.len() {
            let sample = || data.sample(index as u64);
            sample().with_context(|| format!("{} sample {}", path.display(), index + 1))?;
        }
        Ok(data)
    }

    /// Whether it is one of -E, whose scores are told by length.
    pub fn is_even(&self) -> bool {
        self.even
    }
}

impl Task for LongBench {
    fn name(&self) -> &str {
        &self.name
    }

    fn samples(&self) -> Option<u64> {
        Some(self.records.len() as u64)
    }

    fn group(&self, index: u64) -> u64 {
        self.groups[index as usize]
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let record = &self.records[index as usize];
        let Prompt { context, question, answer_prefix, tokens, .. } = self.prompt;
        let own = |field| text(record, field);
        let answers = value(record, "answers")?;
        let mut sample = Sample {
            answers: answers_of(answers)?,
            max_new_tokens: tokens + MORE_TOKENS,
            answer_prefix: (*answer_prefix).to_owned(),
            ..Sample::default()
        };
        if record.contains_key("question") {
            // kvpress's records hold the prompt's parts already.
            sample.context = own("context")?.to_owned();
            sample.question = own("question")?.to_owned();
            sample.answer_prefix = own("answer_prefix")?.to_owned();
        } else {
            // What the answer's beginning says would else stand there twice.
            let input = own("input")?;
            let input = match self.prompt.name {
                "trec" | "triviaqa" | "samsum" => {
                    input.strip_suffix(answer_prefix).unwrap_or(input)
                }
                _ => input,
            };
            sample.context = context.replace("{context}", own("context")?);
            sample.question = question.replace("{input}", input);
        }
        for fact in ["length", "all_classes", "language", "_id"] {
            if let Some(value) = record.get(fact).filter(|value| !value.is_null()) {
                sample.facts.insert(fact.to_owned(), value.clone());
            }
        }
        if self.prompt.metric == Metric::Classes {
            ensure!(
                sample.facts.get("all_classes").is_some_and(Value::is_array),
                "field all_classes is missing; {ADVICE}"
            );
        }
        if self.prompt.metric == Metric::Retrieval {
            let named = sample.answers.iter().all(|answer| retrieval("", answer).is_some());
            ensure!(named, "an answer names no paragraph: {:?}", sample.answers);
        }
        Ok(sample)
    }

    /// The best over the right answers.
    fn score(&self, sample: &Sample, text: &str) -> f64 {
        let line;
        let text = if ["trec", "triviaqa", "samsum", "lsht"].contains(&self.prompt.name) {
            // kvpress's -E takes off line ends only.
            let text = if self.even { text.trim_start_matches('\n') } else { text.trim_start() };
            line = text.split('\n').next().unwrap_or_default();
            line
        } else {
            text
        };
        let score = |answer: &String| match self.prompt.metric {
            Metric::F1 => token_f1(text, answer),
            Metric::Rouge => rouge_l(text, answer),
            #[cfg(feature = "chinese")]
            Metric::F1Zh => token_f1_zh(text, answer),
            #[cfg(feature = "chinese")]
            Metric::RougeZh => rouge_l_zh(text, answer),
            #[cfg(not(feature = "chinese"))]
            Metric::F1Zh | Metric::RougeZh => 0.0, // refused when loaded
            Metric::Count => count(text, answer),
            Metric::Retrieval => retrieval(text, answer).unwrap_or(0.0),
            Metric::Code => code_similarity(text, answer),
            Metric::Classes => {
                let all = sample.facts.get("all_classes").and_then(Value::as_array);
                let all: Vec<&str> = all.into_iter().flatten().filter_map(Value::as_str).collect();
                classes(text, answer, &all)
            }
        };
        sample.answers.iter().map(score).fold(0.0, f64::max)
    }
}

fn answers_of(value: &Value) -> Result<Vec<String>> {
    answers(value).context("field answers")
}
