//! Common words: ten words of a numbered list appear more often than the others.

use crate::task::Sample;
use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

const NEW_TOKENS: usize = 120;
pub const COMMON: usize = 10;

/// What chance decided, and the solved example that stands in front.
pub struct Drawn {
    pub example: List,
    pub list: List,
}

/// A list of words, some of them often in it.
pub struct List {
    pub common: Vec<String>,
    /// All of it, in its order.
    pub words: Vec<String>,
}

impl Drawn {
    /// `short` is RULER's choice of counts for prompts of less than 4,096 tokens.
    pub fn new(random: &mut ChaCha8Rng, words: &[String], size: usize, short: bool) -> Self {
        let (example, often) = if short { ([20, 3, 1], [6, 1]) } else { ([40, 10, 3], [30, 3]) };
        Self {
            example: List::new(random, words, example),
            list: List::new(random, words, [size, often[0], often[1]]),
        }
    }

    pub fn write(&self) -> Sample {
        let [context, question, prefix] = self.example.parts();
        let answer = numbered(&self.example.common);
        let example = format!("{context}{question}{prefix}{answer}\n");
        let [context, question, answer_prefix] = self.list.parts();
        Sample {
            context: example + &context,
            question,
            answer_prefix,
            answers: self.list.common.clone(),
            max_new_tokens: NEW_TOKENS,
            ..Sample::default()
        }
    }
}

impl List {
    fn new(random: &mut ChaCha8Rng, words: &[String], [size, often, rarely]: [usize; 3]) -> Self {
        let drawn: Vec<String> = index::sample(random, words.len(), size.min(words.len()))
            .iter()
            .map(|at| words[at].clone())
            .collect();
        let (common, uncommon) = drawn.split_at(COMMON);
        let mut words = Vec::new();
        for (group, times) in [(common, often), (uncommon, rarely)] {
            (0..times).for_each(|_| words.extend_from_slice(group));
        }
        words.shuffle(random);
        Self { common: common.to_vec(), words }
    }

    fn parts(&self) -> [String; 3] {
        [
            format!(
                "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones \
                 that appear most often.\n{}\n",
                numbered(&self.words)
            ),
            "Question: What are the 10 most common words in the above list? ".to_owned(),
            "Answer: The top 10 words that appear most often in the list are:".to_owned(),
        ]
    }
}

fn numbered(words: &[String]) -> String {
    let words = words.iter().zip(1..).map(|(word, number)| format!("{number}. {word}"));
    words.collect::<Vec<_>>().join(" ")
}
