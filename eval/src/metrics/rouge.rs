//! ROUGE-L of summaries as the Python package `rouge` 1.0.1 computes it, which is not the paper's: over *sets* of words.

use super::words;
use std::collections::HashSet;

/// The deepest recursion that Python allows the package, less what calls it; beyond that it fails, and the score is 0.
const RECURSION: usize = 980;

/// The F score of the union, over pairs of sentences, of the words in their longest common subsequence. Letter case counts,
/// sentences end at full stops. 0 where the package fails: one side is empty, or two sentences together are too long.
pub fn rouge_l(text: &str, reference: &str) -> f64 {
    let (text, reference) = (sentences(text), sentences(reference));
    if text.is_empty() || reference.is_empty() {
        return 0.0;
    }
    let text: Vec<Vec<&str>> = text.iter().map(|s| s.split(' ').collect()).collect();
    let reference: Vec<Vec<&str>> = reference.iter().map(|s| s.split(' ').collect()).collect();
    let mut union = HashSet::new();
    for reference in &reference {
        for text in &text {
            match common(reference, text) {
                Some(words) => union.extend(words),
                None => return 0.0,
            }
        }
    }
    let distinct =
        |sentences: &[Vec<&str>]| sentences.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let precision = union.len() as f64 / distinct(&text);
    let recall = union.len() as f64 / distinct(&reference);
    2.0 * precision * recall / (precision + recall + 1e-8)
}

fn sentences(text: &str) -> Vec<String> {
    let sentences = text.split('.').filter(|s| !s.is_empty());
    sentences.map(|s| words(s).collect::<Vec<_>>().join(" ")).collect()
}

/// The words of a longest common subsequence: of several the one that the package's way back through the table meets.
fn common<'a>(rows: &[&'a str], columns: &[&str]) -> Option<Vec<&'a str>> {
    let width = columns.len() + 1;
    let mut table = vec![0_u32; (rows.len() + 1) * width];
    for (i, row) in rows.iter().enumerate() {
        for (j, column) in columns.iter().enumerate() {
            let at = (i + 1) * width + j + 1;
            table[at] = if row == column {
                table[at - width - 1] + 1
            } else {
                table[at - width].max(table[at - 1])
            };
        }
    }
    let (mut i, mut j, mut steps) = (rows.len(), columns.len(), 0);
    let mut found = Vec::new();
    while i > 0 && j > 0 {
        let at = i * width + j;
        if rows[i - 1] == columns[j - 1] {
            found.push(rows[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if table[at - width] > table[at - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
        steps += 1;
    }
    (steps <= RECURSION).then_some(found)
}
