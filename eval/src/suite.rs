//! A benchmark as it is run: tasks whose results stand in one folder.

use crate::generate::Answer;
use crate::results::{Journal, Row, Summary};
use crate::task::{Sample, Task};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Tasks whose results stand in one folder.
pub struct Suite<'a> {
    /// kvpress's name of the data set.
    pub dataset: String,
    /// Its part: a length, one of LongBench's data sets; may be empty.
    pub data_dir: String,
    /// The published samples that it is read from; `None` where samples are made.
    pub source: Option<PathBuf>,
    /// What is asked.
    pub tasks: Vec<Box<dyn Task + 'a>>,
    /// How the scores are told.
    pub summary: Summary,
}

/// Samples of one task that share a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The task, by its place in the suite.
    pub task: usize,
    /// Samples of it.
    pub indices: Vec<u64>,
}

/// One part of a run that several processes or machines share: `2/4` is the second of four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    number: usize,
    of: usize,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Self = Self { number: 1, of: 1 };

    /// The journal that it alone writes.
    pub fn journal(&self) -> String {
        match self {
            Self { of: 1, .. } => "journal.jsonl".to_owned(),
            Self { number, of } => format!("journal-{number}-of-{of}.jsonl"),
        }
    }
}

impl std::str::FromStr for Shard {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (number, of) = text.split_once('/')?;
            Some(Self { number: number.parse().ok()?, of: of.parse().ok()? })
        };
        let shard = parse().with_context(|| format!("{text} is no shard; write 1/4 to 4/4"))?;
        let within = (1..=shard.of).contains(&shard.number);
        ensure!(within, "{text} is no shard: the first is 1/{0}, the last {0}/{0}", shard.of);
        Ok(shard)
    }
}

impl Suite<'_> {
    /// The groups of the first `samples` samples of each task, task by task.
    pub fn groups(&self, samples: u64) -> Vec<Group> {
        let mut groups = Vec::new();
        for (place, task) in self.tasks.iter().enumerate() {
            let count = task.samples().map_or(samples, |all| all.min(samples));
            let mut of_task: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
            for index in 0..count {
                of_task.entry(task.group(index)).or_default().push(index);
            }
            groups.extend(of_task.into_values().map(|indices| Group { task: place, indices }));
        }
        groups
    }

    /// The groups that a shard answers.
    pub fn shard(groups: &[Group], shard: Shard) -> impl Iterator<Item = &Group> {
        groups.iter().skip(shard.number - 1).step_by(shard.of)
    }

    /// The samples of a group that the journal lacks.
    pub fn lacks(&self, group: &Group, journal: &Journal) -> Vec<u64> {
        let task = self.tasks[group.task].name();
        group.indices.iter().copied().filter(|index| !journal.has(task, *index)).collect()
    }

    /// Scores an answer and writes it to the journal; returns the score.
    pub fn record(
        &self,
        group: &Group,
        journal: &mut Journal,
        index: u64,
        sample: &Sample,
        answer: Answer,
    ) -> Result<f64> {
        let task = &self.tasks[group.task];
        let score = task.score(sample, &answer.text);
        journal.append(&row(task.name(), index, sample.clone(), answer, score))?;
        Ok(score)
    }
}

fn row(task: &str, index: u64, sample: Sample, answer: Answer, score: f64) -> Row {
    Row {
        task: task.to_owned(),
        index,
        question: sample.question,
        answer_prefix: sample.answer_prefix,
        answers: sample.answers,
        max_new_tokens: sample.max_new_tokens,
        facts: sample.facts,
        predicted_answer: answer.text,
        score,
        compression_ratio: answer.removed,
        nll: answer.nll,
        context_tokens: answer.context_tokens,
        kv_bytes: answer.kv_bytes,
        kept: answer.kept,
        prefill_seconds: answer.prefill_seconds,
        new_tokens: answer.decode.0,
        decode_seconds: answer.decode.1,
        together: answer.together,
    }
}

impl std::fmt::Debug for Suite<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tasks: Vec<&str> = self.tasks.iter().map(|task| task.name()).collect();
        f.debug_struct("Suite")
            .field("dataset", &self.dataset)
            .field("data_dir", &self.data_dir)
            .field("tasks", &tasks)
            .finish_non_exhaustive()
    }
}
