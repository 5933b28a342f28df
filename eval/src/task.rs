//! What a benchmark is made of.

use anyhow::Result;

/// One question about one context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What is read first, and pruned before the question is known.
    pub context: String,
    /// What is asked afterwards.
    pub question: String,
    /// What the answer is made to begin with; it stands after the chat template's assistant header.
    pub answer_prefix: String,
    /// The strings that a right answer holds.
    pub answers: Vec<String>,
}

/// Makes samples and scores answers. Knows neither models nor tokens.
pub trait Task {
    /// A name for files and tables.
    fn name(&self) -> &str;

    /// Sample `index`; the same index gives the same sample.
    fn sample(&self, index: u64) -> Result<Sample>;

    /// From 0, wrong, to 1, right. Any text is scored, none is an error.
    ///
    /// Unless a task says otherwise, RULER's rule: the share of the answers that stand in the text, letter
    /// case ignored.
    fn score(&self, sample: &Sample, text: &str) -> f64 {
        let text = text.to_lowercase();
        let found = sample.answers.iter().filter(|answer| text.contains(&answer.to_lowercase()));
        if sample.answers.is_empty() {
            0.0
        } else {
            found.count() as f64 / sample.answers.len() as f64
        }
    }
}
