//! Frequent words: of made-up words whose counts follow a zeta distribution, find the second to fourth. The first is dots.

use crate::task::Sample;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::f64::consts::PI;

pub const NEW_TOKENS: usize = 50;
/// With fewer words the fourth is no more frequent than the fifth.
pub const LEAST: usize = 60;
const LETTERS: usize = 6;

/// What chance decided.
pub struct Drawn {
    /// By falling frequency.
    pub vocabulary: Vec<String>,
    /// The text, in its order.
    pub words: Vec<String>,
}

impl Drawn {
    pub fn new(random: &mut ChaCha8Rng, vocabulary: usize, size: usize) -> Self {
        let mut drawn = BTreeSet::new();
        while drawn.len() < vocabulary.max(5) {
            drawn.insert((0..LETTERS).map(|_| random.random_range('a'..='z')).collect::<String>());
        }
        let mut vocabulary: Vec<String> = drawn.into_iter().collect();
        vocabulary.shuffle(random);
        vocabulary[0] = "...".to_owned();
        let counted = vocabulary.iter().zip(counts(size, vocabulary.len()));
        let mut words: Vec<String> =
            counted.flat_map(|(word, count)| vec![word.clone(); count]).collect();
        words.shuffle(random);
        Self { vocabulary, words }
    }

    pub fn write(&self) -> Sample {
        Sample {
            context: format!(
                "Read the following coded text and track the frequency of each coded word. Find the three most frequently \
                 appeared coded words. {}\n",
                self.words.join(" ")
            ),
            question: "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most \
                       frequently appeared words in the above coded text? "
                .to_owned(),
            answer_prefix: "Answer: According to the coded text above, the three most frequently appeared words are:"
                .to_owned(),
            answers: self.vocabulary[1..4].to_vec(),
            max_new_tokens: NEW_TOKENS,
            ..Sample::default()
        }
    }
}

/// How often each of `ranks` words is in a text of about `size`: size / rank² / ζ(2), rounded down.
pub fn counts(size: usize, ranks: usize) -> impl Iterator<Item = usize> {
    let zeta = PI * PI / 6.0;
    (1..=ranks).map(move |rank| (size as f64 * (rank as f64).powi(-2) / zeta) as usize)
}
