//! A step's tables flattened into the arrays that kernels read.

use crate::book::Book;
use crate::cuda::driver::{HEAD_WORDS, NO_ROW};
use crate::error::Result;
use crate::page::Place;
use crate::table::{PageTable, kept};

/// All layers of a step, as 32-bit words that go to the card in one copy.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub words: Vec<u32>,
    /// Where each layer's arrays begin.
    pub layers: Vec<Layer>,
    /// The sequence of each token.
    pub owners: Range,
    pub sequences: usize,
    /// No sequence has more than one token.
    pub single: bool,
}

/// Pages that are worth a block of their own: one for each of its warps.
const LEAST: usize = 4;

/// A stretch of [`Plan::words`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub first: usize,
    pub words: usize,
}

/// One layer's arrays.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// `[H, sequences]` of a head's record, as kernels/plain.cu has it.
    pub heads: Range,
    /// Pages of all heads, one list after the other.
    pub pages: Range,
    /// `[H, tokens]`: slot of each new token in its head.
    pub slots: Range,
    /// `[H, tokens]`: row of the pool for each new token.
    pub rows: Range,
    /// How blocks share the pages: their number, that of the blocks, and the first head of each block.
    pub shares: Range,
}

impl Plan {
    /// The plan of the step that `book` has begun, for at most `blocks` blocks.
    pub fn of(book: &Book, blocks: usize) -> Result<Self> {
        let mut plan = Self::default();
        let heads = book.heads(0)?;
        plan.single = heads.iter().all(|head| head.tokens.len() <= 1);
        plan.sequences = heads.len() / book.shape.kv_heads;
        let own = heads.iter().take(plan.sequences).enumerate();
        let owners = own.flat_map(|(i, head)| head.tokens.clone().map(move |_| i as u32));
        plan.owners = plan.push(owners.collect::<Vec<_>>());
        for layer in 0..book.shape.layers {
            let heads = book.heads(layer)?;
            let (mut records, mut pages) = (Vec::new(), Vec::new());
            let (mut slots, mut rows) = (Vec::new(), Vec::new());
            for head in &heads {
                let at = pages.len() as u64;
                let (first, tokens) = (head.tokens.start as u32, head.tokens.len() as u32);
                let record: [u32; HEAD_WORDS] =
                    [at as u32, (at >> 32) as u32, head.table.len() as u32, first, tokens, 0];
                records.extend(record);
                // A sequence without a token in the step is not attended, and takes no one's share.
                if tokens > 0 {
                    pages.extend(head.table.pages().iter().map(|page| page.index() as u32));
                }
                slots.extend(head.slots.iter().map(|slot| slot.index() as u32));
                rows.extend(
                    head.slots
                        .iter()
                        .map(|&slot| row(head.table.place(slot), book.shape.page_size)),
                );
            }
            // Records are read 8 bytes at a time.
            if plan.words.len() % 2 == 1 {
                plan.words.push(0);
            }
            let shares = shares(&records, pages.len(), blocks);
            let heads = plan.push(records);
            let (pages, slots, rows) = (plan.push(pages), plan.push(slots), plan.push(rows));
            let shares = plan.push(shares);
            plan.layers.push(Layer { heads, pages, slots, rows, shares });
        }
        Ok(plan)
    }

    fn push(&mut self, words: Vec<u32>) -> Range {
        let range = Range { first: self.words.len(), words: words.len() };
        self.words.extend(words);
        range
    }
}

/// Equal shares of a layer's pages for at most `blocks` blocks: block `b` of `n` takes `pages * b / n` up to
/// `pages * (b + 1) / n` of the heads' concatenated lists.
fn shares(records: &[u32], pages: usize, blocks: usize) -> Vec<u32> {
    let used = blocks.min(pages.div_ceil(LEAST));
    let mut shares = vec![0; 2 + blocks];
    (shares[0], shares[1]) = (pages as u32, used as u32);
    let heads = records.chunks_exact(HEAD_WORDS).enumerate();
    let mut heads = heads.filter(|(_, head)| head[4] > 0).map(|(i, head)| (i, head[0])).peekable();
    let mut current = 0;
    for (block, share) in shares[2..][..used].iter_mut().enumerate() {
        let begin = (pages as u64 * block as u64 / used as u64) as u32;
        while let Some((head, _)) = heads.next_if(|&(_, first)| first <= begin) {
            current = head;
        }
        *share = current as u32;
    }
    shares
}

/// A row counted over all pages; a cache's rows fit 32 bits.
pub fn row(place: Place, page_size: usize) -> u32 {
    (place.page.index() * page_size + place.row) as u32
}

/// `[H, T]`: the row of each token of a prompt, [`NO_ROW`] where it is not kept.
pub fn prompt(tables: &[PageTable], drops: &[bool], window: usize, page_size: usize) -> Vec<u32> {
    let tokens = drops.len() / tables.len();
    let mut rows = vec![NO_ROW; drops.len()];
    for (head, table) in tables.iter().enumerate() {
        let span = head * tokens..(head + 1) * tokens;
        let (drops, rows) = (&drops[span.clone()], &mut rows[span]);
        let pages = table.pages();
        for (slot, token) in kept(drops, window).enumerate() {
            let (page, row_in_page) = (pages[slot / page_size], slot % page_size);
            rows[token] = row(Place { page, row: row_in_page }, page_size);
        }
    }
    rows
}
