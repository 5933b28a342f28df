//! The bookkeeping that all backends share: sequences, their tables, the pool and the step under way.

use crate::error::{Error, Result};
use crate::filled::Filled;
use crate::page::{Move, Slot};
use crate::pool::PagePool;
use crate::shape::{CacheShape, Stats};
use crate::table::{PageTable, kept};
use crate::view::{check_length, check_shape};
use std::collections::BTreeSet;
use std::ops::Range;

/// A handle to one text in a cache. Once released it is refused, also when its place is taken by another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence {
    index: usize,
    generation: u64,
}

/// Where everything lies, without the memory itself. Calls either change all that they promise or nothing.
#[derive(Debug)]
pub struct Book {
    pub shape: CacheShape,
    pub pool: PagePool,
    places: Vec<Option<Text>>,
    vacant: Vec<usize>,
    allocated: u64,
    step: Option<Step>,
}

#[derive(Debug)]
struct Text {
    generation: u64,
    /// `[layers, H]`.
    tables: Vec<PageTable>,
    filled: Filled,
}

/// A text without its pages: its tables name those that it had.
#[derive(Debug, Clone)]
pub struct Shelved {
    tables: Vec<PageTable>,
    filled: Filled,
}

impl Shelved {
    pub fn pages(&self) -> usize {
        self.tables.iter().map(|table| table.pages().len()).sum()
    }
}

#[derive(Debug)]
struct Step {
    /// Each sequence and its tokens' range in `0..tokens`.
    entries: Vec<(Sequence, Range<usize>)>,
    tokens: usize,
    /// `[layers, H, tokens]`.
    slots: Vec<Slot>,
    appended: Vec<bool>,
}

/// What one step does in one head of one sequence.
#[derive(Debug, Clone)]
pub struct StepHead<'a> {
    pub head: usize,
    /// The sequence's tokens in the step's views.
    pub tokens: Range<usize>,
    /// Slot of each of these tokens.
    pub slots: &'a [Slot],
    pub table: &'a PageTable,
}

#[cfg(feature = "cuda")]
impl Sequence {
    pub(crate) fn at(index: usize, generation: u64) -> Self {
        Self { index, generation }
    }

    pub(crate) fn index(self) -> usize {
        self.index
    }
}

impl Book {
    pub fn new(shape: CacheShape) -> Result<Self> {
        shape.check()?;
        let pool = PagePool::new(shape.pages);
        Ok(Self { shape, pool, places: Vec::new(), vacant: Vec::new(), allocated: 0, step: None })
    }

    pub fn allocate(&mut self) -> Sequence {
        let generation = self.allocated;
        self.allocated += 1;
        let CacheShape { layers, kv_heads, page_size, .. } = self.shape;
        let text = Text {
            generation,
            tables: vec![PageTable::new(page_size); layers * kv_heads],
            filled: Filled::none(layers),
        };
        let index = self.vacant.pop().unwrap_or(self.places.len());
        if index == self.places.len() {
            self.places.push(None);
        }
        self.places[index] = Some(text);
        Sequence { index, generation }
    }

    /// A second text that goes on from where `sequence` is, in the same pages.
    pub fn fork(&mut self, sequence: Sequence) -> Result<Sequence> {
        self.check_finished()?;
        let text = self.text(sequence)?;
        let (tables, filled) = (text.tables.clone(), text.filled.clone());
        tables.iter().try_for_each(|table| table.share(&mut self.pool))?;
        let fork = self.allocate();
        if let Some(text) = &mut self.places[fork.index] {
            (text.tables, text.filled) = (tables, filled);
        }
        Ok(fork)
    }

    fn text(&self, sequence: Sequence) -> Result<&Text> {
        match self.places.get(sequence.index) {
            Some(Some(text)) if text.generation == sequence.generation => Ok(text),
            _ => Err(Error::UnknownSequence),
        }
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        let layers = self.shape.layers;
        if layer < layers { Ok(()) } else { Err(Error::Layer { found: layer, layers }) }
    }

    /// `[layers, H]`.
    pub fn tables(&self, sequence: Sequence) -> Result<&[PageTable]> {
        Ok(&self.text(sequence)?.tables)
    }

    /// The same, if no step is under way.
    pub fn finished(&self, sequence: Sequence) -> Result<&[PageTable]> {
        self.check_finished()?;
        self.tables(sequence)
    }

    /// Gives a text's pages back and keeps the rest of it.
    pub fn shelve(&mut self, sequence: Sequence) -> Result<Shelved> {
        let text = self.text(sequence)?;
        let shelved = Shelved { tables: text.tables.clone(), filled: text.filled.clone() };
        self.release(sequence)?;
        Ok(shelved)
    }

    /// Gives it as many pages again, in the same order.
    pub fn unshelve(&mut self, shelved: &Shelved) -> Result<Sequence> {
        self.pool.admit(shelved.pages())?;
        let mut tables = shelved.tables.clone();
        tables.iter_mut().try_for_each(|table| table.replace(&mut self.pool))?;
        let sequence = self.allocate();
        if let Some(text) = &mut self.places[sequence.index] {
            (text.tables, text.filled) = (tables, shelved.filled.clone());
        }
        Ok(sequence)
    }

    /// The tables of one layer, `[H]`.
    pub fn layer(&self, sequence: Sequence, layer: usize) -> Result<&[PageTable]> {
        self.check_layer(layer)?;
        let heads = self.shape.kv_heads;
        Ok(&self.tables(sequence)?[layer * heads..][..heads])
    }

    fn rows(&self) -> usize {
        self.places.iter().flatten().flat_map(|text| &text.tables).map(PageTable::len).sum()
    }

    /// What is in use; a backend knows what it has reserved.
    pub fn stats(&self) -> Stats {
        let Self { pool, shape, .. } = self;
        Stats {
            pages_used: pool.used(),
            pages_free: pool.free(),
            pages_peak: pool.peak(),
            bytes: pool.used() * shape.page_bytes(),
            peak_bytes: pool.peak() * shape.page_bytes(),
            reserved_bytes: 0,
            rows: self.rows(),
        }
    }

    /// Plans a prefill of one layer, given the shapes of `keys` and `values`; token `i` of a head gets the slot of its
    /// rank among [`kept`].
    pub fn fill(
        &mut self,
        sequence: Sequence,
        layer: usize,
        keys: [usize; 3],
        values: [usize; 3],
        drops: &[bool],
    ) -> Result<()> {
        let text = self.text(sequence)?;
        self.check_layer(layer)?;
        let CacheShape { kv_heads, head_dim, page_size, window, .. } = self.shape;
        let [_, tokens, _] = keys;
        check_shape("keys", keys, [kv_heads, tokens, head_dim])?;
        check_shape("values", values, [kv_heads, tokens, head_dim])?;
        check_length("drops", drops.len(), kv_heads * tokens)?;
        text.filled.check(layer, tokens)?;
        let heads = (0..kv_heads).map(|head| &drops[head * tokens..][..tokens]);
        let pages = |drops| kept(drops, window).count().div_ceil(page_size);
        self.pool.admit(heads.clone().map(pages).sum())?;

        // `text` found it.
        let Some(text) = &mut self.places[sequence.index] else {
            return Err(Error::UnknownSequence);
        };
        let tables = &mut text.tables[layer * kv_heads..][..kv_heads];
        for (table, drops) in tables.iter_mut().zip(heads) {
            table.fill(&mut self.pool, window, drops)?;
        }
        text.filled.fill(layer, tokens);
        Ok(())
    }

    /// Pages that a step takes beyond those held.
    pub fn wanted(&self, step: &[(Sequence, usize)]) -> Result<usize> {
        self.check_finished()?;
        let mut seen = BTreeSet::new();
        let mut wanted = 0usize;
        for &(sequence, tokens) in step {
            let text = self.text(sequence)?;
            if !seen.insert(sequence) {
                return Err(Error::SequenceTwice);
            }
            text.filled.check_step()?;
            let window = self.shape.window;
            let pages = text.tables.iter().map(|table| table.wanted(&self.pool, window, tokens));
            wanted = pages.fold(wanted, usize::saturating_add);
        }
        Ok(wanted)
    }

    /// Plans a step of all layers. The moves must be carried out before anything is written.
    pub fn begin_step(&mut self, step: &[(Sequence, usize)]) -> Result<Vec<Move>> {
        let CacheShape { layers, kv_heads, window, .. } = self.shape;
        let wanted = self.wanted(step)?;
        self.pool.admit(wanted)?;

        let mut total = 0;
        let mut entries = Vec::with_capacity(step.len());
        for &(sequence, tokens) in step {
            entries.push((sequence, total..total + tokens));
            total += tokens;
        }
        let mut slots = Vec::with_capacity(layers * kv_heads * total);
        let mut moves = Vec::new();
        for table in 0..layers * kv_heads {
            for (sequence, range) in &entries {
                let Some(text) = &mut self.places[sequence.index] else { continue };
                let table = &mut text.tables[table];
                table.begin_step(&mut self.pool, window, range.len(), &mut slots, &mut moves)?;
                text.filled.step();
            }
        }
        self.step = Some(Step { entries, tokens: total, slots, appended: vec![false; layers] });
        Ok(moves)
    }

    /// Refuses to leave rows unwritten that a living sequence counts as its own.
    fn check_finished(&self) -> Result<()> {
        let Some(step) = &self.step else { return Ok(()) };
        let missing = step.appended.iter().position(|appended| !appended);
        let mut owed = step.entries.iter().filter(|(_, range)| !range.is_empty());
        match missing {
            Some(layer) if owed.any(|(sequence, _)| self.text(*sequence).is_ok()) => {
                Err(Error::StepUnfinished { layer })
            }
            _ => Ok(()),
        }
    }

    /// The step under way, if all of its sequences live.
    fn step(&self, layer: usize) -> Result<&Step> {
        self.check_layer(layer)?;
        let step = self.step.as_ref().ok_or(Error::NoStep)?;
        for (sequence, _) in &step.entries {
            self.text(*sequence)?;
        }
        Ok(step)
    }

    /// Records the drop bits of the step's tokens, after which their rows may be written.
    pub fn append(
        &mut self,
        layer: usize,
        keys: [usize; 3],
        values: [usize; 3],
        drops: &[bool],
    ) -> Result<()> {
        let CacheShape { kv_heads, head_dim, .. } = self.shape;
        let step = self.step(layer)?;
        let tokens = step.tokens;
        check_shape("keys", keys, [kv_heads, tokens, head_dim])?;
        check_shape("values", values, [kv_heads, tokens, head_dim])?;
        check_length("drops", drops.len(), kv_heads * tokens)?;
        if step.appended[layer] {
            return Err(Error::AppendedTwice { layer });
        }
        let Some(step) = &mut self.step else { return Err(Error::NoStep) };
        step.appended[layer] = true;
        for (sequence, range) in &step.entries {
            let Some(text) = &mut self.places[sequence.index] else { continue };
            for head in 0..kv_heads {
                let drops = &drops[head * tokens..][range.clone()];
                text.tables[layer * kv_heads + head].decide(drops);
            }
        }
        Ok(())
    }

    /// The step's heads in `layer`, for attention of `queries` into `out` and `lse`, the first two given by shape.
    pub fn attend(
        &self,
        layer: usize,
        queries: [usize; 3],
        out: [usize; 3],
        lse: Option<&[f32]>,
    ) -> Result<Vec<StepHead<'_>>> {
        let CacheShape { query_heads, head_dim, .. } = self.shape;
        let step = self.step(layer)?;
        check_shape("queries", queries, [query_heads, step.tokens, head_dim])?;
        check_shape("out", out, [query_heads, step.tokens, head_dim])?;
        if let Some(lse) = lse {
            check_length("lse", lse.len(), query_heads * step.tokens)?;
        }
        if !step.appended[layer] {
            return Err(Error::NotAppended { layer });
        }
        self.heads(layer)
    }

    /// What the step does in each head of `layer`: heads outside, sequences inside.
    pub fn heads(&self, layer: usize) -> Result<Vec<StepHead<'_>>> {
        let step = self.step(layer)?;
        let heads = self.shape.kv_heads;
        let mut list = Vec::with_capacity(heads * step.entries.len());
        for head in 0..heads {
            let slots = &step.slots[(layer * heads + head) * step.tokens..][..step.tokens];
            for (sequence, tokens) in &step.entries {
                let table = &self.layer(*sequence, layer)?[head];
                let slots = &slots[tokens.clone()];
                list.push(StepHead { head, tokens: tokens.clone(), slots, table });
            }
        }
        Ok(list)
    }

    pub fn release(&mut self, sequence: Sequence) -> Result<()> {
        self.text(sequence)?;
        if let Some(mut text) = self.places[sequence.index].take() {
            self.vacant.push(sequence.index);
            for table in &mut text.tables {
                table.clear(&mut self.pool)?;
            }
        }
        Ok(())
    }
}
