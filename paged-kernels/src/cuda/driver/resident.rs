//! Launches of kernels/resident.cu.

use super::attend::{AttendStep, Cut, HEAD_WORDS};
use super::fused::FusedCall;
use super::swap::SwapCall;
use super::{Device, Grid, Part, Pool, RawPool, RawView, Room, function, grid, load};
use crate::cuda::view::{DeviceBits, DeviceView};
use crate::error::Result;
use crate::shape::{CacheShape, Dtype};
use cudarc::driver::{CudaContext, result, sys};
use std::sync::Arc;

const PTX: &str = concat!(include_str!("../../../kernels/resident.compute_80.ptx"), "\0");
const PTX_HOPPER: &str = concat!(include_str!("../../../kernels/resident.compute_90.ptx"), "\0");
const FUSED: &str = concat!(include_str!("../../../kernels/fused.compute_80.ptx"), "\0");
const FUSED_HOPPER: &str = concat!(include_str!("../../../kernels/fused.compute_90.ptx"), "\0");
/// Threads of the block that plans a layer.
const PLANNERS: u32 = 512;
/// Threads of the block that makes room for a prompt in a head.
const ADMITTERS: u32 = 1024;
/// Warps of the other kernels' blocks.
pub(super) const WARPS: usize = 4;
/// Tokens whose kept ones are counted together.
const STRETCH: usize = 1024;
/// The seat of a place in the batch that nobody has.
pub const NO_SEAT: u32 = u32::MAX;
/// Pieces that a head has at most: `piece_of` in kernels/attend.cuh.
const MOST_PIECES: usize = 32;
/// 32-bit words of `Share` in kernels/attend.cuh.
pub(super) const SHARE_WORDS: usize = 4;

/// The kernels of a state.
#[derive(Debug)]
struct Kernels {
    context: Arc<CudaContext>,
    modules: [sys::CUmodule; 2],
    fused: sys::CUfunction,
    fused_reading: sys::CUfunction,
    admit: sys::CUfunction,
    fill: sys::CUfunction,
    fill_narrow: sys::CUfunction,
    begin: sys::CUfunction,
    append: sys::CUfunction,
    release: sys::CUfunction,
    fork: sys::CUfunction,
    swap: sys::CUfunction,
}

// SAFETY: as for `Device`.
unsafe impl Send for Kernels {}

impl Kernels {
    fn load(device: &Device) -> Result<Self> {
        device.bind()?;
        let module = load(if device.overlaps { PTX_HOPPER } else { PTX })?;
        let fused = load(if device.overlaps { FUSED_HOPPER } else { FUSED })?;
        let kernels = Self {
            context: device.context.clone(),
            modules: [module, fused],
            fused: function(fused, c"fused_append")?,
            fused_reading: function(fused, c"fused_append_reading")?,
            admit: function(module, c"resident_admit")?,
            fill: function(module, c"resident_fill")?,
            fill_narrow: function(module, c"resident_fill_narrow")?,
            begin: function(module, c"resident_begin")?,
            append: function(module, c"resident_append")?,
            release: function(module, c"resident_release")?,
            fork: function(module, c"resident_fork")?,
            swap: function(module, c"resident_swap")?,
        };
        let mut sizes = device.sizes(function(module, c"resident_sizes")?, 7)?;
        sizes.extend(device.sizes(function(fused, c"fused_sizes")?, 1)?);
        assert_eq!(sizes, MIRRORED, "the kernels' structs are as they are mirrored here");
        Ok(kernels)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            for module in self.modules {
                // SAFETY: nothing else names the module's functions, and unloading waits for what still runs.
                self.context.record_err(unsafe { result::module::unload(module) });
            }
        }
    }
}

/// Where everything lies: `State` of kernels/resident.cu.
#[derive(Debug)]
pub struct State {
    kernels: Kernels,
    pub pool: Pool,
    tables: Room,
    lens: Room,
    rings: Room,
    ages: Room,
    free: Room,
    sharers: Room,
    counters: Room,
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) seats: usize,
    pub(super) most_pages: usize,
    window: usize,
    /// Of a ring: the window's, and those of the longest pass.
    places: usize,
    pub(super) page_bytes: usize,
}

impl State {
    /// Empty, every page but page 0 on the stack.
    pub fn new(
        device: &Device,
        shape: &CacheShape,
        seats: usize,
        most_pages: usize,
        places: usize,
    ) -> Result<Self> {
        let CacheShape { layers, kv_heads, page_size, head_dim, window, pages, dtype, .. } = *shape;
        let rows = layers * kv_heads * seats;
        let zeros = |words: usize| {
            let mut room = device.room(words * 4)?;
            device.zero(&mut room).map(|()| room)
        };
        // Zero, since whole pages are read: what no one has written must be a number.
        let pool = Pool {
            room: zeros((pages + 1) * shape.page_bytes() / 4)?,
            dtype: dtype.code(),
            page_size: page_size as u32,
            dim: head_dim as u32,
        };
        let (mut free, mut counters) = (device.room(pages * 4)?, device.room(8)?);
        device.upload(&(1..=pages as u32).rev().collect::<Vec<_>>(), &mut free)?;
        device.upload(&[pages as u32, 0], &mut counters)?;
        Ok(Self {
            kernels: Kernels::load(device)?,
            pool,
            tables: zeros(rows * most_pages)?,
            lens: zeros(rows)?,
            rings: zeros(rows * places)?,
            ages: zeros(layers * seats)?,
            free,
            sharers: zeros(pages + 1)?,
            counters,
            layers,
            kv_heads,
            seats,
            most_pages,
            window,
            places,
            page_bytes: shape.page_bytes(),
        })
    }

    /// Pages that are free, and those that were wanted when there was none.
    pub fn counters(&self, device: &Device) -> Result<[usize; 2]> {
        let counters = device.download::<u32>(&self.counters, 2)?;
        Ok([counters[0] as usize, counters[1] as usize])
    }

    /// Where the card has [`counters`](Self::counters), as two 32-bit numbers.
    pub fn counters_address(&self) -> u64 {
        self.counters.address
    }

    /// Live rows, `[layers, H, seats]`.
    pub fn lens(&self, device: &Device) -> Result<Vec<u32>> {
        device.download(&self.lens, self.layers * self.kv_heads * self.seats)
    }

    /// What appends, with the code that reads positions or without.
    pub(super) fn fused(&self, reads: bool) -> sys::CUfunction {
        if reads { self.kernels.fused_reading } else { self.kernels.fused }
    }

    pub(super) fn swap(&self) -> sys::CUfunction {
        self.kernels.swap
    }

    pub(super) fn tables(&self) -> Part<'_> {
        self.tables.whole()
    }

    /// Places of a ring.
    pub fn places(&self) -> usize {
        self.places
    }

    /// Rows that a head's table holds.
    pub fn most_rows(&self) -> usize {
        self.most_pages * self.pool.page_size as usize
    }

    pub(super) fn raw(&self) -> RawState {
        RawState {
            pool: self.pool.raw(),
            tables: self.tables.address,
            lens: self.lens.address,
            rings: self.rings.address,
            ages: self.ages.address,
            free: self.free.address,
            sharers: self.sharers.address,
            counters: self.counters.address,
            layers: self.layers as u32,
            kv_heads: self.kv_heads as u32,
            seats: self.seats as u32,
            most_pages: self.most_pages as u32,
            window: self.window as u32,
            places: self.places as u32,
        }
    }

    /// Whether rows of `view` go to the pool 16 bytes at a time.
    fn wide(&self, view: &DeviceView<'_>) -> bool {
        let RawView { data, head_stride, token_stride, dtype, .. } = view.raw();
        dtype == self.pool.dtype
            && dtype != Dtype::F32.code()
            && self.pool.dim.is_multiple_of(8)
            && data % 16 == 0
            && head_stride % 8 == 0
            && token_stride % 8 == 0
    }

    /// Whether rows of `view` become eight-bit floats, read 16 bytes at a time.
    fn narrows(&self, view: &DeviceView<'_>) -> bool {
        let RawView { data, head_stride, token_stride, dtype, .. } = view.raw();
        (self.pool.dtype, dtype) == (Dtype::F8.code(), Dtype::Bf16.code())
            && self.pool.dim.is_multiple_of(8)
            && self.pool.dim <= 256
            && data % 16 == 0
            && head_stride % 8 == 0
            && token_stride % 8 == 0
    }
}

/// Where a layer's new tokens go, `[H, N]` of each.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// Rows of the pool.
    pub(super) rows: Part<'a>,
    /// Places in the rings, of 64 bits.
    pub(super) marks: Part<'a>,
}

impl<'a> Targets<'a> {
    /// One layer's of all layers', `count` of each.
    pub(super) fn of(rows: &'a Room, marks: &'a Room, layer: usize, count: usize) -> Self {
        let marks = marks.part(2 * layer * count, 2 * count);
        Self { rows: rows.part(layer * count, count), marks }
    }
}

/// What a step's plan is written to, for all layers and the most texts, and what attention needs besides.
#[derive(Debug)]
pub struct Step {
    batch: Room,
    heads: Room,
    shares: Room,
    rows: Room,
    marks: Room,
    /// `0..seats`: each text has one token, its own.
    owners: Room,
    parts: Room,
    pub cut: Cut,
    /// Attention leaves room for the kernel that follows.
    pub slim: bool,
    /// Kept tokens before each stretch of a prompt.
    starts: Room,
}

impl Step {
    pub fn new(device: &Device, state: &State, group: usize, cut: Cut) -> Result<Self> {
        let heads = state.kv_heads * state.seats;
        let rows = state.layers * heads;
        let parts = match cut {
            Cut::Fast => 2 * device.blocks,
            Cut::Invariant => MOST_PIECES * heads,
        };
        let mut owners = device.room(state.seats * 4)?;
        device.upload(&(0..state.seats as u32).collect::<Vec<_>>(), &mut owners)?;
        Ok(Self {
            batch: device.room(state.seats * 4)?,
            heads: device.room(rows * HEAD_WORDS * 4)?,
            shares: device.room(state.layers * device.blocks * SHARE_WORDS * 4)?,
            rows: device.room(rows * 4)?,
            marks: device.room(rows * 8)?,
            owners,
            parts: device.parts(&state.pool, group, parts)?,
            cut,
            slim: false,
            starts: device.room(0)?,
        })
    }

    /// One layer's part, of `texts` texts.
    pub fn layer<'a>(
        &'a self,
        state: &'a State,
        device: &Device,
        layer: usize,
        texts: usize,
        group: usize,
    ) -> AttendStep<'a> {
        let heads = state.kv_heads * texts;
        let shares = device.blocks * SHARE_WORDS;
        let rows = self.rows.part(layer * heads, heads);
        AttendStep {
            heads: self.heads.part(layer * heads * HEAD_WORDS, heads * HEAD_WORDS),
            tables: state.tables.whole(),
            slots: rows, // read only for several tokens of one text
            owners: self.owners.part(0, texts),
            shares: self.shares.part(layer * shares, shares),
            parts: self.parts.whole(),
            cut: self.cut,
            single: true,
            early: true,
            slim: self.slim,
            sequences: texts,
            group,
        }
    }

    /// Where one layer's tokens go, `count` rows.
    pub fn targets(&self, layer: usize, count: usize) -> Targets<'_> {
        Targets::of(&self.rows, &self.marks, layer, count)
    }

    /// The arrays of one layer, for a test.
    #[cfg(test)]
    pub fn plan(
        &self,
        state: &State,
        device: &Device,
        layer: usize,
        texts: usize,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let heads = state.kv_heads * texts * HEAD_WORDS;
        let shares = device.blocks * SHARE_WORDS;
        let all = device.download::<u32>(&self.heads, (layer + 1) * heads)?;
        let all_shares = device.download::<u32>(&self.shares, (layer + 1) * shares)?;
        Ok((all[layer * heads..].to_vec(), all_shares[layer * shares..].to_vec()))
    }
}

impl Device {
    /// Says who takes the steps that follow, by seat.
    pub fn batch(&self, step: &mut Step, seats: &[u32]) -> Result<()> {
        assert!(seats.len() * 4 <= step.batch.bytes, "no more texts than seats");
        self.upload(seats, &mut step.batch)
    }

    /// A prompt's rows in one layer of a seat. `keys`, `values` and `drops` are of as many tokens.
    pub fn admit(
        &self,
        state: &State,
        step: &mut Step,
        [layer, seat]: [usize; 2],
        keys: DeviceView<'_>,
        values: DeviceView<'_>,
        drops: DeviceBits<'_>,
    ) -> Result<()> {
        let [heads, tokens, dim] = keys.shape();
        assert_eq!(
            (heads, dim, values.shape()),
            (state.kv_heads, state.pool.dim as usize, keys.shape())
        );
        assert_eq!(drops.shape(), [heads, tokens]);
        assert!(layer < state.layers && seat < state.seats);
        self.reserve(heads * (tokens.div_ceil(STRETCH) + 1) * 4, &mut step.starts)?;
        let all =
            |fits: fn(&State, &DeviceView<'_>) -> bool| fits(state, &keys) && fits(state, &values);
        let narrows = all(State::narrows);
        let call = AdmitCall {
            state: state.raw(),
            keys: keys.raw(),
            values: values.raw(),
            drops: drops.address(),
            starts: step.starts.address,
            layer: layer as u32,
            seat: seat as u32,
            tokens: tokens as u32,
            wide: (narrows || all(State::wide)).into(),
        };
        let overlaps = self.overlaps;
        let blocks = Grid { blocks: heads, threads: ADMITTERS, shared: 0, overlaps };
        // SAFETY: the state's rooms are of its sizes, the views and bits hold what their shapes say, layer and seat
        // exist, and `starts` has a word for each stretch of each head and one more. It may overlap: it waits at once.
        unsafe { self.launch(state.kernels.admit, blocks, &call) }?;
        let words = tokens.div_ceil(32);
        let blocks = Grid { overlaps, ..grid(words.div_ceil(WARPS) * heads, 0) };
        let kernel = if narrows { state.kernels.fill_narrow } else { state.kernels.fill };
        // SAFETY: as above. It may overlap: it waits before it reads what `admit` writes.
        unsafe { self.launch(kernel, blocks, &call) }
    }

    /// Plans a step of the first `texts` places of the batch, one token each.
    pub fn begin(&self, state: &State, step: &Step, texts: usize) -> Result<()> {
        assert!(texts <= state.seats);
        let call = BeginCall {
            state: state.raw(),
            batch: step.batch.address,
            heads: step.heads.address,
            shares: step.shares.address,
            rows: step.rows.address,
            marks: step.marks.address,
            texts: texts as u32,
            blocks: self.blocks as u32,
            cut: step.cut as u32,
            unused: 0,
        };
        let blocks = if texts == 0 { 0 } else { state.layers };
        let blocks = Grid { blocks, threads: PLANNERS, shared: 0, overlaps: false };
        // SAFETY: the batch names seats, each once, or `NO_SEAT`; the step's rooms are for as many texts as there are
        // seats, and the state's of its sizes.
        unsafe { self.launch(state.kernels.begin, blocks, &call) }
    }

    /// Planned rows into one layer.
    pub fn append(
        &self,
        state: &State,
        to: Targets<'_>,
        keys: DeviceView<'_>,
        values: DeviceView<'_>,
        drops: Option<DeviceBits<'_>>,
    ) -> Result<()> {
        let [heads, texts, dim] = keys.shape();
        assert_eq!(
            (heads, dim, values.shape()),
            (state.kv_heads, state.pool.dim as usize, keys.shape())
        );
        assert!(drops.is_none_or(|drops| drops.shape() == [heads, texts]));
        assert_eq!(to.rows.words, heads * texts);
        let call = AppendCall {
            state: state.raw(),
            keys: keys.raw(),
            values: values.raw(),
            drops: drops.map_or(0, |drops| drops.address()),
            rows: to.rows.address,
            marks: to.marks.address,
            texts: texts as u32,
            wide: (state.wide(&keys) && state.wide(&values)).into(),
        };
        // SAFETY: the views and bits hold what their shapes say; rows and marks are those that `begin` or `begin_pass` has
        // written for as many.
        unsafe {
            self.launch(state.kernels.append, grid((heads * texts).div_ceil(WARPS), 0), &call)
        }
    }

    /// Lets an empty seat go on from where another is.
    pub fn fork(&self, state: &State, from: usize, to: usize) -> Result<()> {
        assert!(from < state.seats && to < state.seats && from != to);
        let call = ForkCall { state: state.raw(), from: from as u32, to: to as u32 };
        // SAFETY: the state's rooms are of its sizes and the seats exist.
        unsafe { self.launch(state.kernels.fork, grid(state.layers * state.kv_heads, 0), &call) }
    }

    /// Gives a seat's pages back and empties it.
    pub fn release(&self, state: &State, seat: usize) -> Result<()> {
        assert!(seat < state.seats);
        let call = ReleaseCall { state: state.raw(), seat: seat as u32, unused: 0 };
        let blocks = state.layers * state.kv_heads;
        // SAFETY: the state's rooms are of its sizes and the seat exists.
        unsafe {
            self.launch(
                state.kernels.release,
                Grid { blocks, threads: 32, shared: 0, overlaps: false },
                &call,
            )
        }
    }
}

// Mirrors of the structs in kernels/resident.cu.

#[repr(C)]
pub(super) struct RawState {
    pool: RawPool,
    tables: u64,
    lens: u64,
    rings: u64,
    ages: u64,
    free: u64,
    sharers: u64,
    counters: u64,
    layers: u32,
    kv_heads: u32,
    seats: u32,
    most_pages: u32,
    window: u32,
    places: u32,
}

#[repr(C)]
struct AdmitCall {
    state: RawState,
    keys: RawView,
    values: RawView,
    drops: u64,
    starts: u64,
    layer: u32,
    seat: u32,
    tokens: u32,
    wide: u32,
}

#[repr(C)]
struct BeginCall {
    state: RawState,
    batch: u64,
    heads: u64,
    shares: u64,
    rows: u64,
    marks: u64,
    texts: u32,
    blocks: u32,
    cut: u32,
    unused: u32,
}

#[repr(C)]
struct AppendCall {
    state: RawState,
    keys: RawView,
    values: RawView,
    drops: u64,
    rows: u64,
    marks: u64,
    texts: u32,
    wide: u32,
}

#[repr(C)]
struct ReleaseCall {
    state: RawState,
    seat: u32,
    unused: u32,
}

#[repr(C)]
struct ForkCall {
    state: RawState,
    from: u32,
    to: u32,
}

/// Sizes of the structs, in the order in which the kernels give theirs.
const MIRRORED: [u32; 8] = [
    size_of::<RawState>() as u32,
    size_of::<AdmitCall>() as u32,
    size_of::<BeginCall>() as u32,
    size_of::<AppendCall>() as u32,
    size_of::<ReleaseCall>() as u32,
    size_of::<ForkCall>() as u32,
    size_of::<SwapCall>() as u32,
    size_of::<FusedCall>() as u32,
];
