//! LongBench-v2: one letter of four.

/// Whether a text says that the correct answer is (B), in parentheses or not; asterisks do not count.
pub fn says_letter(text: &str, letter: &str) -> bool {
    let text = text.replace('*', "");
    [format!("({letter})"), letter.to_owned()]
        .iter()
        .any(|letter| text.contains(&format!("The correct answer is {letter}")))
}
