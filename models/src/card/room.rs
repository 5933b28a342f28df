//! How many pages a card has room for, beside a model and the prompts on their way through it.

use super::{memory, resident};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::paged::cache_shape;
use kvzap::WINDOW;
use paged_kernels::{Dtype, Mode, Resident, Seats};
use tch::{Device, Kind};

/// Tokens of a question at most: a pass of a [`Resident`] cache.
const QUESTION: usize = 8192;
/// Bytes that libraries and buffers of steps take, seldom so much.
const ASIDE: usize = 512 << 20;

/// What a [`CardExecutor`](super::CardExecutor) has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CardRoom {
    /// Pages of all texts.
    pub pages: usize,
    /// Texts at once.
    pub seats: usize,
    /// Texts in one step, up to 64.
    pub batch: usize,
    /// Tokens of a text.
    pub tokens: usize,
    /// Tokens of a question about a text that was read, up to 8192.
    pub question: usize,
    /// Newest tokens that always stay.
    pub window: usize,
    /// What keys and values are stored as.
    pub stored: Dtype,
    /// Ids that may be drawn: models pad their rows beyond the tokenizer.
    pub vocabulary: usize,
    /// What attention promises. [`Mode::BatchInvariant`] makes good what [`Executor`](crate::engine::Executor) promises, bit
    /// for bit; in [`Mode::Fast`] a text's neighbours change the last bits of its scores.
    pub mode: Mode,
}

impl CardRoom {
    /// For up to `batch` texts of `tokens` tokens at a time on the card where the model lies, in `bytes` bytes of keys and
    /// values, or in all that is free beside one prompt on its way.
    ///
    /// # Errors
    /// [`Error::CardMemory`] where not a page a head is left, or fewer than `bytes`.
    pub fn new(
        config: &Config,
        device: Device,
        batch: usize,
        tokens: usize,
        stored: Dtype,
        bytes: Option<usize>,
    ) -> Result<Self> {
        let tokens = tokens.min(config.max_positions);
        let mut shape = cache_shape(config, 1, WINDOW, Kind::BFloat16)?;
        shape.dtype = stored;
        // As many again wait their turn, with what they share.
        let seats = 2 * batch;
        let tables = tables(config, seats, tokens, QUESTION.min(tokens));
        let free =
            memory::free(device)?.saturating_sub(passing(config, tokens, 2) + tables + ASIDE);
        let wanted = bytes.unwrap_or(free).max(shape.pages * shape.page_bytes());
        check(wanted, free)?;
        Ok(Self {
            pages: wanted / shape.page_bytes(),
            seats,
            batch,
            tokens,
            question: QUESTION.min(tokens),
            window: WINDOW,
            stored,
            vocabulary: config.vocab_size,
            mode: Mode::BatchInvariant,
        })
    }
}

/// The text that a card is to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextRoom {
    /// In how many ways it is forgotten, each with pages of its own.
    pub ways: usize,
    /// In how many ways it goes on at once: branches of a marked text share its pages until they write.
    pub at_once: usize,
    /// Tokens that are read at first.
    pub context: usize,
    /// Tokens that may follow them.
    pub more: usize,
    /// Of the context, those that stay in any case.
    pub least: usize,
    /// Newest tokens that always stay.
    pub window: usize,
    /// The dtype of the model.
    pub kind: Kind,
    /// What keys and values are stored as, if not as the model's dtype.
    pub stored: Option<Dtype>,
}

/// A cache for one text and marks in its ways, on the card where its model lies: of as many pages as it can need, or as there is
/// memory for, since what is forgotten needs none.
///
/// # Errors
/// [`Error::CardMemory`] where what stays in any case does not fit.
pub fn text_cache(config: &Config, device: Device, room: TextRoom) -> Result<Resident> {
    let TextRoom { ways, at_once, context, window, kind, .. } = room;
    let tokens = (context + room.more).min(config.max_positions);
    let question = QUESTION.min(tokens);
    // The marks, what goes on from them, and what takes its place.
    let texts = ways + 2 * at_once.max(ways);
    let heads = config.layers * config.kv_heads;
    let mut shape = cache_shape(config, tokens, window, kind)?;
    shape.dtype = room.stored.unwrap_or(shape.dtype);
    // Copies of the pages that a marked text writes to, and what follows.
    let more = tokens.saturating_sub(context) + window;
    shape.pages = ways * shape.pages + at_once * heads * (more.div_ceil(shape.page_size) + 2);
    let size = kind.elt_size_in_bytes();
    let aside = passing(config, context, size) + tables(config, texts, tokens, question) + ASIDE;
    let free = memory::free(device)?.saturating_sub(aside);
    let least = ways * heads * (room.least.min(context).div_ceil(shape.page_size) + 2);
    check(least * shape.page_bytes(), free)?;
    shape.pages = shape.pages.min(free / shape.page_bytes());
    let seats = Seats { texts, tokens, pass: question, mode: Mode::BatchInvariant };
    resident(device, shape, seats)
}

/// Refuses what a card has no memory for.
pub(crate) fn check_memory(device: Device, what: &'static str, wanted: u64) -> Result<()> {
    let free = memory::free(device)? as u64;
    if wanted > free { Err(Error::CardMemory { what, wanted, free }) } else { Ok(()) }
}

fn check(wanted: usize, free: usize) -> Result<()> {
    let (wanted, free) = (wanted as u64, free as u64);
    let what = "keys and values";
    if wanted > free { Err(Error::CardMemory { what, wanted, free }) } else { Ok(()) }
}

/// Bytes of a prompt on its way through a layer, in a dtype of `size` bytes: most of it is the MLP's.
fn passing(config: &Config, tokens: usize, size: usize) -> usize {
    let projected = (config.query_heads + 2 * config.kv_heads) * config.head_dim;
    tokens * size * (4 * config.intermediate_size + 4 * config.hidden_size + 3 * projected)
}

/// Bytes of tables and windows, which a cache has beside its pages.
fn tables(config: &Config, texts: usize, tokens: usize, pass: usize) -> usize {
    4 * config.layers * config.kv_heads * texts * (tokens.div_ceil(16) + WINDOW + pass)
}
