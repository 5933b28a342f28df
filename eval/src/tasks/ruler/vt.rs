//! Variable tracking: one value is handed from name to name, between lines of noise; find all five names.

use super::texts::NOISE;
use crate::fit;
use crate::task::Sample;
use anyhow::Result;
use rand::Rng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;

const NEW_TOKENS: usize = 30;
const HOPS: usize = 4;
/// Lines of noise: one more than assignments.
pub const LEAST: usize = HOPS + 2;

/// What chance decided.
#[derive(Clone)]
pub struct Drawn {
    pub names: Vec<String>,
    pub value: String,
    pub lines: usize,
    /// The lines of noise before which the assignments stand, rising.
    pub before: Vec<usize>,
}

/// The solved example that stands in front.
pub struct Example(Drawn);

impl Drawn {
    pub fn new(random: &mut ChaCha8Rng, lines: usize, letters: usize) -> Self {
        let names = names(random, letters);
        let value = random.random_range(10_000..99_999).to_string();
        let mut before = index::sample(random, lines, names.len()).into_vec();
        before.sort_unstable();
        Self { names, value, lines, before }
    }

    /// The prompt, after a solved one.
    pub fn write(&self, example: Option<Self>) -> Sample {
        let example = example.map_or_else(String::new, |example| {
            let [context, question, prefix] = example.parts();
            format!(" {context}{question}{prefix} {}\n\n\n\n", example.names.join(" "))
        });
        let [context, question, answer_prefix] = self.parts();
        Sample {
            context: example + &context,
            question,
            answer_prefix,
            answers: self.names.clone(),
            max_new_tokens: NEW_TOKENS,
            ..Sample::default()
        }
    }

    fn parts(&self) -> [String; 3] {
        let Self { names, value, lines, before } = self;
        let noise = format!("{NOISE}\n");
        let mut text = vec![noise; *lines];
        let mut given = value.clone();
        for (place, (name, at)) in names.iter().zip(before).enumerate() {
            let space = if place == 0 { "" } else { " " };
            text.insert(at + place, format!("VAR {name} = {given}{space}"));
            given = format!("VAR {name}");
        }
        [
            format!(
                "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}\n",
                text.join(" ").replace(". \n", ".\n")
            ),
            format!(
                "Question: Find all variables that are assigned the value {value} in the text above. "
            ),
            // The spelling is RULER's.
            format!(
                "Answer: According to the chain(s) of variable assignment in the text above, {} variables are assgined the \
                 value {value}, they are: ",
                names.len()
            ),
        ]
    }
}

impl Example {
    /// Of at most 500 tokens, answer included, in steps of five lines.
    pub fn new(random: &mut ChaCha8Rng, count: &dyn Fn(&str) -> Result<usize>) -> Result<Self> {
        let mut tokens = |fives: usize| {
            let drawn = Drawn::new(&mut random.clone(), 5 * fives, 3);
            Ok(count(&drawn.parts().concat())? + count(&drawn.names.join(" "))? + NEW_TOKENS)
        };
        let fives = fit::largest(2, 100, 500, &mut tokens)?.unwrap_or(2);
        Ok(Self(Drawn::new(random, 5 * fives, 3)))
    }

    pub fn with_new_names(&self, random: &mut ChaCha8Rng) -> Drawn {
        Drawn { names: names(random, 3), ..self.0.clone() }
    }
}

fn names(random: &mut ChaCha8Rng, letters: usize) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    while names.len() <= HOPS {
        let name: String = (0..letters).map(|_| random.random_range('A'..='Z')).collect();
        if name != "VAR" && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}
