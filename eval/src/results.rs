//! What a run leaves behind: a journal that is written as answers come, and from it the three files of kvpress's evaluation.

mod folder;
mod journal;
mod summary;

#[cfg(test)]
mod tests;

pub use folder::{Name, read_predictions, write};
pub use journal::{Journal, Settings};
pub use summary::{Summary, by_task};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One answered question. The context is not kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The task's name.
    pub task: String,
    /// The sample's index in it.
    pub index: u64,
    /// What was asked.
    pub question: String,
    /// What the answer was made to begin with.
    pub answer_prefix: String,
    /// The strings that a right answer holds.
    pub answers: Vec<String>,
    /// The most tokens that the answer could have.
    pub max_new_tokens: usize,
    /// What the data set says beside that.
    #[serde(default)]
    pub facts: Map<String, Value>,
    /// What was written, without the prefix.
    pub predicted_answer: String,
    /// From 0 to 1.
    pub score: f64,
    /// The share of the cache that was gone after the context was read.
    pub compression_ratio: f64,
    /// The mean negative log-likelihood of a token of the right answer, in nats, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll: Option<f64>,
    /// Tokens of the context.
    pub context_tokens: usize,
    /// Bytes of keys and values held after it was read.
    pub kv_bytes: usize,
    /// Rows that each kv head of each layer held then, `[layers][kv_heads]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<Vec<usize>>,
    /// Seconds to read it; of a context of several questions each row has the whole.
    pub prefill_seconds: f64,
    /// Tokens written.
    pub new_tokens: usize,
    /// Seconds to write them.
    pub decode_seconds: f64,
    /// How many methods shared these seconds of reading and were written side by side; 0 and 1 are this one alone.
    #[serde(default)]
    pub together: usize,
}
