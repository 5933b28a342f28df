//! A cache in host memory: all but the arithmetic of attention, which is a parameter.

mod suspended;

pub use suspended::HostSuspended;

use crate::backend::PagedAttention;
use crate::book::{Book, Sequence, StepHead};
use crate::error::Result;
use crate::page::Slot;
use crate::shape::{CacheShape, Stats};
use crate::storage::Memory;
use crate::table::{PageTable, kept};
use crate::view::{View, ViewMut};

/// The arithmetic of attention over pages in host memory. Only [`Reference`](crate::Reference) and
/// [`Cpu`](crate::Cpu) implement it.
pub trait Kernel: std::fmt::Debug {
    /// Attends from each of `heads`; all arguments are checked.
    fn attend(&mut self, call: Call<'_>, out: &mut ViewMut<'_>, lse: Option<&mut [f32]>);
}

/// The arguments of a [`Kernel`].
pub struct Call<'a> {
    pub shape: &'a CacheShape,
    pub memory: &'a Memory,
    pub heads: &'a [StepHead<'a>],
    pub queries: View<'a>,
    pub scale: f32,
}

/// A cache in host memory whose attention is computed by `K`: see [`Reference`](crate::Reference) and
/// [`Cpu`](crate::Cpu).
#[derive(Debug)]
pub struct Host<K> {
    book: Book,
    memory: Memory,
    kernel: K,
}

impl<K> Host<K> {
    pub(crate) fn build(shape: CacheShape, lanes: usize, kernel: K) -> Result<Self> {
        let book = Book::new(shape)?;
        let memory = Memory::new(&book.shape, lanes);
        Ok(Self { book, memory, kernel })
    }

    /// Where the tokens of each kv head of a layer lie, `[H]`.
    ///
    /// # Errors
    /// An unknown sequence or layer.
    pub fn tables(&self, sequence: Sequence, layer: usize) -> Result<&[PageTable]> {
        self.book.layer(sequence, layer)
    }
}

/// Copies one token's row of a head from the views into its slot.
struct Rows<'a> {
    keys: View<'a>,
    values: View<'a>,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl<'a> Rows<'a> {
    fn new(keys: View<'a>, values: View<'a>) -> Self {
        let dim = keys.shape()[2];
        Self { keys, values, key: vec![0.0; dim], value: vec![0.0; dim] }
    }

    fn store(
        &mut self,
        memory: &mut Memory,
        head: usize,
        token: usize,
        table: &PageTable,
        slot: Slot,
    ) {
        self.keys.read(head, token, &mut self.key);
        self.values.read(head, token, &mut self.value);
        memory.write(table.place(slot), &self.key, &self.value);
    }
}

impl<K: Kernel> PagedAttention for Host<K> {
    fn shape(&self) -> &CacheShape {
        &self.book.shape
    }

    fn allocate(&mut self) -> Result<Sequence> {
        Ok(self.book.allocate())
    }

    fn fork(&mut self, sequence: Sequence) -> Result<Sequence> {
        self.book.fork(sequence)
    }

    fn fill(
        &mut self,
        sequence: Sequence,
        layer: usize,
        keys: View<'_>,
        values: View<'_>,
        drops: &[bool],
    ) -> Result<()> {
        self.book.fill(sequence, layer, keys.shape(), values.shape(), drops)?;
        let [_, tokens, _] = keys.shape();
        let mut rows = Rows::new(keys, values);
        for (head, table) in self.book.layer(sequence, layer)?.iter().enumerate() {
            let drops = &drops[head * tokens..][..tokens];
            for (slot, token) in kept(drops, self.book.shape.window).enumerate() {
                rows.store(&mut self.memory, head, token, table, Slot(slot as u32));
            }
        }
        Ok(())
    }

    fn begin_step(&mut self, step: &[(Sequence, usize)]) -> Result<()> {
        let moves = self.book.begin_step(step)?;
        if !moves.is_empty() {
            moves.into_iter().for_each(|step| self.memory.copy(step));
            self.memory.trim(&self.book.pool);
        }
        Ok(())
    }

    fn append(
        &mut self,
        layer: usize,
        keys: View<'_>,
        values: View<'_>,
        drops: &[bool],
    ) -> Result<()> {
        self.book.append(layer, keys.shape(), values.shape(), drops)?;
        let mut rows = Rows::new(keys, values);
        for StepHead { head, tokens, slots, table } in self.book.heads(layer)? {
            for (token, &slot) in tokens.zip(slots) {
                rows.store(&mut self.memory, head, token, table, slot);
            }
        }
        Ok(())
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: View<'_>,
        scale: f32,
        mut out: ViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let heads = &self.book.attend(layer, queries.shape(), out.shape(), lse.as_deref())?;
        let (shape, memory) = (&self.book.shape, &self.memory);
        self.kernel.attend(Call { shape, memory, heads, queries, scale }, &mut out, lse);
        Ok(())
    }

    fn release(&mut self, sequence: Sequence) -> Result<()> {
        self.book.release(sequence)?;
        self.memory.trim(&self.book.pool);
        Ok(())
    }

    fn stats(&self) -> Stats {
        Stats { reserved_bytes: self.memory.bytes(), ..self.book.stats() }
    }

    fn lengths(&self, sequence: Sequence) -> Result<Vec<usize>> {
        Ok(self.book.tables(sequence)?.iter().map(PageTable::len).collect())
    }
}
