//! A vocabulary for a model from scratch.

use super::{Tokenizer, failed};
use crate::error::{Error, Result};
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, TokenizerImpl,
};

/// What stands between documents: id 0.
const END: &str = "<|end|>";

type Bytes = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

impl Tokenizer {
    /// Learns byte-level BPE of `size` tokens from `texts`, each digit a token of its own, and writes it as tokenizer.json
    /// to `path`. Id 0, `<|end|>`, is for the end of a document.
    pub fn train(texts: &[String], size: usize, path: &Path) -> Result<Self> {
        let mut inner = Bytes::new(BPE::default());
        let bytes = ByteLevel::new(false, true, true);
        inner
            .with_pre_tokenizer(Some(PreTokenizerWrapper::from(Sequence::new(vec![
                Digits::new(true).into(),
                bytes.into(),
            ]))))
            .with_decoder(Some(DecoderWrapper::from(bytes)));
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END.to_owned(), true)])
            .build();
        let advice = "give more text, or a vocabulary of 300 or more";
        inner.train(&mut trainer, texts.iter()).map_err(|error| failed(path, error, advice))?;
        let json = inner.to_string(true).map_err(|error| failed(path, error, advice))?;
        std::fs::write(path, json)
            .map_err(|cause| Error::Write { path: path.to_owned(), cause })?;
        Self::from_file(path)
    }
}
