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

/// Pages that are worth a block of their own; 2 and 8 measured the same.
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
                let (at, len, tokens) = (pages.len(), head.table.len(), head.tokens.len());
                // A sequence without a token in the step is not attended, and takes no one's share.
                if tokens > 0 {
                    pages.extend(head.table.pages().iter().map(|page| page.index() as u32));
                }
                let (first, kv_head) = (head.tokens.start as u32, head.head as u32);
                records.push([at as u32, len as u32, first, tokens as u32, kv_head, 0, 0, 0]);
                slots.extend(head.slots.iter().map(|slot| slot.index() as u32));
                rows.extend(
                    head.slots
                        .iter()
                        .map(|&slot| row(head.table.place(slot), book.shape.page_size)),
                );
            }
            let shares = shares(&mut records, pages.len(), blocks);
            let heads = plan.push(records.into_flattened());
            let shares = plan.push(shares.into_flattened());
            let (pages, slots, rows) = (plan.push(pages), plan.push(slots), plan.push(rows));
            plan.layers.push(Layer { heads, pages, slots, rows, shares });
        }
        Ok(plan)
    }

    /// Appends an array, where it can be read 16 bytes at a time.
    fn push(&mut self, words: Vec<u32>) -> Range {
        self.words.resize(self.words.len().next_multiple_of(4), 0);
        let range = Range { first: self.words.len(), words: words.len() };
        self.words.extend(words);
        range
    }
}

/// Equal shares of a layer's pages for `blocks` blocks: `Share` of kernels/attend.cuh. Of `n` blocks that get any, block
/// `b` takes `pages * b / n` up to `pages * (b + 1) / n` of the heads' concatenated lists. Notes in each head's record how
/// many share it and where its parts begin.
fn shares(heads: &mut [[u32; HEAD_WORDS]], pages: usize, blocks: usize) -> Vec<[u32; 4]> {
    let used = blocks.min(pages.div_ceil(LEAST));
    let mut shares = vec![[0; 4]; blocks];
    let begin = |block: usize| (pages as u64 * block as u64 / used as u64) as u32;
    let mut block = 0;
    for index in 0..heads.len() {
        let (first, tokens) = (heads[index][0], heads[index][3]);
        let last = heads.get(index + 1).map_or(pages as u32, |next| next[0]);
        if tokens == 0 || first == last {
            continue;
        }
        // The block that owns the first page, whose share may begin within an earlier head.
        let opening = if begin(block) > first { block - 1 } else { block };
        while block < used && begin(block) < last {
            shares[block] = [begin(block), begin(block + 1), index as u32, 0];
            block += 1;
        }
        heads[index][5] = (block - opening) as u32;
        heads[index][6] = 2 * opening as u32 + u32::from(begin(opening) < first);
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
