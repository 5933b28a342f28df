use std::ops::Range;

/// How KVzip makes a model repeat its context, and what it spares.
///
/// A context begins with a prefix, what the chat template puts before the user's text, which is not
/// repeated. The rest is repeated in chunks, each in a pass of its own after the whole context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Tokens of the context that a pass repeats.
    pub chunk: usize,
    /// How many of the first tokens share the softmax with a chunk; none: the prefix.
    pub sinks: Option<usize>,
    /// Whether the prefix stays, whatever the budget.
    pub keep_prefix: bool,
    /// What the user says before the first chunk, and before each later one: that is followed by the
    /// last eight tokens of the chunk before.
    pub instructions: [&'static str; 2],
}

const FIRST: &str = "\n\nRepeat the previous context exactly.";

impl Rules {
    /// kvpress 0.5.5's, whatever comes of them: of the prefix the first four tokens stay, and the
    /// others go before all else, since they were never scored. With Llama-3.1's header that is most
    /// of the system message, in every head.
    pub fn kvpress() -> Self {
        Self { keep_prefix: false, ..Self::default() }
    }

    /// Those of the authors' repository: the whole prefix stays and shares the softmax.
    pub fn repository() -> Self {
        let next = "\n\nRepeat the part of the previous context exactly, starting with ";
        Self { chunk: 2000, sinks: None, keep_prefix: true, instructions: [FIRST, next] }
    }

    /// The passes over `context`, whose first `prefix` ids are the prefix. `instructions` are the ids
    /// of [`self.instructions`](Self::instructions), `suffix` those that the template puts after the
    /// user's text.
    pub fn passes(
        &self,
        context: &[u32],
        prefix: usize,
        instructions: [&[u32]; 2],
        suffix: &[u32],
    ) -> Vec<Pass> {
        let prefix = prefix.min(context.len());
        let pass = |start: usize| {
            let chunk = start..context.len().min(start + self.chunk.max(1));
            let (instruction, before) = if start == prefix {
                (instructions[0], 0..0)
            } else {
                (instructions[1], start.saturating_sub(8).max(prefix)..start)
            };
            let ids = [instruction, &context[before], suffix, &context[chunk.clone()]].concat();
            Pass { ids, chunk }
        };
        (prefix..context.len()).step_by(self.chunk.max(1)).map(pass).collect()
    }
}

/// kvpress's passes, but the prefix stays.
impl Default for Rules {
    fn default() -> Self {
        let next = "\n\nRepeat the part of the previous context exactly, starting with";
        Self { chunk: 2048, sinks: Some(4), keep_prefix: true, instructions: [FIRST, next] }
    }
}

/// One pass of repetition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// What the model reads after the context, and forgets again.
    pub ids: Vec<u32>,
    /// The tokens of the context that it repeats.
    pub chunk: Range<usize>,
}
