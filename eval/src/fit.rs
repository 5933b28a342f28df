//! How much fits into a prompt of so many tokens.

use anyhow::Result;

/// The largest size from `least` to `most` that `tokens` finds to take no more than `limit`; `None` if not even `least` does.
///
/// Prompts grow about evenly with their size, so that the next guess is on the line through the last two bounds; a tokenizer
/// reads them whole each time.
pub fn largest(
    least: usize,
    most: usize,
    limit: usize,
    tokens: &mut dyn FnMut(usize) -> Result<usize>,
) -> Result<Option<usize>> {
    let (mut low, mut low_tokens) = (least, tokens(least)?);
    if low_tokens > limit {
        return Ok(None);
    }
    let (mut high, mut high_tokens) = (most.max(least) + 1, None);
    // What one more unit takes; before it is known, enough that the first guess is a cheap one.
    let mut each = 32.0;
    while low + 1 < high {
        let line = high_tokens.map_or(each, |high_tokens: usize| {
            (high_tokens - low_tokens) as f64 / (high - low) as f64
        });
        let ahead = ((limit - low_tokens) as f64 / line.max(1e-9)) as usize;
        // Each bound moves by an eighth of what is between them at least.
        let margin = (high - low) / 8;
        let guess = if high_tokens.is_some() {
            (low + ahead).clamp(low + margin.max(1), (high - margin.max(1)).max(low + 1))
        } else {
            (low + ahead.max(1)).min(high - 1)
        };
        let found = tokens(guess)?;
        if found <= limit {
            each = (found.saturating_sub(low_tokens)) as f64 / (guess - low) as f64;
            each = each.max(0.01);
            (low, low_tokens) = (guess, found);
        } else {
            (high, high_tokens) = (guess, Some(found));
        }
    }
    Ok(Some(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found_in_few_steps() {
        for (unit, base, limit, least, most) in [
            (7, 100, 2000, 1, 10_000),
            (1, 0, 50, 1, 40),
            (400, 10, 131_072, 2, 70_000),
            (3, 0, 9, 3, 3),
        ] {
            let mut calls = 0;
            let mut tokens = |size: usize| {
                calls += 1;
                Ok(base + unit * size + size % 3) // not quite even
            };
            let found = largest(least, most, limit, &mut tokens).unwrap().unwrap();
            assert!(base + unit * found + found % 3 <= limit && found >= least && found <= most);
            let next = found + 1;
            assert!(next > most || base + unit * next + next % 3 > limit, "{found}");
            assert!(calls <= 14, "{calls} calls");
        }
        assert_eq!(largest(5, 9, 10, &mut |size| Ok(3 * size)).unwrap(), None);
    }
}
