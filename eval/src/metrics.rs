//! How answers are scored, one metric a file: each from 0 to 1, equal to what kvpress's evaluation computes, faults included.
//!
//! The values to match are Python's, so text is cut and compared as Python does it. No text is an error.

mod boxed;
mod choice;
mod classes;
mod code;
mod difflib;
pub mod infinite;
mod numbers;
mod rouge;
mod ruler;
mod token_f1;
#[cfg(feature = "chinese")]
mod zh;

pub use boxed::{BoxRule, boxed, same_integer};
pub use choice::says_letter;
pub use classes::classes;
pub use code::code_similarity;
pub use numbers::{count, retrieval};
pub use rouge::rouge_l;
pub use ruler::{any_reference, share_of_references};
pub use token_f1::token_f1;
#[cfg(feature = "chinese")]
pub use zh::{rouge_l_zh, token_f1_zh};

/// 100 times the mean, to two digits: how the benchmarks print a task's score. 0 of nothing.
pub fn percent(scores: impl IntoIterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for score in scores {
        sum += score;
        count += 1;
    }
    if count == 0 { 0.0 } else { round(100.0 * sum / f64::from(count), 2) }
}

/// Python's `round`: halves go to the even digit, as seen in the decimal number that is exactly the float.
pub fn round(value: f64, digits: usize) -> f64 {
    format!("{value:.digits$}").parse().unwrap_or(value)
}

/// The words of Python's `str.split()`, which counts four control characters as white space that Unicode does not.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

#[cfg(test)]
mod tests;
