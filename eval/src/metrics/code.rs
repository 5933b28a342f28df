//! How alike two lines of code are.

use super::difflib::ratio;
use super::round;

/// The likeness of the first line of `text` that has no back tick, `#` or `//` to `reference`, to two digits: `fuzz.ratio` of
/// fuzzywuzzy without python-Levenshtein.
pub fn code_similarity(text: &str, reference: &str) -> f64 {
    let comment = |line: &&str| line.contains('`') || line.contains('#') || line.contains("//");
    let mut lines = text.trim_start_matches('\n').split('\n');
    let line = lines.find(|line| !comment(line)).unwrap_or_default();
    if line == reference {
        return 1.0;
    }
    if line.is_empty() || reference.is_empty() {
        return 0.0;
    }
    round(100.0 * ratio(line, reference), 0) / 100.0
}
