//! F1 of words, as SQuAD and LongBench score short answers.

use super::words;
use regex::Regex;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::LazyLock;

/// F1 of the words of `text` and `reference`, without case, ASCII punctuation and articles. 0 if they share none, so also if
/// both are empty.
pub fn token_f1(text: &str, reference: &str) -> f64 {
    let [text, reference] = [text, reference].map(normal);
    let text: Vec<&str> = words(&text).collect();
    let reference: Vec<&str> = words(&reference).collect();
    f1(&text, &reference)
}

fn normal(text: &str) -> String {
    static ARTICLES: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\b(a|an|the)\b").expect("a constant"));
    let text = text.to_lowercase();
    let text: String = text.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    ARTICLES.replace_all(&text, " ").into_owned()
}

pub(super) fn f1<W: Hash + Eq>(text: &[W], reference: &[W]) -> f64 {
    let mut left: HashMap<&W, usize> = HashMap::new();
    for word in reference {
        *left.entry(word).or_default() += 1;
    }
    let mut same = 0;
    for word in text {
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let precision = f64::from(same) / text.len() as f64;
    let recall = f64::from(same) / reference.len() as f64;
    2.0 * precision * recall / (precision + recall)
}
