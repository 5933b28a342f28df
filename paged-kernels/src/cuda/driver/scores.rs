//! The score kernels: which of them serves a call, and its launch.

use super::map::{COLUMNS, encode};
use super::{check_card, check_driver, failed, function, load};
use crate::cuda::scores::{MAX_HEADS, Surrogate};
use crate::cuda::view::{DeviceBits, DeviceView, DeviceViewMut};
use crate::error::Result;
use crate::shape::Dtype;
use cudarc::driver::result;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits, sys,
};
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// PTX, with the zero byte that the driver looks for.
const PORTABLE: &str = concat!(include_str!("../../../kernels/scores.compute_80.ptx"), "\0");
const HOPPER: &str = concat!(include_str!("../../../kernels/scores_hopper.compute_90a.ptx"), "\0");

// What the kernels are made for; see kernels/scores.cu and kernels/scores_hopper.cu.

const THREADS: u32 = 256;
/// `scores_thin`: units and tokens of a block, and the most tokens it is asked for.
const THIN: [usize; 2] = [8, 32];
const THIN_MOST: usize = 64;
/// `scores_tile`: tokens of a block, and bytes of the tiles on their way.
const TILE_TOKENS: usize = 64;
const TILE_BYTES: usize = 3 * (64 + 128) * 128;
/// `scores_few`: blocks of a cluster, its units, and the most tokens it is asked for.
const FEW_BLOCKS: usize = 8;
const FEW_UNITS: usize = 32;
const FEW_MOST: usize = 32;
/// Its kernels, and the most tokens of each.
const FEW_KERNELS: [(&CStr, usize); 2] = [(c"scores_few_8", 8), (c"scores_few_32", FEW_MOST)];
/// `scores_many`, in the order in which they are asked: those whose clusters share columns, then those that have all of
/// them, then those that have all units too and take any number of tokens.
const MANY_KERNELS: [Many<&CStr>; 12] = [
    many(c"scores_many_64_1_8", 64, 1, [1, 8], 64),
    many(c"scores_many_128_1_8", 128, 1, [1, 8], 128),
    many(c"scores_many_128_1_4", 128, 1, [1, 4], 128),
    many(c"scores_many_176_1_4", 176, 1, [1, 4], 128),
    many(c"scores_many_216_1_4", 216, 1, [1, 4], 128),
    many(c"scores_many_128_1_2", 128, 1, [1, 2], 128),
    many(c"scores_many_160_1_2", 160, 1, [1, 2], 128),
    many(c"scores_many_128_2_1", 128, 1, [2, 1], 128),
    many(c"scores_many_160_2_1", 160, 1, [2, 1], 128),
    many(c"scores_many_256_2_1", 256, 1, [2, 1], 128),
    many(c"scores_many_320_2_1", 160, 2, [2, 1], 128),
    many(c"scores_many_256_4_1", 256, 1, [4, 1], 128),
];
const MANY_TOKENS: usize = 128;
/// Tokens up to which smaller tiles are better.
const SHORT_MOST: usize = 128;

const fn many(
    kernel: &CStr,
    units: usize,
    boxes: usize,
    [columns, sharers]: [usize; 2],
    rows: usize,
) -> Many<&CStr> {
    Many { kernel, units, boxes, columns, sharers, rows, stages: 0, clusters: 0 }
}

/// The most stages of a pipeline.
const MOST_STAGES: usize = 8;
/// Shared memory of a block that the card keeps for itself.
const KEPT: usize = 1024;

/// Units up to which the tiles of any kernel may reach.
pub fn units_of_tiles(width: usize) -> usize {
    width.next_multiple_of(128)
}

/// f32 that blocks of the kernels for few tokens hand to each other. The card takes none of nothing.
pub fn parts(width: usize, heads: usize) -> usize {
    let few = width.div_ceil(FEW_UNITS) * FEW_BLOCKS * 8;
    let thin = width.div_ceil(THIN[0]) * THIN_MOST;
    (few.max(thin) * heads).max(1)
}

fn zeros<T: DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    count: usize,
) -> Result<Held<T>> {
    Ok(held(stream.alloc_zeros(count).map_err(failed("cuMemAllocAsync"))?, stream))
}

fn held<T>(slice: CudaSlice<T>, stream: &CudaStream) -> Held<T> {
    let (address, _) = slice.device_ptr(stream);
    Held { address, slice }
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

/// A kernel for few tokens, of Hopper's.
#[derive(Debug, Clone, Copy)]
struct Few {
    kernel: sys::CUfunction,
    tokens: usize,
}

/// A kernel for many tokens, of Hopper's.
#[derive(Debug, Clone, Copy)]
struct Many<K> {
    kernel: K,
    /// Units that the copy engine fetches at once, and how often for a block.
    units: usize,
    boxes: usize,
    /// Blocks of a cluster that have the same tokens, and blocks that share their columns.
    columns: usize,
    sharers: usize,
    /// Tokens of a cluster.
    rows: usize,
    /// Of the pipeline.
    stages: usize,
    /// That find room on the card at once.
    clusters: usize,
}

impl<K> Many<K> {
    fn cluster(&self) -> usize {
        self.columns * self.sharers
    }

    fn stage_bytes(&self) -> usize {
        (self.rows + self.units * self.boxes) * 128 + 16 // with a pair of barriers
    }

    /// Two blocks fit a multiprocessor, and one has what they share.
    fn blocks_together(&self) -> usize {
        if self.rows < MANY_TOKENS { 2 } else { 1 }
    }

    /// Tiles of tokens and clusters of units of a call, if the kernel is for it: where clusters have not all units or not all
    /// columns, it must be run at once, since that is what it is better at.
    fn tiles(&self, tokens: usize, width: usize) -> Option<[usize; 2]> {
        let clusters = width.div_ceil(self.units * self.boxes * self.columns);
        let tiles = tokens.div_ceil(self.rows);
        let fits = self.sharers == 1 && clusters == 1 || tiles * clusters <= self.clusters;
        let short = self.rows == MANY_TOKENS || tokens <= SHORT_MOST;
        (fits && short).then_some([tiles, clusters])
    }

    /// f32 of the products that the most clusters leave each other.
    fn parts(&self) -> usize {
        self.clusters * MAX_HEADS * self.rows
    }
}

#[derive(Debug)]
struct Hopper {
    module: sys::CUmodule,
    few: Vec<Few>,
    many: Vec<Many<sys::CUfunction>>,
    /// Products that clusters leave each other.
    parts: Held<f32>,
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
    /// Bytes of shared memory that a block may have.
    shared: usize,
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
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let shared_of_all =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let module = load(PORTABLE)?;
        // A kernel that may have so much of a block's shared memory.
        let roomy = |module, name: &CStr, bytes: usize| -> Result<sys::CUfunction> {
            let kernel = function(module, name)?;
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a module that is loaded.
            unsafe { result::function::set_function_attribute(kernel, which, bytes as i32) }
                .map_err(failed("cuFuncSetAttribute"))?;
            Ok(kernel)
        };
        // Kernels for 9.0a run on 9.0 and on nothing newer.
        let hopper = if fastest && capability == (9, 0) {
            let module = load(HOPPER)?;
            let few = FEW_KERNELS.map(|(name, tokens)| -> Result<_> {
                Ok(Few { kernel: roomy(module, name, shared - OWN)?, tokens })
            });
            let many = MANY_KERNELS.map(|many| -> Result<_> {
                let room = (shared_of_all / many.blocks_together() - KEPT).min(shared) - OWN;
                let stages = (room / many.stage_bytes()).min(MOST_STAGES);
                let kernel = roomy(module, many.kernel, stages * many.stage_bytes())?;
                let Many { units, boxes, columns, sharers, rows, .. } = many;
                let many =
                    Many { kernel, units, boxes, columns, sharers, rows, stages, clusters: 0 };
                Ok(Many { clusters: clusters(&many)?, ..many })
            });
            let many = many.into_iter().collect::<Result<Vec<_>>>()?;
            let parts = many.iter().map(Many::parts).max().unwrap_or(0);
            Some(Hopper {
                module,
                few: few.into_iter().collect::<Result<_>>()?,
                many,
                parts: zeros(&stream, parts)?,
            })
        } else {
            None
        };
        let kernels = Self {
            plain: roomy(module, c"scores_plain", shared - OWN)?,
            linear: [
                (function(module, c"scores_linear_8")?, 512),
                (function(module, c"scores_linear_32")?, THREADS),
            ],
            thin: function(module, c"scores_thin")?,
            tile: roomy(module, c"scores_tile", shared - OWN)?,
            hopper,
            shared: shared - OWN,
            module,
            context,
            stream,
        };
        let size = kernels.zeros::<u32>(1)?;
        let arguments = [argument(&size.address)];
        let sizes = function(module, c"scores_sizes")?;
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
        Ok(held(slice, &self.stream))
    }

    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, count: usize) -> Result<Held<T>> {
        zeros(&self.stream, count)
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
        } else if let Some((many, [tiles, clusters], hopper)) = self.many(tokens, width) {
            raw.stages = many.stages as u32;
            raw.parts = hopper.parts.address;
            let hidden = [dim, tokens];
            let hidden = encode(Dtype::Bf16, raw.hidden, hidden, stride, many.rows / many.columns)?;
            let first = encode(Dtype::Bf16, raw.first, [dim, width], dim, many.units)?;
            let arguments = [argument(&raw), argument(&hidden), argument(&first)];
            let grid = many.grid(tiles, clusters);
            // SAFETY: as below; the maps are of the hidden states and of the first weights.
            return unsafe { self.launch(many.kernel, grid, &arguments) };
        } else if self.hopper.is_none() && tokens <= THIN_MOST {
            let blocks = [width.div_ceil(THIN[0]), tokens.div_ceil(THIN[1])];
            (self.thin, Grid { blocks, ..Grid::of(1) })
        } else if tile <= self.shared {
            (self.tile, Grid { shared: tile, ..Grid::of(tokens.div_ceil(TILE_TOKENS)) })
        } else {
            (self.plain, Grid { shared: width * 4, ..Grid::of(words) })
        };
        // SAFETY: views and bits hold what their shapes say, which go with each other and the surrogate, as the caller has
        // checked; `second` is padded to `pitch` and to 8 heads with zeros; `parts` is as large as its function says, and 0
        // between launches.
        unsafe { self.launch(kernel, grid, &[argument(&raw)]) }
    }

    fn few(&self, tokens: usize, width: usize) -> Option<(sys::CUfunction, Grid)> {
        let few = self.hopper.as_ref()?.few.iter().find(|few| tokens <= few.tokens)?;
        let blocks = [width.div_ceil(FEW_UNITS) * FEW_BLOCKS, 1];
        // The block's sums, and each warp's; rows of 32 units are 36 apart.
        let shared = 9 * few.tokens * 36 * 4;
        Some((few.kernel, Grid { blocks, threads: THREADS, shared, overlaps: true }))
    }

    fn many(
        &self,
        tokens: usize,
        width: usize,
    ) -> Option<(&Many<sys::CUfunction>, [usize; 2], &Hopper)> {
        let hopper = self.hopper.as_ref()?;
        let made_for = |many: &'_ Many<_>| many.tiles(tokens, width);
        hopper.many.iter().find_map(|many| Some((many, made_for(many)?, hopper)))
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
        let config = grid.config(self.stream.cu_stream(), &raw mut overlap, grid.overlaps.into());
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
            if let Some(hopper) = &self.hopper {
                // SAFETY: as above.
                self.context.record_err(unsafe { result::module::unload(hopper.module) });
            }
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

    fn config(
        &self,
        stream: sys::CUstream,
        attributes: *mut sys::CUlaunchAttribute,
        count: u32,
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.blocks[0] as u32,
            gridDimY: self.blocks[1] as u32,
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared as u32,
            hStream: stream,
            attrs: attributes,
            numAttrs: count,
        }
    }
}

impl Many<sys::CUfunction> {
    fn grid(&self, tiles: usize, clusters: usize) -> Grid {
        let threads = THREADS + if self.boxes > 1 { 128 } else { 32 };
        let blocks = [tiles * self.cluster(), clusters];
        Grid { blocks, threads, shared: self.stages * self.stage_bytes(), overlaps: true }
    }
}

/// Clusters of a kernel that find room on the card at once.
fn clusters(many: &Many<sys::CUfunction>) -> Result<usize> {
    let mut shape = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: many.cluster() as u32,
                y: 1,
                z: 1,
            },
        },
    };
    let config = many.grid(1, 1).config(std::ptr::null_mut(), &raw mut shape, 1);
    let mut clusters = 0;
    // SAFETY: the function is of a module that is loaded; the attribute outlives the call.
    unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut clusters, many.kernel, &raw const config) }
        .result()
        .map_err(failed("cuOccupancyMaxActiveClusters"))?;
    Ok(clusters as usize)
}

/// Mirror of `Scores` in kernels/scores.cuh.
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

    /// As many of each kernel's clusters as an H100 has room for.
    fn kernels() -> impl Iterator<Item = Many<&'static CStr>> {
        MANY_KERNELS.into_iter().map(|many| {
            let clusters = [0, 0, 66, 0, 30, 0, 0, 0, 15][many.cluster()];
            Many { clusters: clusters * many.blocks_together(), ..many }
        })
    }

    fn chosen(tokens: usize, width: usize) -> Option<(&'static CStr, [usize; 2])> {
        kernels().find_map(|many| Some((many.kernel, many.tiles(tokens, width)?)))
    }

    #[test]
    fn any_number_of_tokens_has_a_kernel_up_to_1024_units() {
        for width in (8..=1024).step_by(8) {
            assert!([33, 5_000, 100_000_000].iter().all(|&tokens| chosen(tokens, width).is_some()));
        }
        assert_eq!(chosen(64, 512), Some((c"scores_many_64_1_8", [1, 8])));
        assert_eq!(chosen(1024, 512), Some((c"scores_many_176_1_4", [8, 3])));
        assert_eq!(chosen(1024, 640), Some((c"scores_many_216_1_4", [8, 3])));
        assert_eq!(chosen(1536, 512), Some((c"scores_many_128_1_2", [12, 4])));
        assert_eq!(chosen(4096, 512), Some((c"scores_many_128_2_1", [32, 2])));
        assert_eq!(chosen(4096, 640), Some((c"scores_many_160_2_1", [32, 2])));
        assert_eq!(chosen(8192, 640), Some((c"scores_many_320_2_1", [64, 1])));
        assert_eq!(chosen(100_000, 1032), None);
    }

    #[test]
    fn products_have_room_for_all_clusters() {
        for (many, heads) in kernels().flat_map(|many| (1..=MAX_HEADS).map(move |n| (many, n))) {
            // As in the kernel: those of a block in whole warps, and each block's behind those of the units before.
            let decided = many.rows / many.cluster();
            let block = (heads * decided).next_multiple_of(32);
            assert!(many.clusters * many.cluster() * block <= many.parts(), "{many:?} {heads}");
        }
    }

    #[test]
    fn parts_have_room_for_the_most_tokens() {
        assert_eq!(parts(512, 8), 64 * 64 * 8);
        assert_eq!(parts(0, 3), 1);
    }
}
