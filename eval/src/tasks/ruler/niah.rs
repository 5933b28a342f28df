//! Needles in a haystack: sentences that give magic words a value, hidden in essays, noise, or other needles.

use super::texts::{NOISE, Texts};
use crate::task::Sample;
use anyhow::Result;
use rand::Rng;
use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

const NEW_TOKENS: usize = 128;
/// Where needles may lie in essays, in percent: 40 points, evenly from 0 to 100.
const DEPTHS: usize = 40;

/// One of the eight tasks.
#[derive(Clone, Copy)]
pub struct Kind {
    pub hay: Hay,
    pub key: Of,
    pub value: Of,
    pub keys: usize,
    /// Of each key.
    pub values: usize,
    /// Keys that are asked for.
    pub queries: usize,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Hay {
    Noise,
    Essays,
    Needles,
}

#[derive(Clone, Copy)]
pub enum Of {
    Words,
    Numbers,
    Uuids,
}

/// What chance decided.
pub struct Drawn {
    pub kind: Kind,
    /// Key and value in the order of the text.
    pub needles: Vec<(String, String)>,
    pub queries: Vec<String>,
    /// The values of the queried keys.
    pub answers: Vec<String>,
    pub places: Places,
}

/// Where the needles lie.
pub enum Places {
    /// In so many words of the essays, after these percents of their sentences, rising.
    Essays { words: usize, depths: Vec<usize> },
    /// Before these lines of other text, falling: the first needle is the last in the text.
    Lines { lines: Vec<String>, before: Vec<usize> },
}

impl Kind {
    /// Words of an essay or lines of other hay.
    pub fn sizes(&self, texts: &Texts) -> Result<(usize, usize)> {
        let needles = self.keys * self.values;
        Ok(match self.hay {
            Hay::Essays => (1, texts.essays()?.len()),
            Hay::Noise | Hay::Needles => (needles, usize::MAX / 2),
        })
    }

    pub fn draw(self, random: &mut ChaCha8Rng, texts: &Texts, size: usize) -> Result<Drawn> {
        let mut keys = Vec::new();
        let mut needles = Vec::new();
        for _ in 0..self.keys {
            let key = self.key.draw(random, texts)?;
            for _ in 0..self.values {
                needles.push((key.clone(), self.value.draw(random, texts)?));
            }
            keys.push(key);
        }
        let queried = index::sample(random, self.keys, self.queries).into_vec();
        let values = |key: &usize| &needles[key * self.values..(key + 1) * self.values];
        let answers = queried.iter().flat_map(values).map(|(_, value)| value.clone()).collect();
        let queries = queried.iter().map(|&key| keys[key].clone()).collect();

        needles.shuffle(random);
        let places = match self.hay {
            Hay::Essays => {
                let points = index::sample(random, DEPTHS, needles.len());
                let percent = |point: usize| (point as f64 * 100.0 / (DEPTHS - 1) as f64).round();
                let mut depths: Vec<_> = points.iter().map(|p| percent(p) as usize).collect();
                depths.sort_unstable();
                Places::Essays { words: size, depths }
            }
            Hay::Noise | Hay::Needles => {
                let mut before = index::sample(random, size, needles.len()).into_vec();
                before.sort_unstable_by(|a, b| b.cmp(a));
                let lines = (0..size).map(|_| self.line(random, texts)).collect::<Result<_>>()?;
                Places::Lines { lines, before }
            }
        };
        Ok(Drawn { kind: self, needles, queries, answers, places })
    }

    fn line(&self, random: &mut ChaCha8Rng, texts: &Texts) -> Result<String> {
        Ok(match self.hay {
            Hay::Needles => {
                self.needle(&self.key.draw(random, texts)?, &self.value.draw(random, texts)?)
            }
            Hay::Noise | Hay::Essays => NOISE.to_owned(),
        })
    }

    pub fn needle(&self, key: &str, value: &str) -> String {
        format!("One of the special magic {} for {key} is: {value}.", self.value.plural())
    }
}

impl Of {
    fn plural(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }

    fn draw(self, random: &mut ChaCha8Rng, texts: &Texts) -> Result<String> {
        Ok(match self {
            Self::Words => {
                let mut of = |words: &[String]| words[random.random_range(0..words.len())].clone();
                format!("{}-{}", of(texts.adjectives()?), of(texts.nouns()?))
            }
            Self::Numbers => random.random_range(1_000_000..=9_999_999).to_string(),
            Self::Uuids => {
                // Version 4: random but for six bits.
                let bits =
                    random.random::<u128>() & !(0xf << 76) & !(0x3 << 62) | 4 << 76 | 2 << 62;
                let hex = format!("{bits:032x}");
                let [a, b, c, d, e] =
                    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
                format!("{a}-{b}-{c}-{d}-{e}")
            }
        })
    }
}

impl Drawn {
    pub fn write(self, texts: &Texts) -> Result<Sample> {
        let Self { kind, needles, queries, answers, places } = self;
        let needles = needles.iter().map(|(key, value)| kind.needle(key, value));
        let text = match places {
            Places::Essays { words, depths } => {
                among_sentences(&texts.essays()?[..words], &depths, needles)
            }
            Places::Lines { mut lines, before } => {
                for (&at, needle) in before.iter().zip(needles) {
                    lines.insert(at, needle);
                }
                lines.join("\n")
            }
        };
        let query = match &*queries {
            [one] => one.clone(),
            [first @ .., last] => format!("{}, and {last}", first.join(", ")),
            [] => String::new(),
        };
        let plural = kind.value.plural();
        let (what, some, are, are_all) = if kind.queries * kind.values == 1 {
            (&plural[..plural.len() - 1], "A", "is", "is")
        } else {
            (plural, "Some", "are", "are all")
        };
        Ok(Sample {
            context: format!(
                "{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. I will quiz \
                 you about the {what} afterwards.\n{text}\n"
            ),
            question: format!(
                "What {are_all} the special magic {what} for {query} mentioned in the provided text? "
            ),
            answer_prefix: format!(
                "The special magic {what} for {query} mentioned in the provided text {are}"
            ),
            answers,
            max_new_tokens: NEW_TOKENS,
            ..Sample::default()
        })
    }
}

/// Sentences end at marks as in [`Haystack`](crate::Haystack); the generators use NLTK's splitter, which knows abbreviations.
fn among_sentences(
    words: &[String],
    depths: &[usize],
    needles: impl Iterator<Item = String>,
) -> String {
    let sentences: Vec<&[String]> =
        words.split_inclusive(|word| word.ends_with(['.', '?', '!'])).collect();
    let mut text: Vec<String> = Vec::new();
    let mut from = 0;
    for (&depth, needle) in depths.iter().zip(needles) {
        let to = (sentences.len() as f64 * (depth as f64 / 100.0)) as usize;
        text.push(
            sentences[from..to]
                .iter()
                .flat_map(|s| s.iter())
                .cloned()
                .collect::<Vec<_>>()
                .join(" "),
        );
        text.push(needle);
        from = to;
    }
    text.push(
        sentences[from..].iter().flat_map(|s| s.iter()).cloned().collect::<Vec<_>>().join(" "),
    );
    text.join(" ")
}
