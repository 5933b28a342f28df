//! Tasks whose answer is a number among the numbers of a text, compared as strings: 03 is not 3.

use regex::Regex;
use std::sync::LazyLock;

static NUMBER: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\d+").expect("a constant"));
static PARAGRAPH: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?:Paragraph |段落)(\d+)").expect("a constant"));

/// The share of the numbers in `text` that are `reference`.
pub fn count(text: &str, reference: &str) -> f64 {
    let (mut all, mut right) = (0, 0);
    for number in NUMBER.find_iter(text) {
        all += 1;
        right += usize::from(number.as_str() == reference);
    }
    if all == 0 { 0.0 } else { right as f64 / all as f64 }
}

/// The same of the number in `reference`, which is `Paragraph 3` or `段落3`; `None` if it is neither.
pub fn retrieval(text: &str, reference: &str) -> Option<f64> {
    Some(count(text, &PARAGRAPH.captures(reference)?[1]))
}
