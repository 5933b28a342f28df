//! The seam between benchmarks and whatever answers them.

use crate::task::{Sample, Task};
use anyhow::{Context, Result};

/// Something that answers: an engine of `models`, or a fake in a test.
pub trait Generate {
    /// Reads the context, forgets what it wants to, reads the question, and writes.
    fn generate(&mut self, sample: &Sample) -> Result<Answer>;
}

/// What was written, and what it took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The text, without the answer prefix.
    pub text: String,
    /// Tokens of the context.
    pub context_tokens: usize,
    /// The share of the cache that was gone after the context was read.
    pub removed: f64,
    /// The share of the heads that dropped the text's first token.
    pub first_dropped: f64,
    /// Bytes of keys and values held then.
    pub kv_bytes: usize,
    /// Rows that each kv head of each layer held then, `[layers][kv_heads]`; empty where it is not known.
    pub kept: Vec<Vec<usize>>,
    /// Seconds to read the context.
    pub prefill_seconds: f64,
    /// The mean negative log-likelihood of a token of the sample's `likelihood_of`, in nats.
    pub nll: Option<f64>,
    /// Tokens written, and the seconds that the steps between them took.
    pub decode: (usize, f64),
    /// How many methods shared these seconds of reading and were written side by side; 0 and 1 are this one alone.
    pub together: usize,
}

/// Asks samples `0..count` of `task`; `each` sees every answer and its score as it comes.
pub fn run(
    task: &dyn Task,
    model: &mut dyn Generate,
    count: u64,
    each: &mut dyn FnMut(&Sample, &Answer, f64),
) -> Result<()> {
    for index in 0..count {
        let sample =
            task.sample(index).with_context(|| format!("{} sample {index}", task.name()))?;
        let answer =
            model.generate(&sample).with_context(|| format!("{} sample {index}", task.name()))?;
        let score = task.score(&sample, &answer.text);
        each(&sample, &answer, score);
    }
    Ok(())
}
