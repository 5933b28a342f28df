//! Text as token ids, cut into sentences: to learn from, and to scatter facts in.

use crate::{Facts, Haystack, documents};
use anyhow::{Result, ensure};
use models::{Specials, Tokenizer};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// A text in sentences.
#[derive(Debug)]
pub struct Corpus {
    ids: Vec<u32>,
    /// Where each sentence begins, and the end.
    starts: Vec<usize>,
    /// Of each document's end.
    end: u32,
}

/// What a text asks for: ids, and which of them are answers.
#[derive(Clone, Debug, Default)]
pub struct Passage {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Whether each is an answer's.
    pub answers: Vec<bool>,
    /// How many stand before the first question.
    pub before: usize,
}

impl Corpus {
    /// Reads files of text or folders of them; `end` stands between documents.
    pub fn read(paths: &[PathBuf], tokenizer: &Tokenizer, end: u32) -> Result<Self> {
        let mut texts = Vec::new();
        for file in super::pieces::files_of(paths)? {
            texts.extend(documents(&file)?);
        }
        let encode = |text: &String| -> Result<Vec<Vec<u32>>> {
            let haystack = Haystack::new(text);
            let sentence = |s: &String| Ok(tokenizer.encode(&format!(" {s}"), Specials::Text)?);
            haystack.sentences().iter().map(sentence).collect()
        };
        let encoded: Vec<Vec<Vec<u32>>> = texts.par_iter().map(encode).collect::<Result<_>>()?;
        let mut corpus = Self { ids: Vec::new(), starts: Vec::new(), end };
        for document in encoded {
            for sentence in document {
                corpus.starts.push(corpus.ids.len());
                corpus.ids.extend(sentence);
            }
            corpus.ids.push(end);
        }
        corpus.starts.push(corpus.ids.len());
        Ok(corpus)
    }

    /// Tokens in all.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Refuses a text of fewer than `tokens` tokens.
    pub fn at_least(&self, tokens: usize, paths: &[PathBuf]) -> Result<()> {
        let first = paths.first().map_or(Path::new(""), PathBuf::as_path).display();
        ensure!(
            self.len() > tokens,
            "{first} and what else is given hold {} tokens, wanted more than {tokens}; give more text",
            self.len()
        );
        Ok(())
    }

    /// Some `tokens` in a row.
    pub fn window(&self, random: &mut ChaCha8Rng, tokens: usize) -> &[u32] {
        let start = random.random_range(0..=self.len() - tokens);
        &self.ids[start..start + tokens]
    }

    /// `facts` among `tokens` tokens of whole sentences, the last of which is cut.
    fn scatter(&self, random: &mut ChaCha8Rng, facts: &[Vec<u32>], tokens: usize) -> Vec<u32> {
        let sentences = self.starts.len() - 1;
        let (mut noise, mut left, mut at) = (Vec::new(), tokens, random.random_range(0..sentences));
        while left > 0 {
            let mut sentence = &self.ids[self.starts[at]..self.starts[at + 1]];
            sentence = sentence.strip_suffix(&[self.end]).unwrap_or(sentence);
            sentence = &sentence[..sentence.len().min(left)];
            left -= sentence.len();
            noise.push(sentence);
            at = (at + 1) % sentences;
        }
        let mut places: Vec<usize> =
            facts.iter().map(|_| random.random_range(0..=noise.len())).collect();
        places.sort_unstable();
        let mut ids = Vec::with_capacity(tokens + facts.iter().map(Vec::len).sum::<usize>());
        let mut next = 0;
        for at in 0..=noise.len() {
            while next < facts.len() && places[next] == at {
                ids.extend_from_slice(&facts[next]);
                next += 1;
            }
            ids.extend_from_slice(noise.get(at).copied().unwrap_or_default());
        }
        ids
    }

    /// A passage of exactly `tokens` tokens: facts scattered in noise, then the questions and answers; `None` if they do
    /// not fit. The end of the last answer is the end of the passage where no line ends follow.
    pub fn passage(
        &self,
        random: &mut ChaCha8Rng,
        tokenizer: &Tokenizer,
        facts: &Facts,
        tokens: usize,
        line_ends: bool,
    ) -> Result<Option<Passage>> {
        let encode = |text: &str| Ok(tokenizer.encode(text, Specials::Text)?);
        let encoded = facts.facts.iter().map(|fact| encode(&format!(" {fact}")));
        let encoded = encoded.collect::<Result<Vec<_>>>()?;
        let mut tail = Passage::default();
        for (question, answer) in &facts.asked {
            let (question, mut answer) = (encode(question)?, encode(answer)?);
            if line_ends {
                answer.extend(encode("\n")?);
            }
            tail.answers.extend(question.iter().map(|_| false).chain(answer.iter().map(|_| true)));
            tail.ids.extend(question.into_iter().chain(answer));
        }
        let used = 1 + encoded.iter().map(Vec::len).sum::<usize>() + tail.ids.len();
        if used > tokens {
            return Ok(None);
        }
        let mut ids = vec![self.end];
        ids.extend(self.scatter(random, &encoded, tokens - used));
        let before = ids.len();
        let mut answers = vec![false; before];
        ids.extend(tail.ids);
        answers.extend(tail.answers);
        Ok(Some(Passage { ids, answers, before }))
    }
}
