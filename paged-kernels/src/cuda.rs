//! A cache on an NVIDIA card.
//!
//! The drop bits of a token are older than its obeying by a whole window, so where everything lies is known before a step
//! begins. [`Cuda`] takes the bits on the host and keeps the same book as the host backends: the plan of all layers goes to
//! the card in one copy. [`Resident`] takes them on the card and keeps its book there.

mod driver;
mod fused;
mod pass;
mod plan;
mod resident;
mod scores;
mod suspended;
mod view;

pub use fused::{Beside, Gate, HeadNorms, Positions, Projected};
pub use resident::{Mode, Resident, Seats};
pub use scores::{ScorePrecision, ScoreRule, Scores, Surrogate, SurrogateWeights};
pub use suspended::Suspended;
pub use view::{DeviceBits, DeviceBitsMut, DeviceElement, DeviceView, DeviceViewMut};

use crate::backend::PagedAttention;
use crate::book::{Book, Sequence};
use crate::error::{Error, Result};
use crate::shape::{CacheShape, Dtype, Stats};
use crate::table::PageTable;
use crate::view::{Data, View, ViewMut};
use cudarc::driver::CudaStream;
use driver::attend::{AttendStep, Cut};
use driver::{Device, Part, Plain, Pool, Room};
use plan::{Plan, Range};
use std::sync::Arc;

/// Elements of a row that the kernels can hold.
const MAX_DIM: usize = 512;

/// A cache in the memory of an NVIDIA card of compute capability 8.0 or newer. All pages are taken at once.
///
/// Its face is [`PagedAttention`]: views are in host memory, and calls return when the work is done. For tensors on the
/// card there is [`Resident`].
#[derive(Debug)]
pub struct Cuda {
    book: Book,
    device: Device,
    pool: Pool,
    plan: Plan,
    /// [`Plan::words`] on the card.
    words: Room,
    /// Rows of a prompt, or moves.
    rows: Room,
    /// What the blocks of a fast attention hand to each other.
    parts: Room,
    staged: Staged,
}

/// Host views on their way to the card and back.
#[derive(Debug)]
struct Staged {
    keys: Room,
    values: Room,
    out: Room,
    lse: Room,
}

impl Cuda {
    /// An empty cache on the first card, working on its default stream.
    ///
    /// # Errors
    /// [`CacheShape`](Error::CacheShape) for a shape that no cache can have; [`NoDriver`](Error::NoDriver),
    /// [`OldDriver`](Error::OldDriver), [`NoCard`](Error::NoCard), [`Card`](Error::Card),
    /// [`DeviceMemory`](Error::DeviceMemory) where the machine can't.
    pub fn new(shape: CacheShape) -> Result<Self> {
        check(&shape)?;
        let dtype = shape.dtype;
        Self::build(shape, Device::first(dtype)?)
    }

    /// An empty cache on the card of `stream`, working on that stream.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn on(stream: Arc<CudaStream>, shape: CacheShape) -> Result<Self> {
        check(&shape)?;
        let dtype = shape.dtype;
        Self::build(shape, Device::new(stream, dtype)?)
    }

    fn build(shape: CacheShape, device: Device) -> Result<Self> {
        let book = Book::new(shape)?;
        let CacheShape { pages, page_size, head_dim, dtype, .. } = book.shape;
        // Zero, since whole pages are read: what no one has written must be a number.
        let mut room = device.room(pages * book.shape.page_bytes())?;
        device.zero(&mut room)?;
        let (page_size, dim) = (page_size as u32, head_dim as u32);
        let pool = Pool { room, dtype: dtype.code(), page_size, dim };
        let empty = || device.room(0);
        let staged = Staged { keys: empty()?, values: empty()?, out: empty()?, lse: empty()? };
        let (words, rows) = (empty()?, empty()?);
        let parts = device.parts(&pool, book.shape.group(), 2 * device.blocks)?;
        let plan = Plan::default();
        Ok(Self { book, device, pool, plan, words, rows, parts, staged })
    }

    /// The stream that the cache works on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.device.stream()
    }

    /// Where the tokens of each kv head of a layer lie, `[H]`.
    ///
    /// # Errors
    /// An unknown sequence or layer.
    pub fn tables(&self, sequence: Sequence, layer: usize) -> Result<&[PageTable]> {
        self.book.layer(sequence, layer)
    }

    fn launch(
        &self,
        layer: usize,
        queries: DeviceView<'_>,
        scale: f32,
        out: &DeviceViewMut<'_>,
        lse: Option<&DeviceViewMut<'_>>,
    ) -> Result<()> {
        let arrays = &self.plan.layers[layer];
        let step = AttendStep {
            heads: self.part(arrays.heads),
            tables: self.part(arrays.pages),
            slots: self.part(arrays.slots),
            owners: self.part(self.plan.owners),
            shares: self.part(arrays.shares),
            parts: self.parts.whole(),
            cut: Cut::Fast,
            single: self.plan.single,
            early: false,
            slim: false,
            sequences: self.plan.sequences,
            group: self.book.shape.group(),
        };
        self.device.attend(&self.pool, &step, queries, scale, out, lse)
    }

    fn part(&self, range: Range) -> Part<'_> {
        self.words.part(range.first, range.words)
    }
}

fn check(shape: &CacheShape) -> Result<()> {
    shape.check()?;
    let found = shape.head_dim;
    if found > MAX_DIM {
        let advice = "the kernels hold rows of at most 512 elements; use Cpu";
        return Err(Error::CacheShape { field: "head_dim", found, advice });
    }
    Ok(())
}

/// Copies a host view to the card, contiguous.
fn stage<'a>(device: &Device, view: View<'_>, room: &'a mut Room) -> Result<DeviceView<'a>> {
    let dtype = match view.parts().0 {
        Data::F32(data) => stage_rows(device, view, data, room).map(|()| Dtype::F32),
        Data::Bf16(data) => stage_rows(device, view, data, room).map(|()| Dtype::Bf16),
        Data::F16(data) => stage_rows(device, view, data, room).map(|()| Dtype::F16),
    };
    room.view(dtype?, view.shape())
}

fn stage_rows<T: Plain>(
    device: &Device,
    view: View<'_>,
    data: &[T],
    room: &mut Room,
) -> Result<()> {
    let ([heads, tokens, dim], (_, strides)) = (view.shape(), view.parts());
    let mut rows = Vec::with_capacity(heads * tokens * dim);
    for head in 0..heads {
        for token in 0..tokens {
            rows.extend_from_slice(&data[head * strides[0] + token * strides[1]..][..dim]);
        }
    }
    device.upload(&rows, room)
}

impl PagedAttention for Cuda {
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
        let CacheShape { window, page_size, .. } = self.book.shape;
        let tables = self.book.layer(sequence, layer)?;
        let rows = plan::prompt(tables, drops, window, page_size);
        self.device.upload(&rows, &mut self.rows)?;
        let keys = stage(&self.device, keys, &mut self.staged.keys)?;
        let values = stage(&self.device, values, &mut self.staged.values)?;
        self.device.store(&self.pool, keys, values, self.rows.part(0, rows.len()))?;
        self.device.synchronize()
    }

    fn begin_step(&mut self, step: &[(Sequence, usize)]) -> Result<()> {
        let moves = self.book.begin_step(step)?;
        for moves in plan::apart(&moves, self.book.shape.page_size) {
            self.device.upload(&moves, &mut self.rows)?;
            self.device.shift(&self.pool, self.rows.part(0, moves.len()))?;
        }
        self.plan = Plan::of(&self.book, self.device.blocks)?;
        self.device.upload(&self.plan.words, &mut self.words)
    }

    fn append(
        &mut self,
        layer: usize,
        keys: View<'_>,
        values: View<'_>,
        drops: &[bool],
    ) -> Result<()> {
        self.book.append(layer, keys.shape(), values.shape(), drops)?;
        let Range { first, words } = self.plan.layers[layer].rows;
        let keys = stage(&self.device, keys, &mut self.staged.keys)?;
        let values = stage(&self.device, values, &mut self.staged.values)?;
        self.device.store(&self.pool, keys, values, self.words.part(first, words))?;
        self.device.synchronize()
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: View<'_>,
        scale: f32,
        mut out: ViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        self.book.attend(layer, queries.shape(), out.shape(), lse.as_deref())?;
        let [heads, tokens, dim] = queries.shape();
        let rows = heads * tokens;
        if rows == 0 {
            return Ok(());
        }
        // Out of `self`, since the launch borrows the rest of it.
        let empty = || self.device.room(0);
        let empty = Staged { keys: empty()?, values: empty()?, out: empty()?, lse: empty()? };
        let mut staged = std::mem::replace(&mut self.staged, empty);
        self.device.reserve(rows * dim * 4, &mut staged.out)?;
        self.device.reserve(rows * 4, &mut staged.lse)?;
        let queries = stage(&self.device, queries, &mut staged.keys)?;
        let on_device = staged.out.view_mut([heads, tokens, dim])?;
        let sums = staged.lse.view_mut([heads, tokens, 1])?;
        self.launch(layer, queries, scale, &on_device, Some(&sums))?;
        let rows_out = self.device.download::<f32>(&staged.out, rows * dim)?;
        for (i, row) in rows_out.chunks_exact(dim).enumerate() {
            out.write(i / tokens, i % tokens, row.iter().copied());
        }
        if let Some(lse) = lse {
            lse.copy_from_slice(&self.device.download::<f32>(&staged.lse, rows)?);
        }
        self.staged = staged;
        Ok(())
    }

    fn release(&mut self, sequence: Sequence) -> Result<()> {
        self.book.release(sequence)
    }

    fn stats(&self) -> Stats {
        Stats { reserved_bytes: self.pool.room.bytes(), ..self.book.stats() }
    }

    fn lengths(&self, sequence: Sequence) -> Result<Vec<usize>> {
        Ok(self.book.tables(sequence)?.iter().map(PageTable::len).collect())
    }
}
