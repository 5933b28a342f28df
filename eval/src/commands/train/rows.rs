//! The rows of a training: text, and facts to be found in noise. A row depends on the seed and its index alone, so every
//! arm reads the same ones in the same order, before and after an interruption.

use super::corpus::{Corpus, Passage};
use crate::{Family, Words};
use anyhow::{Context, Result};
use models::Tokenizer;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::ops::Range;

/// How often each family is drawn, of a hundred.
const SHARES: [(Family, u32); 7] = [
    (Family::Keys, 25),
    (Family::Lists, 15),
    (Family::Uuids, 10),
    (Family::Several, 15),
    (Family::Chain, 10),
    (Family::Table, 10),
    (Family::Hops, 15),
];
/// A passage is no shorter.
const SHORTEST: usize = 128;
/// And at first no longer.
const FIRST: f64 = 256.0;
/// The most things that facts are about, and the most questions about them.
const LARGEST: f64 = 64.0;
const QUESTIONS: usize = 24;

/// What rows are made of.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Tokens of a row, less its first.
    pub length: usize,
    /// The share of rows that are facts in noise.
    pub facts: f64,
    /// Rows over which the passages' longest grows to a whole row: looking back is learned sooner where there is
    /// little to look at.
    pub growing: u64,
    /// One in so many tokens that are no answer's weighs anything.
    pub text_every: u64,
    /// Of all that is drawn.
    pub seed: u64,
}

/// Rows to learn from at once.
#[derive(Debug, Default)]
pub struct Batch {
    /// `[rows, length + 1]`.
    pub ids: Vec<i64>,
    /// What each predicted token weighs that is no answer's, `[rows, length]`; together 1.
    pub text: Vec<f32>,
    /// The same of the answers'.
    pub answers: Vec<f32>,
}

/// Makes rows.
#[derive(Debug)]
pub struct Rows<'a> {
    corpus: &'a Corpus,
    tokenizer: &'a Tokenizer,
    mix: Mix,
}

impl<'a> Rows<'a> {
    pub fn new(corpus: &'a Corpus, tokenizer: &'a Tokenizer, mix: Mix) -> Self {
        Self { corpus, tokenizer, mix }
    }

    /// The rows of `range`.
    pub fn batch(&self, range: Range<u64>) -> Result<Batch> {
        let rows: Vec<Passage> =
            range.clone().into_par_iter().map(|i| self.row(i)).collect::<Result<_>>()?;
        let mut batch = Batch::default();
        for (index, row) in range.zip(&rows) {
            batch.ids.extend(row.ids.iter().map(|&id| i64::from(id)));
            let weight = |weighs: bool| f32::from(u8::from(weighs));
            let places = (index..).zip(&row.answers[1..]);
            let text = places.map(|(i, answer)| !answer && i.is_multiple_of(self.mix.text_every));
            batch.text.extend(text.map(weight));
            batch.answers.extend(row.answers[1..].iter().map(|&answer| weight(answer)));
        }
        for weights in [&mut batch.text, &mut batch.answers] {
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|weight| *weight /= sum.max(1.0));
        }
        Ok(batch)
    }

    fn row(&self, index: u64) -> Result<Passage> {
        let mut random = ChaCha8Rng::seed_from_u64(self.mix.seed);
        random.set_stream(index);
        let due = |count: u64| (count as f64 * self.mix.facts).floor();
        if due(index + 1) > due(index) {
            return self.facts(&mut random, self.longest(index));
        }
        let ids = self.corpus.window(&mut random, self.mix.length + 1).to_vec();
        Ok(Passage { answers: vec![false; ids.len()], before: ids.len(), ids })
    }

    /// Tokens of the longest passage in a row.
    fn longest(&self, index: u64) -> usize {
        let (whole, grown) =
            ((self.mix.length + 1) as f64, index as f64 / self.mix.growing.max(1) as f64);
        if grown < 1.0 && whole > FIRST {
            (FIRST * (whole / FIRST).powf(grown)) as usize
        } else {
            whole as usize
        }
    }

    /// Passages one after another; a quarter of the rows are a single one.
    fn facts(&self, random: &mut ChaCha8Rng, longest: usize) -> Result<Passage> {
        let mut row = Passage::default();
        let whole = random.random_range(0..4) == 0;
        loop {
            let left = self.mix.length + 1 - row.ids.len();
            if left < SHORTEST {
                row.ids.extend(self.corpus.window(random, left));
                row.answers.resize(row.ids.len(), false);
                return Ok(row);
            }
            let most = left.min(longest);
            let drawn = |random: &mut _| between(random, SHORTEST as f64, most as f64) as usize;
            let tokens = if whole { most } else { drawn(random) };
            let passage = self.passage(random, tokens)?;
            row.ids.extend(passage.ids);
            row.answers.extend(passage.answers);
        }
    }

    fn passage(&self, random: &mut ChaCha8Rng, tokens: usize) -> Result<Passage> {
        let mut drawn = random.random_range(0..100);
        let family = SHARES.iter().find(|(_, share)| {
            let found = drawn < *share;
            drawn = drawn.saturating_sub(*share);
            found
        });
        let (family, _) = family.context("the shares add up to a hundred")?;
        let mut size = between(random, 1.0, LARGEST) as usize;
        loop {
            let facts = family.draw(random, size, QUESTIONS.min(1 + tokens / 64), Words::Training);
            if let Some(passage) =
                self.corpus.passage(random, self.tokenizer, &facts, tokens, true)?
            {
                return Ok(passage);
            }
            if size == 1 {
                // A single UUID's question may be too long for the shortest passage: noise alone.
                return Ok(Passage {
                    ids: self.corpus.window(random, tokens).to_vec(),
                    answers: vec![false; tokens],
                    before: tokens,
                });
            }
            size /= 2;
        }
    }
}

/// A number whose logarithm is even.
fn between(random: &mut ChaCha8Rng, least: f64, most: f64) -> f64 {
    (least.ln() + random.random::<f64>() * (most / least).ln()).exp().clamp(least, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: usize = 1600;

    fn with_rows(seed: u64, check: impl FnOnce(&Rows, &Tokenizer)) {
        let folder = tempfile::tempdir().unwrap();
        let sentences =
            (0..600).map(|i| format!("The river runs under bridge {i} and slowly turns. "));
        let text = sentences.collect::<String>();
        let path = folder.path().join("text.txt");
        std::fs::write(&path, &text).unwrap();
        let tokenizer =
            Tokenizer::train(&[text], 400, &folder.path().join("tokenizer.json")).unwrap();
        let corpus = Corpus::read(&[path], &tokenizer, 0).unwrap();
        check(
            &Rows::new(
                &corpus,
                &tokenizer,
                Mix { length: LENGTH, facts: 0.5, growing: 0, text_every: 1, seed },
            ),
            &tokenizer,
        );
    }

    #[test]
    fn a_row_depends_on_seed_and_index_alone() {
        with_rows(1, |rows, _| {
            let (some, again) = (rows.batch(4..8).unwrap(), rows.batch(6..8).unwrap());
            assert_eq!(some.ids.len(), 4 * (LENGTH + 1));
            assert_eq!(some.ids[2 * (LENGTH + 1)..], again.ids);
            for weights in [&some.text, &some.answers] {
                assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-3);
            }
            assert!(some.text.iter().zip(&some.answers).all(|(a, b)| (*a > 0.0) != (*b > 0.0)));
            with_rows(2, |others, _| assert_ne!(others.batch(6..8).unwrap().ids, again.ids));
        });
    }

    #[test]
    fn one_in_so_many_tokens_of_text_weighs_and_every_answer() {
        with_rows(1, |rows, _| {
            let mix = Mix { text_every: 4, ..rows.mix };
            let (some, all) =
                (Rows { mix, ..*rows }.batch(0..4).unwrap(), rows.batch(0..4).unwrap());
            assert!(some.ids == all.ids && some.answers == all.answers);
            let count = |batch: &Batch| batch.text.iter().filter(|&&w| w > 0.0).count();
            assert!(count(&some).abs_diff(count(&all) / 4) < 100, "{}", count(&some));
            assert!((some.text.iter().sum::<f32>() - 1.0).abs() < 1e-3);
            let kept = some.text.iter().zip(&all.text).filter(|(some, _)| **some > 0.0);
            assert!(kept.into_iter().all(|(_, all)| *all > 0.0), "answers are no text");
        });
    }

    #[test]
    fn passages_grow_to_a_whole_row() {
        with_rows(1, |rows, _| {
            let mix = Mix { growing: 100, ..rows.mix };
            let rows = Rows { mix, ..*rows };
            assert_eq!([0, 50, 100, 900].map(|i| rows.longest(i)), [256, 640, 1601, 1601]);
            let begun = rows.row(1).unwrap().ids.windows(2).filter(|ids| ids[0] == 0).count();
            assert!(begun >= 5, "a row of short passages, each after an end: {begun}");
        });
    }

    #[test]
    fn answers_stand_in_the_text_before_them() {
        with_rows(1, |rows, tokenizer| {
            let mut found = 0;
            for index in [1, 3, 5, 7, 9, 11] {
                let row = rows.row(index).unwrap();
                assert!(rows.row(index - 1).unwrap().answers.iter().all(|answer| !answer), "text");
                let mut at = 0;
                for run in row.answers.chunk_by(|a, b| a == b) {
                    let (from, to) = (at, at + run.len());
                    at = to;
                    if run[0] {
                        let before = tokenizer.decode(&row.ids[..from], false).unwrap();
                        let answer = tokenizer.decode(&row.ids[from..to], false).unwrap();
                        assert!(answer.starts_with(' ') && answer.ends_with('\n'), "{answer:?}");
                        let stands = answer.trim().split(", ").all(|part| before.contains(part));
                        assert!(stands, "{answer:?} is not in {before}");
                        found += 1;
                    }
                }
            }
            assert!(found > 10, "{found}");
        });
    }
}
