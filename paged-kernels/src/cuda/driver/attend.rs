//! Attention: the fast kernels where one is made for a cache, else the plain one.

use super::{Device, Grid, Part, Pool, RawPool, RawView, Room, failed, function, grid, load};
use crate::cuda::plan::SLAB;
use crate::cuda::view::{DeviceView, DeviceViewMut};
use crate::error::Result;
use crate::shape::Dtype;
use cudarc::driver::{result, sys};
use std::ffi::CStr;

/// The fast attention for each type that it is made for, portable and for Hopper.
const STREAM_BF16: [&str; 2] = [
    concat!(include_str!("../../../kernels/stream_bf16.compute_80.ptx"), "\0"),
    concat!(include_str!("../../../kernels/stream_bf16.compute_90.ptx"), "\0"),
];
const STREAM_F16: [&str; 2] = [
    concat!(include_str!("../../../kernels/stream_f16.compute_80.ptx"), "\0"),
    concat!(include_str!("../../../kernels/stream_f16.compute_90.ptx"), "\0"),
];
const STREAM_F8: [&str; 2] = [
    concat!(include_str!("../../../kernels/stream_f8.compute_80.ptx"), "\0"),
    concat!(include_str!("../../../kernels/stream_f8.compute_90.ptx"), "\0"),
];

/// Whether the fast kernels, which take 16 rows of a page at once, are made for such pages.
pub(super) fn in_slabs(page_size: u32) -> bool {
    page_size.is_power_of_two() && page_size >= SLAB as u32
}

/// Their kernels, as in kernels/stream.cuh, whose blocks fill a multiprocessor each, but for the slim ones. The first that fits
/// is taken.
const STREAM_KERNELS: [Stream<&CStr>; 9] = [
    Stream { slim: true, ..kernel(c"stream_attend_slim_d128", 128, 8, 4, 2) },
    kernel(c"stream_attend_d64", 64, 8, 8, 4),
    kernel(c"stream_attend_wide_d64", 64, 16, 8, 4),
    kernel(c"stream_attend_d96", 96, 8, 8, 3),
    kernel(c"stream_attend_wide_d96", 96, 16, 8, 2),
    kernel(c"stream_attend_d128", 128, 8, 8, 3),
    kernel(c"stream_attend_wide_d128", 128, 16, 8, 2),
    kernel(c"stream_attend_d256", 256, 8, 4, 3),
    kernel(c"stream_attend_wide_d256", 256, 16, 4, 2),
];
const STREAM_F8_KERNELS: [Stream<&CStr>; 7] = [
    kernel(c"stream_attend_d64", 64, 8, 8, 6),
    kernel(c"stream_attend_wide_d64", 64, 16, 8, 5),
    kernel(c"stream_attend_d96", 96, 8, 8, 5),
    kernel(c"stream_attend_wide_d96", 96, 16, 8, 4),
    kernel(c"stream_attend_d128", 128, 8, 8, 5),
    kernel(c"stream_attend_wide_d128", 128, 16, 8, 4),
    kernel(c"stream_attend_d256", 256, 8, 4, 5),
];

const fn kernel(
    kernel: &CStr,
    dim: usize,
    group: usize,
    team: usize,
    stages: usize,
) -> Stream<&CStr> {
    Stream { kernel, dim, group, team, stages, slim: false }
}

/// 32-bit words of a head's record.
pub const HEAD_WORDS: usize = 8;

/// A kernel of the fast attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream<K> {
    kernel: K,
    dim: usize,
    /// The most query heads of a kv head.
    group: usize,
    /// Warps of a block.
    team: usize,
    /// Slabs that each of them has on their way.
    stages: usize,
    slim: bool,
}

impl<K> Stream<K> {
    /// A block's shared memory: slabs on their way, with the scales of eight-bit rows, then each warp's sums.
    fn shared(&self, dtype: Dtype, group: usize) -> usize {
        let pitch = (self.dim * dtype.bytes()).next_multiple_of(128);
        let slab = 2 * SLAB * (pitch + if dtype == Dtype::F8 { 4 } else { 0 });
        self.team * (self.stages * slab + group * (self.dim + 2) * 4)
    }
}

/// How heads are cut for the blocks of a fast attention, as the kernels number it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// At the ends of equal shares of a layer's slabs.
    Fast = 0,
    /// Each head by its own length alone.
    Invariant = 1,
}

/// One layer's part of a plan.
#[derive(Debug)]
pub struct AttendStep<'a> {
    pub heads: Part<'a>,
    pub tables: Part<'a>,
    pub slots: Part<'a>,
    pub owners: Part<'a>,
    pub shares: Part<'a>,
    pub parts: Part<'a>,
    pub cut: Cut,
    pub sequences: usize,
    pub group: usize,
    /// No sequence has more than one token.
    pub single: bool,
    /// `slots` are rows of the pool, and nothing else in it has changed since the step was planned.
    pub early: bool,
    /// A block of the next kernel is to have room beside one of this.
    pub slim: bool,
}

impl Device {
    /// Loads the fast kernels for the device's type, and gives the sizes of their structs.
    pub(super) fn load_fast(&mut self, shared: usize) -> Result<Vec<u32>> {
        let (images, kernels) = match self.dtype {
            Dtype::F32 => return Ok(Vec::new()),
            Dtype::Bf16 => (STREAM_BF16, &STREAM_KERNELS[..]),
            Dtype::F16 => (STREAM_F16, &STREAM_KERNELS[..]),
            Dtype::F8 => (STREAM_F8, &STREAM_F8_KERNELS[..]),
        };
        let module = load(images[usize::from(self.overlaps)])?;
        self.modules.push(module);
        for stream in kernels {
            let bytes = stream.shared(self.dtype, stream.group);
            if bytes > shared {
                continue; // a card with less room takes the next, or the plain kernel
            }
            let kernel = function(module, stream.kernel)?;
            let set = |which, value: usize| {
                // SAFETY: the function is of a module that is loaded.
                unsafe { result::function::set_function_attribute(kernel, which, value as i32) }
                    .map_err(failed("cuFuncSetAttribute"))
            };
            use sys::CUfunction_attribute as Attribute;
            set(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes)?;
            if stream.slim {
                // Left to itself the driver makes room for three, and takes the first level apart for it and back again
                // between the products of a step (BENCHMARKS.md).
                let two = (200 * bytes).div_ceil(shared); // percent
                set(Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, two)?;
            }
            let &Stream { dim, group, team, stages, slim, .. } = stream;
            self.streams.push(Stream { kernel, dim, group, team, stages, slim });
        }
        self.sizes(function(module, c"stream_sizes")?, 2)
    }

    /// Attends from the step's tokens in one layer.
    pub fn attend(
        &self,
        pool: &Pool,
        step: &AttendStep<'_>,
        queries: DeviceView<'_>,
        scale: f32,
        out: &DeviceViewMut<'_>,
        lse: Option<&DeviceViewMut<'_>>,
    ) -> Result<()> {
        let [query_heads, tokens, dim] = queries.shape();
        assert_eq!(
            (out.shape(), dim, step.owners.words),
            (queries.shape(), pool.dim as usize, tokens)
        );
        let call = self.attend_call(pool, step, queries, scale, out, lse);
        if let Some(stream) = self.fast(pool, step, &queries) {
            let (shares, parts) = (step.shares.address, step.parts.address);
            let (cut, early) = (step.cut as u32, step.early.into());
            let call = StreamCall { attend: call, shares, parts, cut, early };
            let grid = Grid {
                blocks: self.blocks,
                threads: 32 * stream.team as u32,
                shared: stream.shared(self.dtype, step.group) as u32,
                overlaps: self.overlaps,
            };
            // SAFETY: as below; `shares` is the plan's, `parts` holds the parts of its cut, 0 between launches.
            // It may overlap: it waits before it reads what the kernel before writes.
            return unsafe { self.launch(stream.kernel, grid, &call) };
        }
        // SAFETY: the views hold what their shapes say; the arrays are a `Plan`'s, whose heads name ranges of its
        // pages, and pages of the pool; `lse`, if any, has a number for each row, as the caller has checked.
        unsafe { self.launch(self.attend, grid(query_heads * tokens, 4 * 4 * dim), &call) }
    }

    pub(super) fn attend_call(
        &self,
        pool: &Pool,
        step: &AttendStep<'_>,
        queries: DeviceView<'_>,
        scale: f32,
        out: &DeviceViewMut<'_>,
        lse: Option<&DeviceViewMut<'_>>,
    ) -> AttendCall {
        AttendCall {
            pool: pool.raw(),
            queries: queries.raw(),
            out: out.raw(),
            lse: lse.map_or(0, |lse| lse.raw().data),
            heads: step.heads.address,
            tables: step.tables.address,
            slots: step.slots.address,
            owners: step.owners.address,
            sequences: step.sequences as u32,
            group: step.group as u32,
            tokens: queries.shape()[1] as u32,
            scale,
        }
    }

    /// The fast kernel for it, if there is one.
    fn fast(
        &self,
        pool: &Pool,
        step: &AttendStep<'_>,
        queries: &DeviceView<'_>,
    ) -> Option<&Stream<sys::CUfunction>> {
        let RawView { data, head_stride, token_stride, dtype, .. } = queries.raw();
        // Queries are read two at a time.
        let even = data % 4 == 0 && head_stride % 2 == 0 && token_stride % 2 == 0;
        let made_for =
            (pool.dtype, dtype) == (self.dtype.code(), pool.queries()) && in_slabs(pool.page_size);
        let fits = |stream: &&Stream<_>| {
            stream.dim == pool.dim as usize
                && step.group <= stream.group
                && (!stream.slim || step.slim)
        };
        (step.single && made_for && even).then(|| self.streams.iter().find(fits))?
    }

    /// Room for what the blocks of a fast attention hand to each other: `count` parts of heads, 0 as they must be
    /// between launches.
    pub fn parts(&self, pool: &Pool, group: usize, count: usize) -> Result<Room> {
        let mut room =
            self.room(count * (group * (pool.dim as usize + 2)).next_multiple_of(4) * 4)?;
        self.zero(&mut room)?;
        Ok(room)
    }
}

// Mirrors of the structs in kernels/attend.cuh.

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct AttendCall {
    pool: RawPool,
    queries: RawView,
    out: RawView,
    lse: u64,
    heads: u64,
    tables: u64,
    slots: u64,
    owners: u64,
    sequences: u32,
    group: u32,
    tokens: u32,
    scale: f32,
}

#[repr(C)]
pub(super) struct StreamCall {
    attend: AttendCall,
    shares: u64,
    parts: u64,
    cut: u32,
    early: u32,
}
