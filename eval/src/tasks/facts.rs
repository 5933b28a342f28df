//! Facts to be scattered in noise, and questions about them: what a training on noisy retrieval draws, and what it is measured by.
//!
//! Keys of one text are alike, for only then is there something to mistake. Training and measuring state facts in the
//! same words, draw other ones, and ask in different words.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::fmt::Write;

/// What the facts are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Two words for each key.
    Keys,
    /// A list of words for each key, asked for whole.
    Lists,
    /// A random UUID for each key.
    Uuids,
    /// Four facts about each key, far apart and asked for at once.
    Several,
    /// Names that take over each other's value.
    Chain,
    /// A table, whole.
    Table,
    /// A person's town, and the town's number: one leads to the other.
    Hops,
}

/// Whose words a question is asked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// Any of those for training.
    Training,
    /// Those that no training sees.
    Measuring,
}

/// Facts and questions about them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Each to stand anywhere, but for those of [`Family::Chain`], which keep their order.
    pub facts: Vec<String>,
    /// What is asked afterwards, each with its cue, and the answer, which begins with a space.
    pub asked: Vec<(String, String)>,
}

const ADJECTIVES: [&str; 24] = [
    "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "idle", "jolly",
    "keen", "lucid", "mellow", "nimble", "opaque", "plain", "quiet", "rapid", "silent", "tidy",
    "upper", "vivid", "warm", "young",
];
const NOUNS: [&str; 24] = [
    "anchor", "bridge", "candle", "dolphin", "engine", "feather", "garden", "harbor", "island",
    "jacket", "kettle", "ladder", "magnet", "needle", "orchard", "pencil", "quarry", "ribbon",
    "saddle", "temple", "umbrella", "valley", "window", "zipper",
];
const VALUES: [&str; 40] = [
    "copper", "marble", "velvet", "cotton", "silver", "timber", "pepper", "ginger", "saffron",
    "barley", "walnut", "maple", "cedar", "willow", "clover", "thistle", "otter", "falcon",
    "badger", "heron", "salmon", "beetle", "spider", "rabbit", "lantern", "hammer", "bucket",
    "mirror", "blanket", "basket", "trumpet", "violin", "drum", "piano", "canyon", "glacier",
    "meadow", "desert", "lagoon", "forest",
];
const COLOURS: [&str; 8] = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey"];
const COLUMNS: [&str; 6] = ["height", "weight", "price", "age", "stock", "rank"];
const SYLLABLES: [&str; 20] = [
    "ba", "den", "fo", "gar", "hil", "ka", "lor", "mi", "nu", "pel", "ra", "sten", "ti", "vo",
    "wen", "zu", "bor", "dal", "kem", "sol",
];

const ASKED: [&str; 8] = [
    "What is {}?",
    "Give {}.",
    "Name {}.",
    "Look up {}.",
    "Which is {}?",
    "I need {}.",
    "Find {} in the text.",
    "The question is {}.",
];
const CUES: [&str; 8] =
    ["Answer:", "A:", "Reply:", "It is", "=>", "Found:", "The text says", "Result:"];
/// A cue that begins the sentence which the answer ends, as RULER's do.
const BEGUN: &str = "{} is";
const MEASURED: (&str, &str) = ("Please tell me {} now.", "Response: {} is");

impl Family {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Keys, Self::Lists, Self::Uuids, Self::Several, Self::Chain, Self::Table, Self::Hops];

    /// A name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keys => "keys",
            Self::Lists => "lists",
            Self::Uuids => "uuids",
            Self::Several => "several",
            Self::Chain => "chain",
            Self::Table => "table",
            Self::Hops => "hops",
        }
    }

    /// Draws facts about `size` things (keys, chains, rows, persons), and `questions` at most.
    pub fn draw(
        self,
        random: &mut ChaCha8Rng,
        size: usize,
        questions: usize,
        words: Words,
    ) -> Facts {
        let keys = keys(random, size.max(1));
        let (facts, mut known) = match self {
            Self::Keys => named(&keys, "code", || listed(random, 2).join("-")),
            Self::Lists => named(&keys, "list", || listed(random, 8).join(" ")),
            Self::Uuids => named(&keys, "serial", || uuid(random)),
            Self::Several => several(random, &keys),
            Self::Chain => chains(random, size.max(1)),
            Self::Table => table(random, &keys),
            Self::Hops => hops(random, size.max(1)),
        };
        known.shuffle(random);
        known.truncate(questions);
        let asked = known.into_iter().map(|(what, answer)| {
            let capital = what[..1].to_uppercase() + &what[1..];
            let question = match words {
                // Half of them only begin the sentence: it stands in the text, which is how looking back is learned.
                Words::Training if random.random::<bool>() => {
                    format!("\n{}", BEGUN.replace("{}", &capital))
                }
                Words::Training => {
                    let (asked, cue) = (*pick(random, &ASKED), *pick(random, &CUES));
                    format!("\n{}\n{cue}", asked.replace("{}", &what))
                }
                Words::Measuring => {
                    format!("\n{}\n{}", MEASURED.0, MEASURED.1).replace("{}", &what)
                }
            };
            (question, format!(" {answer}"))
        });
        Facts { facts, asked: asked.collect() }
    }
}

/// Facts, and for each question what is asked for and its answer.
type Known = (Vec<String>, Vec<(String, String)>);

fn pick<'a, T>(random: &mut ChaCha8Rng, from: &'a [T]) -> &'a T {
    from.choose(random).expect("the lists are not empty")
}

/// Keys made of few words, so that each shares most of itself with others.
fn keys(random: &mut ChaCha8Rng, count: usize) -> Vec<String> {
    let few = 2 + (1.5 * count as f64).sqrt() as usize;
    let adjectives: Vec<&str> = ADJECTIVES.choose_multiple(random, few).copied().collect();
    let nouns: Vec<&str> = NOUNS.choose_multiple(random, few).copied().collect();
    distinct(count, || format!("{}-{}", pick(random, &adjectives), pick(random, &nouns)))
}

/// `count` different texts.
fn distinct(count: usize, mut draw: impl FnMut() -> String) -> Vec<String> {
    let mut all: Vec<String> = Vec::with_capacity(count);
    while all.len() < count {
        let text = draw();
        if !all.contains(&text) {
            all.push(text);
        }
    }
    all
}

fn digits(random: &mut ChaCha8Rng, count: u32) -> String {
    let least = 10u32.pow(count - 1);
    random.random_range(least..10 * least).to_string()
}

fn listed(random: &mut ChaCha8Rng, count: usize) -> Vec<&'static str> {
    (0..count).map(|_| *pick(random, &VALUES)).collect()
}

fn uuid(random: &mut ChaCha8Rng) -> String {
    let hex = format!("{:032x}", random.random::<u128>());
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// A name that no text has.
fn name(random: &mut ChaCha8Rng) -> String {
    let text: String = (0..3).map(|_| *pick(random, &SYLLABLES)).collect();
    text[..1].to_uppercase() + &text[1..]
}

fn named(keys: &[String], what: &str, mut value: impl FnMut() -> String) -> Known {
    let fact = |key: &String| {
        let value = value();
        (format!("The {what} of {key} is {value}."), (format!("the {what} of {key}"), value))
    };
    keys.iter().map(fact).unzip()
}

fn several(random: &mut ChaCha8Rng, keys: &[String]) -> Known {
    let (mut facts, mut known) = Known::default();
    for key in keys {
        let (colour, weight) = (*pick(random, &COLOURS), digits(random, 3));
        let (town, owner) = (name(random), name(random));
        facts.push(format!("The colour of {key} is {colour}."));
        facts.push(format!("The weight of {key} is {weight}."));
        facts.push(format!("The town of {key} is {town}."));
        facts.push(format!("The owner of {key} is {owner}."));
        known.push((
            format!("the colour, weight, town and owner of {key}"),
            format!("{colour}, {weight}, {town}, {owner}"),
        ));
    }
    facts.shuffle(random);
    (facts, known)
}

/// Chains of two to four names, their steps mixed with one another's.
fn chains(random: &mut ChaCha8Rng, count: usize) -> Known {
    let mut open: Vec<Vec<String>> = Vec::new();
    let mut known = Vec::new();
    let names = distinct(4 * count, || {
        (0..3).map(|_| char::from(random.random_range(b'A'..=b'Z'))).collect()
    });
    for names in names.chunks(4) {
        let names = &names[..random.random_range(2..=4)];
        let value = digits(random, 5);
        let mut steps = vec![format!("Let {} be {value}.", names[0])];
        steps.extend(names.windows(2).map(|pair| format!("Let {} be {}.", pair[1], pair[0])));
        steps.reverse(); // to be taken from the end
        open.push(steps);
        known.push((format!("the value of {}", names[names.len() - 1]), value));
    }
    let mut facts = Vec::new();
    while !open.is_empty() {
        let chain = random.random_range(0..open.len());
        facts.extend(open[chain].pop());
        if open[chain].is_empty() {
            open.swap_remove(chain);
        }
    }
    (facts, known)
}

fn table(random: &mut ChaCha8Rng, keys: &[String]) -> Known {
    let mut columns = COLUMNS;
    columns.shuffle(random);
    let columns = &columns[..3];
    let mut table = format!("\n| name | {} |\n", columns.join(" | "));
    let mut known = Vec::new();
    for key in keys {
        let cells: Vec<String> = columns.iter().map(|_| digits(random, 3)).collect();
        let _ = writeln!(table, "| {key} | {} |", cells.join(" | "));
        known.extend(
            columns
                .iter()
                .zip(cells)
                .map(|(column, cell)| (format!("the {column} of {key}"), cell)),
        );
    }
    (vec![table], known)
}

fn hops(random: &mut ChaCha8Rng, count: usize) -> Known {
    let names = distinct(2 * count, || name(random));
    let (mut facts, mut known) = Known::default();
    for pair in names.chunks(2) {
        let (person, town, number) = (&pair[0], &pair[1], digits(random, 5));
        facts.push(format!("{person} lives in {town}."));
        facts.push(format!("The number of {town} is {number}."));
        known.push((format!("the number of the town where {person} lives"), number));
    }
    facts.shuffle(random);
    (facts, known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn drawn(family: Family, seed: u64, words: Words) -> Facts {
        family.draw(&mut ChaCha8Rng::seed_from_u64(seed), 9, 5, words)
    }

    #[test]
    fn every_answer_stands_in_the_facts_and_draws_repeat() {
        for family in Family::ALL {
            let facts = drawn(family, 1, Words::Training);
            assert_eq!(facts, drawn(family, 1, Words::Training));
            assert_ne!(facts.facts, drawn(family, 2, Words::Training).facts);
            assert_eq!(facts.asked.len(), 5);
            let text = facts.facts.join(" ");
            for (question, answer) in &facts.asked {
                assert!(
                    answer[1..].split(", ").all(|part| text.contains(part)),
                    "{question}{answer}"
                );
            }
        }
    }

    #[test]
    fn what_is_measured_is_asked_in_words_that_training_does_not_have() {
        for family in Family::ALL {
            for (question, _) in drawn(family, 1, Words::Measuring).asked {
                assert!(
                    question.starts_with("\nPlease tell me the ")
                        && question.contains("now.\nResponse: the ")
                );
            }
            for (question, _) in drawn(family, 1, Words::Training).asked {
                assert!(
                    !question.contains("Please") && !question.contains("Response"),
                    "{question}"
                );
            }
        }
    }

    #[test]
    fn a_chain_hands_a_value_on_only_after_it_has_it() {
        let facts = drawn(Family::Chain, 3, Words::Training).facts;
        let place =
            |name: &str| facts.iter().position(|f| f.starts_with(&format!("Let {name} be")));
        let handed =
            facts.iter().enumerate().filter(|(_, f)| f.as_bytes()[11].is_ascii_uppercase());
        let mut count = 0;
        for (at, fact) in handed {
            assert!(place(&fact[11..14]).unwrap() < at, "{facts:?}");
            count += 1;
        }
        assert!(count >= 9, "each chain hands on at least once");
    }

    #[test]
    fn keys_are_alike_and_different() {
        let keys = keys(&mut ChaCha8Rng::seed_from_u64(1), 64);
        let first: std::collections::HashSet<&str> =
            keys.iter().map(|k| k.split('-').next().unwrap()).collect();
        assert!(first.len() <= 11 && keys.len() == 64);
    }
}
