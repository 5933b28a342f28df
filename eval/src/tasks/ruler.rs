//! RULER (arXiv 2404.06654): thirteen tasks that grow to any length.
//!
//! Prompts are those of NVIDIA's generators as of October 2024, from which kvpress's public data set was made; where a prompt
//! ends and a question begins is kvpress's split. Each task draws its values first and writes its prompt from them, so that
//! the writing is checked against the generators on the same values. The drawing is ours: a sample depends on seed, task and
//! index alone. Below 4,096 tokens the list of common words is shorter, as there.

mod cwe;
mod fwe;
mod niah;
pub(crate) mod qa;
mod texts;
mod vt;

#[cfg(test)]
mod tests;

use crate::fit;
use crate::metrics::{any_reference, share_of_references};
use crate::task::{Sample, Task};
use anyhow::{Result, bail};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
pub use texts::Texts;

/// One of RULER's tasks, for prompts of a given length.
pub struct Ruler<'a> {
    name: &'static str,
    kind: Kind,
    texts: &'a Texts,
    count: &'a dyn Fn(&str) -> Result<usize>,
    tokens: usize,
    seed: u64,
    stream: u64,
}

#[derive(Clone, Copy)]
enum Kind {
    Needles(niah::Kind),
    Variables,
    CommonWords,
    FrequentWords,
    Squad,
    Hotpot,
}

/// The tasks, in the order of RULER's tables.
const TASKS: [(&str, Kind); 13] = {
    use niah::{Hay, Of};
    use {Hay::*, Of::*};
    const fn needles(hay: Hay, key: Of, value: Of, [keys, values, queries]: [usize; 3]) -> Kind {
        Kind::Needles(niah::Kind { hay, key, value, keys, values, queries })
    }
    [
        ("niah_single_1", needles(Noise, Words, Numbers, [1, 1, 1])),
        ("niah_single_2", needles(Essays, Words, Numbers, [1, 1, 1])),
        ("niah_single_3", needles(Essays, Words, Uuids, [1, 1, 1])),
        ("niah_multikey_1", needles(Essays, Words, Numbers, [4, 1, 1])),
        ("niah_multikey_2", needles(Needles, Words, Numbers, [1, 1, 1])),
        ("niah_multikey_3", needles(Needles, Uuids, Uuids, [1, 1, 1])),
        ("niah_multivalue", needles(Essays, Words, Numbers, [1, 4, 1])),
        ("niah_multiquery", needles(Essays, Words, Numbers, [4, 1, 4])),
        ("vt", Kind::Variables),
        ("cwe", Kind::CommonWords),
        ("fwe", Kind::FrequentWords),
        ("qa_1", Kind::Squad),
        ("qa_2", Kind::Hotpot),
    ]
};

/// RULER's score of an answer to a sample of `task`.
pub fn score(task: &str, answers: &[String], text: &str) -> f64 {
    if task.starts_with("qa") {
        any_reference(text, answers)
    } else {
        share_of_references(text, answers)
    }
}

impl<'a> Ruler<'a> {
    /// The names of the tasks.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TASKS.iter().map(|(name, _)| *name)
    }

    /// A task whose prompts, with the answer's beginning and the longest answer, have at most `tokens` tokens by `count`. The
    /// chat template does not count.
    pub fn new(
        name: &str,
        texts: &'a Texts,
        count: &'a dyn Fn(&str) -> Result<usize>,
        tokens: usize,
        seed: u64,
    ) -> Result<Self> {
        let Some((stream, (name, kind))) = (0..).zip(TASKS).find(|(_, (known, _))| *known == name)
        else {
            let names: Vec<_> = Self::names().collect();
            bail!("RULER has no task {name}; it has {}", names.join(", "));
        };
        Ok(Self { name, kind, texts, count, tokens, seed, stream })
    }

    fn random(&self, index: u64) -> ChaCha8Rng {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(self.stream << 40 | index);
        random
    }

    /// The least and the greatest size of the task's material: lines, words or documents.
    fn sizes(&self, index: u64) -> Result<(usize, usize)> {
        Ok(match self.kind {
            Kind::Needles(kind) => kind.sizes(self.texts)?,
            Kind::Variables => (vt::LEAST, self.tokens),
            Kind::CommonWords => (2 * cwe::COMMON, self.texts.words()?.len()),
            Kind::FrequentWords => (fwe::LEAST, self.tokens),
            Kind::Squad => self.texts.squad()?.sizes(index)?,
            Kind::Hotpot => self.texts.hotpot()?.sizes(index)?,
        })
    }

    fn build(&self, index: u64, size: usize, example: Option<&vt::Example>) -> Result<Sample> {
        let random = &mut self.random(index); // the same for every size
        let mut sample = match self.kind {
            Kind::Needles(kind) => kind.draw(random, self.texts, size)?.write(self.texts)?,
            Kind::Variables => {
                let drawn = vt::Drawn::new(random, size, 5);
                drawn.write(example.map(|example| example.with_new_names(random)))
            }
            Kind::CommonWords => {
                let short = self.tokens < 4096;
                cwe::Drawn::new(random, self.texts.words()?, size, short).write()
            }
            Kind::FrequentWords => {
                let vocabulary = (self.tokens - fwe::NEW_TOKENS.min(self.tokens)) / 50;
                fwe::Drawn::new(random, vocabulary, size).write()
            }
            Kind::Squad => self.texts.squad()?.draw(random, index, size)?.write(),
            Kind::Hotpot => self.texts.hotpot()?.draw(random, index, size)?.write(),
        };
        sample.facts.insert("task".into(), self.name.into());
        Ok(sample)
    }

    fn tokens_of(&self, sample: &Sample) -> Result<usize> {
        let prompt = [&*sample.context, &sample.question, &sample.answer_prefix].concat();
        Ok((self.count)(&prompt)? + sample.max_new_tokens)
    }
}

impl Task for Ruler<'_> {
    fn name(&self) -> &str {
        self.name
    }

    fn samples(&self) -> Option<u64> {
        match self.kind {
            Kind::Squad => Some(self.texts.squad().ok()?.len()),
            Kind::Hotpot => Some(self.texts.hotpot().ok()?.len()),
            _ => None,
        }
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let example = match self.kind {
            Kind::Variables => {
                Some(vt::Example::new(&mut self.random(u64::MAX >> 24), self.count)?)
            }
            _ => None,
        };
        let (least, most) = self.sizes(index)?;
        let mut tokens = |size| self.tokens_of(&self.build(index, size, example.as_ref())?);
        match fit::largest(least, most, self.tokens, &mut tokens)? {
            Some(size) => self.build(index, size, example.as_ref()),
            None => Err(TooShort { tokens: self.tokens, needed: tokens(least)? }.into()),
        }
    }

    fn score(&self, sample: &Sample, text: &str) -> f64 {
        score(self.name, &sample.answers, text)
    }
}

/// A task's least material does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooShort {
    /// What was asked for.
    pub tokens: usize,
    /// What the sample needs.
    pub needed: usize,
}

impl std::fmt::Display for TooShort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tokens, needed } = self;
        write!(f, "does not fit {tokens} tokens, it needs about {needed}; ask for more")
    }
}

impl std::error::Error for TooShort {}

impl std::fmt::Debug for Ruler<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ruler")
            .field("name", &self.name)
            .field("tokens", &self.tokens)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}
