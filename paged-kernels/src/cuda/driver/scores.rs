//! The score kernels: which of them serves a call, and its launch.

use super::map::{COLUMNS, Map, encode};
use super::{check_card, check_driver, failed, function, load};
use crate::cuda::scores::Surrogate;
use crate::cuda::view::{DeviceBits, DeviceView, DeviceViewMut};
use crate::error::Result;
use crate::shape::Dtype;
use cudarc::driver::result;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits, sys,
};
use half::bf16;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// PTX, with the zero byte that the driver looks for.
const PORTABLE: &str = concat!(include_str!("../../../kernels/scores.compute_80.ptx"), "\0");
const HOPPER: &str = concat!(include_str!("../../../kernels/scores.compute_90a.ptx"), "\0");

// What the kernels are made for; see kernels/scores.cu.

const THREADS: u32 = 256;
/// `scores_thin`: units and tokens of a block, and the most tokens it is asked for.
const THIN: [usize; 2] = [8, 32];
const THIN_MOST: usize = 64;
/// `scores_tile`: tokens of a block, and bytes of the tiles on their way.
const TILE_TOKENS: usize = 64;
const TILE_BYTES: usize = 3 * (64 + 128) * 128;
/// `scores_few`: blocks of a cluster, its units and tokens, and the most tokens it is asked for.
const FEW_BLOCKS: usize = 8;
const FEW: [usize; 2] = [32, 64];
const FEW_MOST: usize = 256;
/// Its kernels: the most tokens of a cluster.
const FEW_KERNELS: [(&CStr, usize); 3] =
    [(c"scores_few_8", 8), (c"scores_few_32", 32), (c"scores_few_64", 64)];
/// `scores_many`: blocks of a cluster, its tokens, and threads of a block.
const MANY_BLOCKS: usize = 4;
const MANY_TOKENS: usize = 128;
const MANY_THREADS: u32 = THREADS + 32;
/// Its kernels: units of a block, and blocks that fit a multiprocessor.
const MANY_KERNELS: [(&CStr, usize, usize); 4] = [
    (c"scores_many_64", 64, 2),
    (c"scores_many_128", 128, 2),
    (c"scores_many_160", 160, 1),
    (c"scores_many_256", 256, 1),
];
/// Shared memory of a block that the card keeps for itself.
const KEPT: usize = 1024;

/// Units up to which the tiles of any kernel may reach.
pub fn units_of_tiles(width: usize) -> usize {
    let many = many_for(width).map_or(0, |(_, units, _)| units * MANY_BLOCKS);
    width.next_multiple_of(128).max(many)
}

/// f32 that blocks of the kernels for few tokens hand to each other, and their counters. The card takes none of nothing.
pub fn exchange(width: usize, heads: usize) -> (usize, usize) {
    let few = width.div_ceil(FEW[0]) * FEW_MOST;
    let thin = width.div_ceil(THIN[0]) * THIN_MOST;
    let counters = (FEW_MOST / FEW[1] * FEW_BLOCKS).max(THIN_MOST / THIN[1]);
    ((few.max(thin) * heads).max(1), counters)
}

fn many_for(width: usize) -> Option<(&'static CStr, usize, usize)> {
    MANY_KERNELS.into_iter().find(|(_, units, _)| width <= units * MANY_BLOCKS)
}

/// Memory on the card and its address: to ask a slice for it queues events, which a graph would capture.
#[derive(Debug)]
pub struct Held<T> {
    pub slice: CudaSlice<T>,
    address: u64,
}

/// A checked call.
#[derive(Debug)]
pub struct Call<'a> {
    pub surrogate: &'a Surrogate,
    pub hidden: DeviceView<'a>,
    pub bits: DeviceBits<'a>,
    pub scores: Option<&'a DeviceViewMut<'a>>,
    pub threshold: f32,
    pub torch: bool,
}

/// A kernel for few or many tokens, of Hopper's.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    kernel: sys::CUfunction,
    /// Tokens of a cluster or units of a block.
    size: usize,
}

#[derive(Debug)]
struct Hopper {
    few: Vec<Kernel>,
    many: Vec<Kernel>,
}

/// The kernels, loaded for a stream's card.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    plain: sys::CUfunction,
    /// With their threads: for up to 8 heads, and for more.
    linear: [(sys::CUfunction, u32); 2],
    thin: sys::CUfunction,
    tile: sys::CUfunction,
    hopper: Option<Hopper>,
    multiprocessors: usize,
    /// Bytes of shared memory that a block may have, and that a multiprocessor has.
    shared: usize,
    shared_of_all: usize,
}

// SAFETY: the raw handles name a module and its functions, which any thread may use once the context is bound to it,
// as every method here does first.
unsafe impl Send for Kernels {}

impl Kernels {
    /// The fastest kernels of the card, or those that every card runs.
    pub fn load(stream: Arc<CudaStream>, fastest: bool) -> Result<Self> {
        let context = stream.context().clone();
        check_driver()?;
        let capability = check_card(&context)?;
        use sys::CUdevice_attribute_enum as Attribute;
        let attribute = |which| -> Result<usize> {
            Ok(context.attribute(which).map_err(failed("cuDeviceGetAttribute"))? as usize)
        };
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let shared_of_all =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        // Kernels for 9.0a run on 9.0 and on nothing newer.
        let hopper = fastest && capability == (9, 0);
        let image = if hopper { HOPPER } else { PORTABLE };
        let module = load(image)?;
        let function = |name: &CStr| function(module, name);
        // A kernel that may have all of a block's shared memory but what it has by itself.
        let roomy = |name: &CStr, own: usize| -> Result<sys::CUfunction> {
            let kernel = function(name)?;
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = (shared - own) as i32;
            // SAFETY: the function is of a module that is loaded.
            unsafe { result::function::set_function_attribute(kernel, which, bytes) }
                .map_err(failed("cuFuncSetAttribute"))?;
            Ok(kernel)
        };
        let sized = |name: &CStr, size: usize| -> Result<Kernel> {
            Ok(Kernel { kernel: roomy(name, OWN)?, size })
        };
        let hopper = if hopper {
            let few = FEW_KERNELS.map(|(name, tokens)| sized(name, tokens));
            let many = MANY_KERNELS.map(|(name, units, _)| sized(name, units));
            let few = few.into_iter().collect::<Result<_>>()?;
            Some(Hopper { few, many: many.into_iter().collect::<Result<_>>()? })
        } else {
            None
        };
        let kernels = Self {
            plain: roomy(c"scores_plain", OWN)?,
            linear: [
                (function(c"scores_linear_8")?, 512),
                (function(c"scores_linear_32")?, THREADS),
            ],
            thin: function(c"scores_thin")?,
            tile: roomy(c"scores_tile", OWN)?,
            hopper,
            multiprocessors,
            shared: shared - OWN,
            shared_of_all,
            module,
            context,
            stream,
        };
        let size = kernels.zeros::<u32>(1)?;
        let arguments = [argument(&size.address)];
        let sizes = function(c"scores_sizes")?;
        // SAFETY: the kernel writes one number to the address that is its only argument.
        unsafe { kernels.launch(sizes, Grid { threads: 1, ..Grid::of(1) }, &arguments) }?;
        let size = kernels.stream.clone_dtoh(&size.slice).map_err(failed("cuMemcpyDtoHAsync"))?;
        assert_eq!(size, [size_of::<RawCall>() as u32], "the kernels' struct is as mirrored here");
        Ok(kernels)
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Hidden units that the plain kernel holds.
    pub fn most_units(&self) -> usize {
        self.shared / 4
    }

    /// `data` on the card, or one zero for nothing.
    pub fn upload<T: DeviceRepr + ValidAsZeroBits>(&self, data: &[T]) -> Result<Held<T>> {
        if data.is_empty() {
            return self.zeros(1);
        }
        let slice = self.stream.clone_htod(data).map_err(failed("cuMemcpyHtoDAsync"))?;
        Ok(self.held(slice))
    }

    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, count: usize) -> Result<Held<T>> {
        let slice = self.stream.alloc_zeros(count).map_err(failed("cuMemAllocAsync"))?;
        Ok(self.held(slice))
    }

    fn held<T>(&self, slice: CudaSlice<T>) -> Held<T> {
        let (address, _) = slice.device_ptr(&self.stream);
        Held { address, slice }
    }

    /// `first` `[width, dim]` for the kernel that many tokens take, if one does.
    pub fn map_weights(&self, first: &Held<bf16>, width: usize, dim: usize) -> Result<Option<Map>> {
        let Some((_, units, _)) = many_for(width) else { return Ok(None) };
        if self.hopper.is_none() || width == 0 || !dim.is_multiple_of(COLUMNS) {
            return Ok(None);
        }
        encode(Dtype::Bf16, first.address, [dim, width], dim, units).map(Some)
    }

    /// Queues a call of at least one token.
    pub fn score(&self, call: &Call<'_>) -> Result<()> {
        let Surrogate { dim, width, heads, pitch, .. } = *call.surrogate;
        let tokens = call.hidden.shape()[1];
        let hidden = call.hidden.raw();
        let mut raw = RawCall {
            hidden: hidden.data,
            stride: hidden.token_stride,
            first: call.surrogate.first.address,
            first_bias: call.surrogate.first_bias.address,
            second: call.surrogate.second.address,
            second_bias: call.surrogate.second_bias.address,
            bits: call.bits.address(),
            scores: call.scores.map_or(0, |scores| scores.raw().data),
            parts: call.surrogate.parts.address,
            arrivals: call.surrogate.arrivals.address,
            tokens: tokens as u32,
            dim: dim as u32,
            width: width as u32,
            pitch: pitch as u32,
            heads: heads as u32,
            words: tokens.div_ceil(32) as u32,
            threshold: call.threshold,
            torch: call.torch.into(),
            stages: 0,
            unused: 0,
        };
        let stride = hidden.token_stride as usize;
        let aligned = hidden.data.is_multiple_of(16) && stride.is_multiple_of(8) && stride >= dim;
        let tile = TILE_BYTES + 4 * heads.next_multiple_of(8) * (TILE_TOKENS + 4) * 4;
        let words = tokens.div_ceil(32);
        let (kernel, grid) = if !aligned || !dim.is_multiple_of(COLUMNS) || !width.is_multiple_of(8)
        {
            (self.plain, Grid { shared: width * 4, ..Grid::of(words) })
        } else if width == 0 {
            let (kernel, threads) = self.linear[usize::from(heads > 8)];
            (kernel, Grid { threads, ..Grid::of(words) })
        } else if let Some((kernel, grid)) = self.few(tokens, width) {
            (kernel, grid)
        } else if let Some((kernel, grid, stages, map)) = self.many(call.surrogate, tokens) {
            raw.stages = stages as u32;
            let rows = MANY_TOKENS / MANY_BLOCKS;
            let hidden = encode(Dtype::Bf16, raw.hidden, [dim, tokens], stride, rows)?;
            let arguments = [argument(&raw), argument(&hidden), argument(&map)];
            // SAFETY: as below; the maps are of the hidden states and of the first weights.
            return unsafe { self.launch(kernel, grid, &arguments) };
        } else if self.hopper.is_none() && tokens <= THIN_MOST {
            let blocks = [width.div_ceil(THIN[0]), tokens.div_ceil(THIN[1])];
            (self.thin, Grid { blocks, ..Grid::of(1) })
        } else if tile <= self.shared {
            (self.tile, Grid { shared: tile, ..Grid::of(tokens.div_ceil(TILE_TOKENS)) })
        } else {
            (self.plain, Grid { shared: width * 4, ..Grid::of(words) })
        };
        // SAFETY: views and bits hold what their shapes say, which go with each other and the surrogate, as the caller has
        // checked; `second` is padded to `pitch` and to 8 heads with zeros; parts and counters are of `exchange`, the
        // counters 0 between launches.
        unsafe { self.launch(kernel, grid, &[argument(&raw)]) }
    }

    fn few(&self, tokens: usize, width: usize) -> Option<(sys::CUfunction, Grid)> {
        let hopper = self.hopper.as_ref().filter(|_| tokens <= FEW_MOST)?;
        let fits = |few: &&Kernel| tokens <= few.size || few.size == FEW[1];
        let few = hopper.few.iter().find(fits)?;
        let blocks = [width.div_ceil(FEW[0]) * FEW_BLOCKS, tokens.div_ceil(FEW[1])];
        // The block's sums, and each warp's; rows of 32 units are 36 apart.
        let shared = 9 * few.size * 36 * 4;
        Some((few.kernel, Grid { blocks, threads: THREADS, shared, overlaps: true }))
    }

    /// With the stages of its pipeline and the map of the weights.
    fn many(
        &self,
        surrogate: &Surrogate,
        tokens: usize,
    ) -> Option<(sys::CUfunction, Grid, usize, Map)> {
        let (hopper, map) = (self.hopper.as_ref()?, surrogate.map?);
        let (_, units, together) = many_for(surrogate.width)?;
        let many = hopper.many.iter().find(|many| many.size == units)?;
        let blocks = tokens.div_ceil(MANY_TOKENS) * MANY_BLOCKS;
        // Where there are more blocks than multiprocessors two of them share one: what one has to do after its tiles passes
        // while the other multiplies. Clusters do not find room on every last multiprocessor, and one that must wait for the
        // others doubles the time, so a tenth less counts as more. Few blocks are better off with all of the memory.
        let together = if blocks * 10 > self.multiprocessors * 9 { together } else { 1 };
        let room = (self.shared_of_all / together - KEPT).min(self.shared);
        let stage = (MANY_TOKENS + units) * 128;
        // With a pair of barriers each.
        let stages = (room / (stage + 16)).min(8);
        let shared = stages * (stage + 16);
        let grid = Grid { blocks: [blocks, 1], threads: MANY_THREADS, shared, overlaps: true };
        Some((many.kernel, grid, stages, map))
    }

    /// # Safety
    /// `arguments` must be those of `kernel`, and its addresses must hold what the kernel reads and writes until it has
    /// run. A kernel that overlaps must wait for the one before by itself.
    unsafe fn launch(
        &self,
        kernel: sys::CUfunction,
        grid: Grid,
        arguments: &[*mut c_void],
    ) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks[0] as u32,
            gridDimY: grid.blocks[1] as u32,
            gridDimZ: 1,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut overlap,
            numAttrs: grid.overlaps.into(),
        };
        let (arguments, extra) = (arguments.as_ptr().cast_mut(), std::ptr::null_mut());
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&raw const config, kernel, arguments, extra) }
            .result()
            .map_err(failed("cuLaunchKernelEx"))
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: nothing else names the module's functions, and unloading waits for what still runs.
            self.context.record_err(unsafe { result::module::unload(self.module) });
        }
    }
}

/// Static shared memory of the kernels that take dynamic, at most: on Hopper the compiler counts in what the card keeps.
const OWN: usize = 2 * KEPT;

fn argument<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
struct Grid {
    blocks: [usize; 2],
    threads: u32,
    /// Bytes of dynamic shared memory.
    shared: usize,
    overlaps: bool,
}

impl Grid {
    fn of(blocks: usize) -> Self {
        Self { blocks: [blocks, 1], threads: THREADS, shared: 0, overlaps: false }
    }
}

/// Mirror of `Scores` in kernels/scores.cu.
#[repr(C)]
struct RawCall {
    hidden: u64,
    stride: i64,
    first: u64,
    first_bias: u64,
    second: u64,
    second_bias: u64,
    bits: u64,
    scores: u64,
    parts: u64,
    arrivals: u64,
    tokens: u32,
    dim: u32,
    width: u32,
    pitch: u32,
    heads: u32,
    words: u32,
    threshold: f32,
    torch: u32,
    stages: u32,
    unused: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_every_kernel_end_within_the_padding() {
        for width in 1..3000 {
            let padded = units_of_tiles(width);
            assert!(padded >= width && padded.is_multiple_of(128), "{width}");
            if let Some((_, units, _)) = many_for(width) {
                assert!((width..=padded).contains(&(units * MANY_BLOCKS)), "{width}");
            }
        }
        assert!(many_for(1024).is_some() && many_for(1025).is_none());
    }

    #[test]
    fn parts_have_room_for_the_most_tokens() {
        let (parts, counters) = exchange(512, 8);
        assert_eq!((parts, counters), (64 * 64 * 8, 32));
        assert_eq!(exchange(0, 3), (1, 32));
    }
}
