//! Text to token ids and back.

mod train;

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// What the text of a special token, such as `<|im_end|>`, means where it occurs in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// The token: for text of our own making, such as a rendered chat template.
    Parse,
    /// Plain characters: for text of others, which must not speak for the template.
    Text,
}

/// A model's vocabulary, as the `tokenizers` crate runs it.
///
/// Ids are those of `transformers`; text is decoded as it stands, without tidying spaces before punctuation.
pub struct Tokenizer {
    path: PathBuf,
    parse: tokenizers::Tokenizer,
    /// The same, blind to special tokens. A flag inside of the crate's type makes the difference, so it is a copy.
    text: OnceLock<tokenizers::Tokenizer>,
    vocab_size: usize,
}

/// A vocabulary as GGUF's `tokenizer.ggml.*` entries describe it.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// The file, for errors.
    pub path: PathBuf,
    /// `model`: the algorithm. Only `gpt2`, byte-level BPE, is known.
    pub model: String,
    /// `pre`: how text is cut before merging: `smollm`, `llama-bpe`, `qwen2`, `gpt-2` or `default` (as `gpt-2`).
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `token_type`, by id: 1 normal, 3 control (special), 4 user-defined (always matched whole), 5 unused.
    pub token_types: Vec<i32>,
    /// `merges`, best first: two tokens with a space between.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `add_bos_token`; `None` as llama.cpp does for this `pre`: true for `llama-bpe` only.
    pub add_bos: Option<bool>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Truncation and padding saved in it are ignored, as `transformers` does.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(|cause| Error::Io {
            path: path.to_owned(),
            cause,
            advice: "put the model's tokenizer.json there",
        })?;
        let inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|error| failed(path, error, "check that it is a whole tokenizer.json"))?;
        Self::new(path, inner)
    }

    /// Builds the tokenizer of a GGUF file.
    ///
    /// Unused tokens, with which converters pad the vocabulary, are left out: they decode to nothing.
    pub fn from_gguf(vocabulary: &GgufVocabulary) -> Result<Self> {
        let path = vocabulary.path.as_path();
        let inner = build(vocabulary)?;
        Self::new(path, inner)
    }

    fn new(path: &Path, mut inner: tokenizers::Tokenizer) -> Result<Self> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| failed(path, error, "remove `truncation`"))?;
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Ok(Self { path: path.to_owned(), parse: inner, text: OnceLock::new(), vocab_size })
    }

    /// The ids of `text` and of nothing else: no BOS, no EOS. A rendered chat template has its own BOS.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        let inner = match specials {
            Specials::Parse => &self.parse,
            Specials::Text => self.text.get_or_init(|| {
                let mut blind = self.parse.clone();
                blind.set_encode_special_tokens(true);
                blind
            }),
        };
        self.ids(inner, text, false)
    }

    /// The ids of a raw prompt, without a chat template: with the BOS (and whatever else) that the tokenizer itself
    /// adds, if it adds any. Special tokens in it are parsed.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(&self.parse, text, true)
    }

    fn ids(&self, inner: &tokenizers::Tokenizer, text: &str, add: bool) -> Result<Vec<u32>> {
        let encoding = inner.encode_fast(text, add).map_err(|error| {
            failed(&self.path, error, "check the text for very long runs of one character")
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary, which a model with
    /// padded output rows can choose, become nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.parse
            .decode(ids, skip_special)
            .map_err(|error| failed(&self.path, error, "check the decoder in the tokenizer's file"))
    }

    /// Decodes a text that is still being written; special tokens are skipped.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), read: 0, written: String::new() }
    }

    /// The highest id plus one. A model's output can have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, written as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.parse.token_to_id(token)
    }

    /// The ids of the special tokens, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        let added = self.parse.get_added_tokens_decoder();
        let mut ids: Vec<u32> =
            added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        ids.sort_unstable();
        ids
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

/// Token ids in, text out, never half a character. See [`Tokenizer::stream`].
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    /// The newest tokens: those of the last whole characters, since some decoders look back, and those that wait.
    ids: Vec<u32>,
    /// How many of them are the former.
    read: usize,
    /// What of their text is out.
    written: String,
}

/// What is decoded from bytes that are no UTF-8, or not yet.
const REPLACEMENT: char = '\u{FFFD}';

impl DecodeStream<'_> {
    /// The text that `id` completes, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        let text = self.decode();
        // A character has at most three bytes before its last, so what stands before three replacements is final.
        let mut sure = text.as_str();
        for _ in 0..3 {
            sure = sure.strip_suffix(REPLACEMENT).unwrap_or(sure);
        }
        let piece = self.take(sure);
        if sure.len() == text.len() {
            let newest = self.tokenizer.decode(&self.ids[self.read..], true).unwrap_or_default();
            if !newest.is_empty() {
                self.ids.drain(..self.read);
                self.written = newest;
            }
            self.read = self.ids.len();
        }
        piece
    }

    /// What is left when no more tokens come: U+FFFD for a character that was never finished.
    pub fn finish(mut self) -> Option<String> {
        let text = self.decode();
        self.take(&text)
    }

    /// The text of `ids`, which begins with what is written.
    fn decode(&mut self) -> String {
        let text = self.tokenizer.decode(&self.ids, true).unwrap_or_default();
        if text.starts_with(&self.written) {
            return text;
        }
        // A byte-fallback decoder makes a whole run of bytes U+FFFD while its end is missing. What is out is out.
        self.ids.drain(..self.read);
        self.read = 0;
        self.written.clear();
        self.tokenizer.decode(&self.ids, true).unwrap_or_default()
    }

    /// Hands out of `text` what is not out yet.
    fn take(&mut self, text: &str) -> Option<String> {
        let piece = text.get(self.written.len()..).filter(|piece| !piece.is_empty())?;
        self.written += piece;
        Some(piece.to_owned())
    }
}

fn failed(path: &Path, what: impl ToString, advice: &'static str) -> Error {
    Error::Tokenizer { path: path.to_owned(), what: what.to_string(), advice }
}

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Cuts text as the models behind llama.cpp's names for pre-tokenizers do in their own tokenizer.json.
fn pre_tokenizer(path: &Path, pre: Option<&str>) -> Result<Sequence> {
    let split = |pattern: &str| {
        Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(|error| failed(path, error, "report this"))
    };
    let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, use_regex));
    Ok(Sequence::new(match pre {
        Some("smollm") => vec![Digits::new(true).into(), bytes(true)],
        Some("llama-bpe") => vec![split(LLAMA3)?, bytes(false)],
        Some("qwen2") => vec![split(QWEN2)?, bytes(false)],
        Some("gpt-2" | "default") => vec![bytes(true)],
        other => {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                field: "tokenizer.ggml.pre".to_owned(),
                found: other.unwrap_or("(missing)").to_owned(),
                supported: "smollm, llama-bpe, qwen2 and gpt-2",
                advice: "convert the model again, or load its Hugging Face folder",
            });
        }
    }))
}

fn build(vocabulary: &GgufVocabulary) -> Result<tokenizers::Tokenizer> {
    let GgufVocabulary { path, model, pre, tokens, token_types, merges, bos, add_bos } = vocabulary;
    let fail = |what: String, advice| failed(path, what, advice);
    if model != "gpt2" {
        return Err(Error::Unsupported {
            path: path.clone(),
            field: "tokenizer.ggml.model".to_owned(),
            found: model.clone(),
            supported: "gpt2 (byte-level BPE)",
            advice: "load the model's Hugging Face folder",
        });
    }
    if tokens.len() != token_types.len() {
        let what = format!("{} tokens, but {} token types", tokens.len(), token_types.len());
        return Err(fail(what, "fetch the file again"));
    }
    let pre_tokenizer = pre_tokenizer(path, pre.as_deref())?;
    let typed = |wanted: i32| {
        tokens
            .iter()
            .zip(token_types)
            .filter(move |&(_, &kind)| kind == wanted)
            .map(|(token, _)| token.clone())
    };
    let used = tokens.iter().zip(0u32..).zip(token_types).filter(|&(_, &kind)| kind != 5);
    let vocab = used.map(|((token, id), _)| (token.clone(), id));
    let pairs = merges.iter().map(|merge| {
        let (left, right) = merge.split_once(' ').ok_or_else(|| {
            fail(format!("merge {merge:?} is not two tokens"), "fetch the file again")
        })?;
        Ok((left.to_owned(), right.to_owned()))
    });
    let llama3 = pre.as_deref() == Some("llama-bpe");
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.collect::<Vocab>(), pairs.collect::<Result<Vec<_>>>()?)
        .ignore_merges(llama3)
        .build()
        .map_err(|error| fail(error.to_string(), "fetch the file again"))?;

    let mut inner = tokenizers::Tokenizer::new(bpe);
    if pre.as_deref() == Some("qwen2") {
        inner.with_normalizer(Some(NFC)).map_err(|error| fail(error.to_string(), "report this"))?;
    }
    inner.with_pre_tokenizer(Some(pre_tokenizer)).with_decoder(Some(ByteLevel::default()));
    inner
        .add_special_tokens(typed(3).map(|token| AddedToken::from(token, true)))
        .and_then(|_| {
            inner.add_tokens(typed(4).map(|token| AddedToken::from(token, false).normalized(false)))
        })
        .map_err(|error| fail(error.to_string(), "fetch the file again"))?;
    if add_bos.unwrap_or(llama3) {
        let id =
            bos.ok_or_else(|| fail("adds a BOS but names none".into(), "convert the model again"))?;
        let token = tokens.get(id as usize).ok_or_else(|| {
            fail(
                format!("BOS is {id}, but there are {} tokens", tokens.len()),
                "convert the model again",
            )
        })?;
        let processor = TemplateProcessing::builder()
            .try_single(vec![token.as_str(), "$A"])
            .map_err(|error| fail(error, "report this"))?
            .special_tokens(vec![(token.as_str(), id)])
            .build()
            .map_err(|error| fail(error.to_string(), "report this"))?;
        inner.with_post_processor(Some(processor));
    }
    Ok(inner)
}
