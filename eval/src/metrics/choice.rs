//! LongBench-v2: one letter of four.

use regex::Regex;
use std::sync::LazyLock;

/// The letter of `The correct answer is (B)`, with parentheses first, else without; asterisks do not count.
pub fn letter(text: &str) -> Option<char> {
    static RULES: LazyLock<[Regex; 2]> = LazyLock::new(|| {
        [r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"]
            .map(|rule| Regex::new(rule).expect("a constant"))
    });
    let text = text.replace('*', "");
    RULES.iter().find_map(|rule| rule.captures(&text)?[1].chars().next())
}
