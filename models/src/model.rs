//! A model with all that it takes to talk to it.

use crate::causal_lm::CausalLm;
use crate::chat::ChatTemplate;
use crate::error::Result;
use crate::llama::Llama;
use crate::tokenizer::Tokenizer;
use crate::weights::{Weights, open};
use std::path::Path;
use tch::{Device, Kind};

/// A language model, its tokenizer, its chat template and its stop tokens.
pub struct Model {
    /// The network.
    pub lm: Box<dyn CausalLm>,
    /// Text to token ids and back.
    pub tokenizer: Tokenizer,
    /// How a message becomes a prompt; `None` where the model brings no template.
    pub template: Option<ChatTemplate>,
    /// Tokens that end an answer.
    pub stop: Vec<u32>,
    /// The dtype of its weights.
    pub kind: Kind,
    /// Where its weights lie.
    pub device: Device,
}

impl Model {
    /// Loads a GGUF file, or a Hugging Face folder (config.json, safetensors, tokenizer.json).
    ///
    /// Weights become `kind`, [`Kind::Float`] or [`Kind::BFloat16`], one tensor at a time.
    pub fn load(path: &Path, kind: Kind, device: Device) -> Result<Self> {
        let source = open(path)?;
        let tokenizer = source.tokenizer()?;
        let template = source.chat_template()?;
        let weights = Weights::new(source, kind, device)?;
        let lm = Llama::load(&weights)?;
        let stop = lm.config().eos_tokens.clone();
        Ok(Self { lm: Box::new(lm), tokenizer, template, stop, kind, device })
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", self.lm.config())
            .field("kind", &self.kind)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}
