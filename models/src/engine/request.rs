//! What is asked of an engine, and what comes back.

use super::executor::Held;
use crate::error::Error;
use crate::sampling::Sampling;
use crate::session::Stop;
use std::sync::Arc;
use std::time::Duration;

/// A text to be read and continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Read first, each token seeing all before it, then pruned. Requests with the same context share it: it is read
    /// once.
    pub context: Arc<[u32]>,
    /// Read after the context was pruned; may be empty.
    pub question: Vec<u32>,
    /// The most tokens to write, at least 1.
    pub limit: usize,
    /// Tokens that end the answer; they are not part of it.
    pub stop: Vec<u32>,
    /// How tokens are chosen. The random state is the request's own.
    pub sampling: Sampling,
    /// Goes before requests of a lower priority that came up to [`Settings::patience`](super::Settings::patience) earlier
    /// for each step between the two.
    pub priority: i8,
}

impl Request {
    /// Continues `context` greedily by up to 256 tokens, whatever they are.
    pub fn new(context: impl Into<Arc<[u32]>>) -> Self {
        Self {
            context: context.into(),
            question: Vec::new(),
            limit: 256,
            stop: Vec::new(),
            sampling: Sampling::default(),
            priority: 0,
        }
    }

    /// Tokens that it can come to.
    pub(super) fn most_tokens(&self) -> usize {
        self.context.len().saturating_add(self.question.len()).saturating_add(self.limit)
    }
}

/// A request in its scheduler, in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What happens to a request: tokens, and then one end.
#[derive(Clone, Debug)]
pub enum Event {
    /// It wrote a token.
    Token(u32),
    /// There is no more.
    End(End),
}

/// How a request ended.
#[derive(Clone, Debug)]
pub struct End {
    /// Why there are no more tokens; [`Stop::Caller`] if it was cancelled. The texts of a batch may share an error.
    pub stop: std::result::Result<Stop, Arc<Error>>,
    /// What it took.
    pub usage: Usage,
}

/// What a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of its context that were read for it: 0 if another request had read them.
    pub read: usize,
    /// Tokens of its context that another request had read.
    pub shared: usize,
    /// Tokens of its question.
    pub question: usize,
    /// Tokens that it wrote.
    pub written: usize,
    /// What its text held when it ended, or was last suspended.
    pub held: Held,
    /// How often it was moved to host memory.
    pub preemptions: usize,
    /// From its arrival until the first of it was read.
    pub waited: Duration,
    /// From then to its first token.
    pub to_first: Duration,
    /// From its first token to its end.
    pub wrote: Duration,
}
