//! A step's tables flattened into the arrays that kernels read.

use crate::book::Book;
use crate::cuda::driver::NO_ROW;
use crate::cuda::driver::attend::HEAD_WORDS;
use crate::error::Result;
use crate::page::{Move, Place};
use crate::table::{PageTable, kept};
use std::collections::BTreeSet;

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

/// Rows of a page that the fast kernels take at once: `SLAB` of kernels/attend.cuh.
pub const SLAB: usize = 16;
/// Slabs that are worth a block of their own: two for each of its warps.
const LEAST: usize = 16;
/// Slabs that a block could attend in the time that it loses with a second head.
const SECOND_HEAD: u32 = 8;

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
    /// How blocks share the slabs: `[blocks]` of `Share` in kernels/attend.cuh.
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
            let mut slabs = 0;
            for head in &heads {
                let (table, len, tokens) = (pages.len(), head.table.len(), head.tokens.len());
                let (at, table) = (slabs as u32, table as u32);
                // A sequence without a token in the step is not attended, and takes no one's share.
                if tokens > 0 {
                    pages.extend(head.table.pages().iter().map(|page| page.index() as u32));
                    slabs += len.div_ceil(SLAB);
                }
                let (first, kv_head) = (head.tokens.start as u32, head.head as u32);
                // Nor is there anything of it between one slab and the next.
                let len = if tokens > 0 { len as u32 } else { 0 };
                let tokens = tokens as u32;
                records.push([at, len, first, tokens, kv_head, 0, 0, table]);
                slots.extend(head.slots.iter().map(|slot| slot.index() as u32));
                rows.extend(
                    head.slots
                        .iter()
                        .map(|&slot| row(head.table.place(slot), book.shape.page_size)),
                );
            }
            let shares = shares(&mut records, slabs, blocks);
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

/// Shares of a layer's slabs for `blocks` blocks: `Share` of kernels/attend.cuh. Notes in each head's record how many
/// share it and where its parts begin.
///
/// Equal shares, whatever heads they cut, unless a cut at each head makes the largest no more than [`SECOND_HEAD`] larger.
pub fn shares(heads: &mut [[u32; HEAD_WORDS]], slabs: usize, blocks: usize) -> Vec<[u32; 4]> {
    let mut lengths = Vec::new(); // index, first slab and slabs of each head that is attended
    for (index, head) in heads.iter().enumerate().filter(|(_, head)| head[3] > 0) {
        let next = heads.get(index + 1).map_or(slabs as u32, |next| next[0]);
        lengths.push((index, head[0], next - head[0]));
    }
    let equal = (slabs.div_ceil(blocks)).max(LEAST) as u32;
    let cut = |most: u32| lengths.iter().map(|head| head.2.div_ceil(most) as usize).sum::<usize>();
    let mut shares = Vec::with_capacity(blocks);
    match (equal..=equal + SECOND_HEAD).find(|&most| cut(most) <= blocks) {
        Some(most) => {
            for (index, first, slabs) in lengths {
                let parts = slabs.div_ceil(most);
                heads[index][5] = parts;
                heads[index][6] = 2 * shares.len() as u32;
                let begin = |part: u32| {
                    first + (u64::from(slabs) * u64::from(part) / u64::from(parts)) as u32
                };
                let block = shares.len() as u32;
                let share = |part| [begin(part), begin(part + 1), index as u32, 2 * (block + part)];
                shares.extend((0..parts).map(share));
            }
        }
        None => {
            let used = blocks.min(slabs.div_ceil(LEAST));
            let begin = |block: usize| (slabs as u64 * block as u64 / used as u64) as u32;
            for (index, first, slabs) in lengths {
                // The block that owns the first slab, whose share may begin within an earlier head.
                let next = shares.len();
                let opening = if begin(next) > first { next - 1 } else { next };
                while shares.len() < used && begin(shares.len()) < first + slabs {
                    let block = shares.len();
                    shares.push([begin(block), begin(block + 1), index as u32, 2 * block as u32]);
                }
                heads[index][5] = (shares.len() - opening) as u32;
                heads[index][6] = 2 * opening as u32 + u32::from(begin(opening) < first);
            }
        }
    }
    shares.resize(blocks, [0; 4]);
    shares
}

/// A row counted over all pages; a cache's rows fit 32 bits.
pub fn row(place: Place, page_size: usize) -> u32 {
    (place.page.index() * page_size + place.row) as u32
}

/// Moves as pairs of rows, in runs within which no row stands twice: a kernel carries out a run at once, and a page that
/// one table gives back may be another's copy the next moment.
pub fn apart(moves: &[Move], page_size: usize) -> Vec<Vec<u32>> {
    let (mut runs, mut seen) = (Vec::new(), BTreeSet::new());
    for step in moves {
        let pair = [step.from, step.to].map(|place| row(place, page_size));
        if runs.is_empty() || pair.iter().any(|row| seen.contains(row)) {
            runs.push(Vec::new());
            seen.clear();
        }
        seen.extend(pair);
        if let Some(run) = runs.last_mut() {
            run.extend(pair);
        }
    }
    runs
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::CacheShape;
    use proptest::prelude::*;

    /// The kernels find the next head where the slabs of the one before end, by its length.
    #[test]
    fn a_text_that_rests_lies_between_no_slabs() -> Result<()> {
        let (layers, kv_heads, head_dim, page_size) = (1, 2, 16, 16);
        let (query_heads, window, pages) = (2, 8, 100);
        let dtype = crate::Dtype::Bf16;
        let mut book = Book::new(CacheShape {
            layers,
            kv_heads,
            query_heads,
            head_dim,
            page_size,
            window,
            pages,
            dtype,
        })?;
        let mut step = Vec::new();
        for (text, tokens) in [(0, 40), (1, 300), (2, 20), (3, 200)] {
            let sequence = book.allocate();
            let shape = [kv_heads, tokens, head_dim];
            book.fill(sequence, 0, shape, shape, &vec![false; kv_heads * tokens])?;
            step.push((sequence, 1 - text % 2));
        }
        book.begin_step(&step)?;
        let plan = Plan::of(&book, 4)?;
        let Range { first, words } = plan.layers[0].heads;
        let heads = plan.words[first..][..words].as_chunks::<HEAD_WORDS>().0;
        for pair in heads.windows(2) {
            let [slabs, len, ..] = pair[0];
            assert_eq!(pair[1][0], slabs + len.div_ceil(SLAB as u32));
        }
        assert_eq!(heads.len(), kv_heads * step.len());
        Ok(())
    }

    /// Pages of each head, and whether it has a token in the step; without, it has no pages in the list.
    fn heads() -> impl Strategy<Value = Vec<(u32, bool)>> {
        let pages = prop_oneof![1..4u32, 1..40u32, 1..2000u32];
        prop::collection::vec((pages, prop::bool::weighted(0.9)), 1..40)
    }

    proptest! {
        #[test]
        fn runs_of_moves_keep_their_order_and_touch_no_row_twice(rows in prop::collection::vec((0..40usize, 0..40usize), 0..60)) {
            let place = |row: usize| Place { page: crate::page::PageId((row / 4) as u32), row: row % 4 };
            let moves = rows.iter().filter(|(from, to)| from != to);
            let moves = moves.map(|&(from, to)| Move { from: place(from), to: place(to) });
            let moves = moves.collect::<Vec<_>>();
            let runs = apart(&moves, 4);
            let all = moves.iter().flat_map(|step| [row(step.from, 4), row(step.to, 4)]);
            prop_assert_eq!(runs.concat(), all.collect::<Vec<_>>());
            for run in runs {
                let rows = run.iter().collect::<BTreeSet<_>>();
                prop_assert!(!run.is_empty() && rows.len() == run.len());
            }
        }

        #[test]
        fn shares_cover_every_page_once_and_parts_name_their_blocks(heads in heads(), blocks in 1..140usize) {
            let (mut records, mut pages) = (Vec::new(), 0);
            for &(count, stepped) in &heads {
                records.push([pages, count * 16, 0, u32::from(stepped), 0, 0, 0, 0]);
                pages += if stepped { count } else { 0 };
            }
            let shares = shares(&mut records, pages as usize, blocks);
            prop_assert_eq!(shares.len(), blocks);

            // Walk each block as the kernel does, and note the parts of each head.
            let (mut at, mut parts) = (0, vec![Vec::new(); heads.len()]);
            for (block, &[begin, end, head, part]) in shares.iter().enumerate().filter(|(_, s)| s[0] < s[1]) {
                prop_assert_eq!((begin, part), (at, 2 * block as u32));
                let mut head = head as usize;
                while at < end {
                    while !heads[head].1 {
                        head += 1;
                    }
                    let last = records[head][0] + heads[head].0;
                    prop_assert!(records[head][0] <= at && at < last);
                    parts[head].push(2 * block as u32 + u32::from(at != begin));
                    at = last.min(end);
                    head += 1;
                }
            }
            prop_assert_eq!(at, pages);
            for (record, parts) in records.iter().zip(parts).filter(|(record, _)| record[3] > 0) {
                prop_assert_eq!(record[5] as usize, parts.len());
                prop_assert_eq!(record[6], parts[0]);
                for (i, part) in parts.iter().enumerate().skip(1) {
                    prop_assert_eq!(*part, record[6] / 2 * 2 + 2 * i as u32);
                }
            }
            // No block has more than an equal share and what a second head costs.
            let most = shares.iter().map(|share| share[1] - share[0]).max().unwrap_or(0);
            prop_assert!(most <= (pages.div_ceil(blocks as u32)).max(LEAST as u32) + SECOND_HEAD);
        }
    }
}
