//! What a benchmark is made of.

use crate::metrics::share_of_references;
use anyhow::Result;
use serde_json::{Map, Value};

/// One question about one context.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// What is read first, and pruned before the question is known.
    pub context: String,
    /// What is asked afterwards.
    pub question: String,
    /// What the answer is made to begin with; it stands after the chat template's assistant header.
    pub answer_prefix: String,
    /// The strings that a right answer holds.
    pub answers: Vec<String>,
    /// The most tokens of an answer that the benchmark allows; 0 leaves it to the caller.
    pub max_new_tokens: usize,
    /// A text whose likelihood as the answer is measured beside; empty for none.
    pub likelihood_of: String,
    /// Whether the model may think before it answers.
    pub thinking: bool,
    /// What else the data set says of the sample, for its score and for the results.
    pub facts: Map<String, Value>,
}

/// Makes samples and scores answers. Knows neither models nor tokens.
pub trait Task {
    /// A name for files and tables.
    fn name(&self) -> &str;

    /// Sample `index`; the same index gives the same sample.
    fn sample(&self, index: u64) -> Result<Sample>;

    /// How many samples there are; `None` if there is no end of them.
    fn samples(&self) -> Option<u64> {
        None
    }

    /// Samples of the same group ask about the same context, which is then read once.
    fn group(&self, index: u64) -> u64 {
        index
    }

    /// From 0, wrong, to 1, right. Any text is scored, none is an error.
    ///
    /// Unless a task says otherwise, RULER's rule: the share of the answers that stand in the text, letter
    /// case ignored.
    fn score(&self, sample: &Sample, text: &str) -> f64 {
        share_of_references(text, &sample.answers)
    }
}
