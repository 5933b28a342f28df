//! RULER's string match, in kvpress's form: control characters are deleted, where RULER puts line ends.

use super::is_space;

/// The share of `references` that stand in `text`, letter case ignored: all of RULER's tasks but question answering.
pub fn share_of_references<S: AsRef<str>>(text: &str, references: &[S]) -> f64 {
    let found = found(text, references);
    if references.is_empty() { 0.0 } else { found as f64 / references.len() as f64 }
}

/// 1 if any of `references` stands in `text`, letter case ignored: RULER's question answering.
pub fn any_reference<S: AsRef<str>>(text: &str, references: &[S]) -> f64 {
    f64::from(found(text, references) > 0)
}

fn found<S: AsRef<str>>(text: &str, references: &[S]) -> usize {
    let text: String = text.trim_matches(is_space).chars().filter(|c| *c > '\x1f').collect();
    let text = text.to_lowercase();
    references.iter().filter(|r| text.contains(&r.as_ref().to_lowercase())).count()
}
