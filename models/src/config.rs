//! The shapes and constants of a model, whatever file they come from.

use crate::error::{Error, Result};
use crate::folder::Fields;
use crate::positions::{self, LayerPositions};
use repo_pos::{Frequencies, Yarn};
use serde_json::{Map, Value};
use std::path::Path;

/// A family of models: grouped-query attention with rotary positions and a gated MLP, in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// Norms what attention and MLP read.
    Llama,
    /// As Llama, with a norm over each query and key head.
    Qwen3,
    /// Norms what attention and MLP write, and queries and keys over all their heads together.
    Olmo2,
}

impl Architecture {
    /// Whether a block norms what its branches write, and not what they read.
    pub(crate) fn norms_outputs(self) -> bool {
        self == Self::Olmo2
    }
}

/// How the rotary frequencies are stretched for contexts beyond the pretraining's.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by one number.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: slow frequencies are divided, fast ones kept, those between blended.
    Llama3 {
        /// The divisor of slow frequencies.
        factor: f64,
        /// Fewer turns than this within `original` make a frequency slow.
        low: f64,
        /// More turns than this make it fast.
        high: f64,
        /// The context of the pretraining, in tokens.
        original: usize,
    },
    /// YaRN: fast frequencies are kept, slow ones divided, those between blended; scores grow.
    Yarn(Yarn),
    /// One divisor for each pair of dimensions: `rope_freqs.weight` of a GGUF file.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// The longest context of a model that says `max_positions`: what YaRN was made for counts, whether or not that was
    /// raised with it.
    pub(crate) fn reach(&self, max_positions: usize) -> usize {
        match self {
            Self::Yarn(Yarn { factor, original, .. }) => {
                max_positions.max((factor * *original as f64) as usize)
            }
            _ => max_positions,
        }
    }
}

/// The shapes and constants of a model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// The family.
    pub architecture: Architecture,
    /// Rows of the embedding. A tokenizer may know fewer ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// Key/value heads of a layer; divides `query_heads`.
    pub kv_heads: usize,
    /// Width of a head: not always `hidden_size / query_heads`. Even.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// What the norms add to the mean square.
    pub norm_epsilon: f64,
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// How these are stretched.
    pub rope_scaling: RopeScaling,
    /// By what each layer turns its queries and keys.
    pub positions: Vec<LayerPositions>,
    /// The context the model was made for, in tokens.
    pub max_positions: usize,
    /// Whether the embedding serves as the output layer; else the files hold `lm_head.weight`.
    pub tied_embeddings: bool,
    /// Whether the query, key and value projections have biases.
    pub attention_bias: bool,
    /// Whether the attention's output projection has one.
    pub output_bias: bool,
    /// Whether the MLP's three projections have them.
    pub mlp_bias: bool,
    /// Tokens that end an answer; may be empty.
    pub eos_tokens: Vec<u32>,
    /// The token that begins a text.
    pub bos_token: Option<u32>,
}

impl Config {
    /// That of a Hugging Face folder, whether or not it has weights yet.
    pub fn of_folder(path: &Path) -> Result<Self> {
        crate::folder::config(path)
    }

    /// The same model with positions as `pe_config` says, an object as config.json has it.
    pub fn with_positions(self, pe_config: &Value) -> Result<Self> {
        let map = Map::from_iter([("pe_config".to_owned(), pe_config.clone())]);
        let fields = Fields::new(Path::new("pe_config"), map);
        Ok(Self { positions: positions::planned(&fields, self.layers)?, ..self })
    }

    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Elements of all matrices that a token is multiplied with, the head among them.
    pub fn matrix_elements(&self) -> usize {
        let attention = self.hidden_size * self.head_dim * 2 * (self.query_heads + self.kv_heads);
        let mlp = 3 * self.hidden_size * self.intermediate_size;
        self.layers * (attention + mlp) + self.vocab_size * self.hidden_size
    }

    /// How fast each pair of a head's dimensions turns from a token to the next.
    pub fn frequencies(&self) -> Result<Frequencies> {
        let (theta, head_dim) = (self.rope_theta, self.head_dim);
        Ok(match &self.rope_scaling {
            RopeScaling::None => Frequencies::plain(theta, head_dim)?,
            RopeScaling::Linear { factor } => Frequencies::linear(theta, head_dim, *factor)?,
            RopeScaling::Llama3 { factor, low, high, original } => {
                Frequencies::llama3(theta, head_dim, *factor, *low, *high, *original)?
            }
            RopeScaling::Yarn(yarn) => Frequencies::yarn(theta, head_dim, *yarn)?,
            RopeScaling::Divisors(divisors) => Frequencies::divided(theta, head_dim, divisors)?,
        })
    }

    /// Refuses what no model can have; `path` is the file to blame.
    pub(crate) fn checked(self, path: &Path) -> Result<Self> {
        // Far above any model, and low enough that products of three of them cannot overflow.
        const LIMIT: usize = 1 << 20;
        let wrong = |what: &str, found: String, wanted: &str| {
            Err(Error::Format {
                path: path.to_owned(),
                what: what.to_owned(),
                wanted: wanted.to_owned(),
                found,
                advice: "take the config that came with the weights",
            })
        };
        for (what, count) in [
            ("the vocabulary size", self.vocab_size),
            ("the hidden size", self.hidden_size),
            ("the number of layers", self.layers),
            ("the number of query heads", self.query_heads),
            ("the number of key/value heads", self.kv_heads),
            ("the head dim", self.head_dim),
            ("the MLP's width", self.intermediate_size),
        ] {
            if count == 0 || count > LIMIT {
                return wrong(what, count.to_string(), "1 to 1048576");
            }
        }
        if self.max_positions == 0 || self.max_positions > 1 << 31 {
            return wrong("the context length", self.max_positions.to_string(), "1 to 2147483648");
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            let found = format!("{} for {} key/value heads", self.query_heads, self.kv_heads);
            return wrong("the number of query heads", found, "a multiple of these");
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong("the head dim", self.head_dim.to_string(), "an even number");
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon >= 0.0) {
            return wrong("the norm's epsilon", self.norm_epsilon.to_string(), "a number from 0");
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return wrong("the rope theta", self.rope_theta.to_string(), "a number above 0");
        }
        Ok(self)
    }
}
