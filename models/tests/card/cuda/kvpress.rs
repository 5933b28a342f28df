//! Pruned runs on the card against kvpress, in f32.

use crate::common::kvpress::check_rows;
use anyhow::Result;
use models::{CardCache, Mode, cuda, resident};
use paged_kernels::Seats;

#[test]
#[ignore = "needs a CUDA device"]
fn a_text_on_the_card_holds_what_kvpress_leaves_and_gives_its_logits() -> Result<()> {
    let device = cuda()?;
    let open = |shape| {
        let seats = Seats { texts: 1, tokens: 1024, pass: 512, mode: Mode::BatchInvariant };
        Ok(CardCache::new(resident(device, shape, seats)?)?)
    };
    check_rows(device, open, |cache| Ok(cache.resident().lengths(cache.sequence())?))
}
