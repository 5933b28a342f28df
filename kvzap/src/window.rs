use std::ops::Range;

/// The newest tokens that are never judged, as the KVzap paper has it (arXiv 2601.07891, section
/// 3): without them LongBench-LCC falls from 62.5 to 28.4, and 512 are no better.
pub const WINDOW: usize = 128;

/// The positions, out of `total` tokens so far, that have left the window: these are judged.
///
/// The newest `window` tokens always stay, whatever their scores. A token is judged once, when it
/// leaves the window, and the judgement is final. So after `total` tokens exactly those of
/// `judged(total, window)` whose drop bit is set are gone, however the tokens were cut into
/// prefill, steps and bursts. Nothing else is protected: neither the first tokens, nor a least
/// number in each head. A prompt of `window` tokens or fewer stays whole; with `window` 0
/// everything may go.
///
/// ```
/// assert_eq!(kvzap::judged(128, kvzap::WINDOW), 0..0);
/// assert_eq!(kvzap::judged(129, kvzap::WINDOW), 0..1);
/// ```
pub fn judged(total: usize, window: usize) -> Range<usize> {
    0..total.saturating_sub(window)
}
