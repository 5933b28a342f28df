//! Answers in a box: `\boxed{70}`.

/// Which of kvpress's rules finds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BoxRule {
    /// Up to the first closing brace; all of the text where there is no box. The published AIME scores are made so.
    #[value(name = "0.5.4")]
    V054,
    /// Up to the brace that closes it; none where there is no whole box.
    #[default]
    #[value(name = "0.5.5")]
    V055,
}

/// What stands in the last box of `text`, or with `last` false in the first.
pub fn boxed(text: &str, rule: BoxRule, last: bool) -> Option<&str> {
    const OPEN: &str = "boxed{";
    let at = if last { text.rfind(OPEN) } else { text.find(OPEN) };
    match rule {
        BoxRule::V054 => {
            let inside = at.map_or(text, |at| &text[at + OPEN.len()..]);
            inside.split('}').next()
        }
        BoxRule::V055 => {
            let inside = &text[at? + OPEN.len()..];
            let mut depth = 1;
            for (at, c) in inside.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    return Some(&inside[..at]);
                }
            }
            None
        }
    }
}

/// Whether both are the same integer, however they write it: `016` and ` 16 `. kvpress compares strings.
pub fn same_integer(text: &str, reference: &str) -> bool {
    let parse = |text: &str| text.trim().parse::<i64>().ok();
    parse(text).is_some() && parse(text) == parse(reference)
}
