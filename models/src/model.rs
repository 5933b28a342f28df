//! A model with all that it takes to talk to it.

use crate::causal_lm::CausalLm;
use crate::chat::ChatTemplate;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::overlay::Overlay;
use crate::ranks::Rank;
use crate::tokenizer::{GgufVocabulary, Tokenizer};
use crate::weights::{Source, Weights, open};
use std::collections::BTreeMap;
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
    /// What a person should know of how the files were read, such as a chat template that is not there.
    pub notes: Vec<String>,
}

impl Model {
    /// Loads a GGUF file, or a Hugging Face folder (config.json, safetensors, tokenizer.json).
    ///
    /// Weights become `kind`, [`Kind::Float`] or [`Kind::BFloat16`], one tensor at a time.
    pub fn load(path: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::load_overlaid(path, None, kind, device)
    }

    /// The same with an [`Overlay`] over it.
    pub fn load_overlaid(
        path: &Path,
        overlay: Option<&Path>,
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let overlay = overlay.map(Overlay::open).transpose()?;
        Self::assemble(path, overlay, kind, device, Decoder::load)
    }

    /// What is `rank`'s of a model, on its device.
    ///
    /// # Errors
    /// As for the whole, and those of [`Decoder::load_part`].
    pub fn load_part(path: &Path, kind: Kind, rank: &Rank) -> Result<Self> {
        let load = |weights: &Weights| Decoder::load_part(weights, rank);
        Self::assemble(path, None, kind, rank.device(), load)
    }

    fn assemble(
        path: &Path,
        overlay: Option<Overlay>,
        kind: Kind,
        device: Device,
        load: impl FnOnce(&Weights) -> Result<Decoder>,
    ) -> Result<Self> {
        let source = open(path)?;
        let (tokenizer, template) = texts(&source)?;
        let mut notes = source.notes().to_vec();
        if template.is_none() {
            notes.push("the model brings no chat template: prompts are plain text".to_owned());
        }
        let mut weights = Weights::new(source, kind, device)?;
        if let Some(overlay) = overlay {
            weights = weights.overlaid(overlay)?;
        }
        let lm = Box::new(load(&weights)?);
        let stop = lm.config().eos_tokens.clone();
        Ok(Self { lm, tokenizer, template, stop, kind, device, notes })
    }

    /// The tokenizer of a model that is not loaded.
    pub fn tokenizer_of(source: &Source) -> Result<Tokenizer> {
        Ok(texts(source)?.0)
    }
}

fn texts(source: &Source) -> Result<(Tokenizer, Option<ChatTemplate>)> {
    match source {
        Source::Gguf(file) => from_gguf(file),
        Source::Folder(_) | Source::Random(_) => {
            let path = source.path();
            let tokenizer = Tokenizer::from_file(&path.join("tokenizer.json"))?;
            Ok((tokenizer, ChatTemplate::from_folder(path)?))
        }
    }
}

fn from_gguf(file: &Gguf) -> Result<(Tokenizer, Option<ChatTemplate>)> {
    let metadata = file.metadata();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let owned = |texts: Option<Vec<&str>>| -> Vec<String> {
        texts.unwrap_or_default().into_iter().map(str::to_owned).collect()
    };
    let tokens = owned(metadata.texts(&key("tokens"))?);
    let token = |name: &str| -> Result<Option<String>> {
        let id = metadata.token(&key(name))?;
        Ok(id.and_then(|id| tokens.get(id as usize)).cloned())
    };
    let mut specials = BTreeMap::new();
    for name in ["bos_token", "eos_token"] {
        specials.extend(token(&format!("{name}_id"))?.map(|text| (name.to_owned(), text)));
    }
    let template = metadata
        .text("tokenizer.chat_template")?
        .map(|source| ChatTemplate::from_source(file.path(), source, specials))
        .transpose()?;
    let tokenizer = Tokenizer::from_gguf(&GgufVocabulary {
        path: file.path().to_owned(),
        model: metadata.text(&key("model"))?.unwrap_or_default().to_owned(),
        pre: metadata.text(&key("pre"))?.map(str::to_owned),
        token_types: metadata.i32s(&key("token_type"))?.unwrap_or_default(),
        merges: owned(metadata.texts(&key("merges"))?),
        bos: metadata.token(&key("bos_token_id"))?,
        add_bos: metadata.flag(&key("add_bos_token"))?,
        tokens,
    })?;
    Ok((tokenizer, template))
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
