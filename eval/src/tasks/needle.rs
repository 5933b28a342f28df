//! RULER's single needle in an essay haystack: one sentence with a number, hidden in a long text.
//!
//! RULER (arXiv 2404.06654), task `niah_single_2`: its wording, its depths, keys of two words, values of seven
//! digits. Differences: each sample begins elsewhere in the haystack (RULER's all begin at its start), and
//! keys are drawn from a short list of our own.

use crate::haystack::Haystack;
use crate::task::{Sample, Task};
use anyhow::{Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The task, for prompts of about a given number of tokens.
pub struct Needle<'a> {
    haystack: &'a Haystack,
    count: &'a dyn Fn(&str) -> Result<usize>,
    tokens: usize,
    seed: u64,
    /// In percent; drawn for each sample if there is none.
    depth: Option<usize>,
    name: String,
}

const ADJECTIVES: [&str; 16] = [
    "amber", "brisk", "curious", "dusty", "eager", "faint", "gentle", "hollow", "idle", "jolly",
    "keen", "lucid", "mellow", "nimble", "opaque", "placid",
];
const NOUNS: [&str; 16] = [
    "anchor", "bridge", "candle", "dolphin", "engine", "feather", "garden", "harbor", "island",
    "jacket", "kettle", "ladder", "magnet", "needle", "orchard", "pencil",
];

impl<'a> Needle<'a> {
    /// Samples whose context and question have about `tokens` tokens by `count`, and no more.
    pub fn new(
        haystack: &'a Haystack,
        count: &'a dyn Fn(&str) -> Result<usize>,
        tokens: usize,
        seed: u64,
    ) -> Self {
        Self { haystack, count, tokens, seed, depth: None, name: "needle".to_owned() }
    }

    /// The same with every needle at `depth` percent of the sentences, for a map of depths and lengths.
    pub fn at_depth(
        haystack: &'a Haystack,
        count: &'a dyn Fn(&str) -> Result<usize>,
        tokens: usize,
        seed: u64,
        depth: usize,
    ) -> Self {
        let (depth, name) = (Some(depth.min(100)), format!("depth_{depth:03}"));
        Self { depth, name, ..Self::new(haystack, count, tokens, seed) }
    }

    /// The sample with the needle after `sentences` sentences, at `depth` percent of them.
    fn build(
        &self,
        start: usize,
        sentences: usize,
        depth: usize,
        key: &str,
        value: &str,
    ) -> Sample {
        let hay = &self.haystack.sentences()[start..start + sentences];
        let at = sentences * depth / 100;
        let needle = format!("One of the special magic numbers for {key} is: {value}.");
        let mut text: Vec<&str> = hay[..at].iter().map(String::as_str).collect();
        text.push(&needle);
        text.extend(hay[at..].iter().map(String::as_str));
        Sample {
            context: format!(
                "A special magic number is hidden within the following text. Make sure to memorize it. I will \
                 quiz you about the number afterwards.\n{}\n",
                text.join(" ")
            ),
            question: format!(
                "What is the special magic number for {key} mentioned in the provided text?"
            ),
            answer_prefix: format!(
                " The special magic number for {key} mentioned in the provided text is"
            ),
            answers: vec![value.to_owned()],
            facts: [("depth".to_owned(), depth.into())].into_iter().collect(),
            ..Sample::default()
        }
    }

    fn fits(&self, sample: &Sample) -> Result<bool> {
        Ok((self.count)(&sample.context)? + (self.count)(&sample.question)? <= self.tokens)
    }
}

impl Task for Needle<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(index);
        let mut pick = |n: usize| random.random_range(0..n);
        let key = format!("{}-{}", ADJECTIVES[pick(ADJECTIVES.len())], NOUNS[pick(NOUNS.len())]);
        let value = (1_000_000 + pick(9_000_000)).to_string();
        // RULER's depths: 40 points from 0 to 100 percent.
        let drawn = (pick(40) as f64 * 100.0 / 39.0).round() as usize;
        let depth = self.depth.unwrap_or(drawn);
        let available = self.haystack.sentences().len();
        let start = pick(available.max(1));

        // The largest number of sentences that fits, wrapping to the start of the haystack near its end.
        let (mut low, mut high) = (0, self.tokens.min(available)); // a sentence has a token at least
        let start = start.min(available - high);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if self.fits(&self.build(start, middle, depth, &key, &value))? {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        if low == 0 {
            bail!(
                "a needle prompt does not fit {} tokens, or the haystack is empty; ask for 200 or more",
                self.tokens
            );
        }
        Ok(self.build(start, low, depth, &key, &value))
    }
}

impl std::fmt::Debug for Needle<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Needle")
            .field("tokens", &self.tokens)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}
