//! InfiniteBench (arXiv 2402.13718): how its tasks read an answer, as kvpress has it from the benchmark's own scorers.

use super::token_f1::token_f1;
use super::words;
use regex::Regex;
use std::sync::LazyLock;

/// Whether `reference` is among the words.
pub fn is_word(text: &str, reference: &str) -> bool {
    let text = blank(text, &['\n', ':', '"', '\'', '.', ',', '?', '!', '{', '}']);
    words(&text).any(|word| word == reference)
}

/// Whether the first run of digits is `reference`.
pub fn first_digits(text: &str, reference: &str) -> bool {
    digits(text).next().unwrap_or_default() == reference
}

/// Whether the last word is the number `reference`.
pub fn last_number(text: &str, reference: &str) -> bool {
    let text = blank(text, &['\n', '.', '`', '\'', '"', ':']);
    let last = words(&text).last().and_then(|word| word.parse::<i64>().ok());
    last.is_some() && last == reference.parse().ok()
}

/// Whether the first number is `reference`; a fraction is never a whole number.
pub fn first_number(text: &str, reference: &str) -> bool {
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\d+\.\d+|\d+").expect("a constant"));
    let Some(found) = NUMBER.find(text).map(|found| found.as_str()) else { return false };
    match reference.parse::<i64>() {
        Ok(whole) => found.parse() == Ok(whole),
        Err(_) => found.parse::<f64>().is_ok_and(|found| Ok(found) == reference.parse()),
    }
}

/// The share of the `references` that the text's numbers begin with, in order.
pub fn numbers_in_order(text: &str, references: &[String]) -> f64 {
    let same = digits(text).zip(references).take_while(|(found, wanted)| {
        found.parse::<i64>().is_ok_and(|found| Ok(found) == wanted.parse())
    });
    same.count() as f64 / references.len().max(1) as f64
}

/// Whether one of the `references` stands in the text, whatever the letters' case.
pub fn names_one(text: &str, references: &[String]) -> bool {
    let text = text.to_uppercase();
    references.iter().any(|reference| text.contains(&reference.to_uppercase()))
}

/// The best F1 of words.
pub fn best_f1(text: &str, references: &[String]) -> f64 {
    references.iter().map(|reference| token_f1(text, reference)).fold(0.0, f64::max)
}

/// Whether a text chooses the function that fails: by its letter, of A to J, or its name.
pub fn chooses_function(text: &str, letter: &str, name: &str) -> bool {
    let text = text.trim();
    if lone_letter(text, 'J') == letter.chars().next() {
        return true;
    }
    let text = blank(text, &['\n', '`', '\'', '"', '-', '*']);
    let text = single(&text.replace("Option", " ").replace("option", " "));
    let begins = |text: &str| text.starts_with(letter) || text.starts_with(name);
    begins(&text)
        || after(&text, &["answer is:", "is:", "answer:", "correct option is:"]).is_some_and(begins)
}

/// Whether a text chooses an option of four: by its letter or by its words.
pub fn chooses_option(text: &str, letter: &str, option: &str) -> bool {
    let text = text.trim();
    let label = [option, letter];
    if lone_letter(text, 'D') == letter.chars().next() {
        return true;
    }
    match text.chars().next() {
        None => return false,
        Some(first @ 'A'..='D') => return letter.starts_with(first),
        Some(_) if label.contains(&text) => return true,
        Some(_) => {}
    }
    let text = single(&blank(text, &['\n', '"', '\'', '.', ',', '?', '!', '{', '}']));
    let prefixes = ["answer is:", "answer:", "answer is", "option is"];
    if prefixes.iter().any(|prefix| text.contains(prefix)) {
        return after(&text, &prefixes)
            .is_some_and(|text| label.iter().any(|label| text.starts_with(label)));
    }
    // `in "ABCD"` is true of AB as well.
    words(&text).find(|word| "ABCD".contains(word)).is_some_and(|word| label.contains(&word))
}

/// F1 of characters, without ASCII and Chinese punctuation.
#[cfg(feature = "chinese")]
pub fn best_f1_zh(text: &str, references: &[String]) -> f64 {
    let characters = |text: &str| super::zh::normal(text).chars().collect::<Vec<char>>();
    let text = characters(text);
    let f1 = |reference: &String| super::token_f1::f1(&text, &characters(reference));
    references.iter().map(f1).fold(0.0, f64::max)
}

/// The last letter from A to `last` that stands alone on the first line that has one.
fn lone_letter(text: &str, last: char) -> Option<char> {
    static LETTER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\b[A-J]\b").expect("a constant"));
    let on_line = |line: &str| {
        let letters = LETTER.find_iter(line).filter_map(|found| found.as_str().chars().next());
        letters.filter(|letter| *letter <= last).last()
    };
    text.split('\n').find_map(on_line)
}

/// What stands behind the first of the `prefixes` that the text has, and a character more.
fn after<'t>(text: &'t str, prefixes: &[&str]) -> Option<&'t str> {
    let rest = prefixes.iter().find_map(|prefix| Some(text.split_once(prefix)?.1))?;
    let mut rest = rest.chars();
    rest.next()?;
    Some(rest.as_str())
}

fn digits(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty())
}

fn blank(text: &str, characters: &[char]) -> String {
    text.replace(characters, " ")
}

/// Every run of blanks as one.
fn single(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c != ' ' || !out.ends_with(' ') {
            out.push(c);
        }
    }
    out
}
