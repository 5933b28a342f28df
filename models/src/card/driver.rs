//! The kernels of a decode step, their launches and graphs.
//!
//! A launch checks what it names, and what it names must live until it has run: that of a graph, as long as the graph.
#![allow(unsafe_code)]

mod norms;
mod scored;
mod turn;

pub(super) use norms::{AddNormed, NormWhole};
pub(crate) use scored::Scored;
pub(crate) use turn::{Turn, Turner};

use super::memory::{Element, address, after_torch, before_torch, device, layout, optional};
use crate::error::{Error, Result};
use crate::layers::Linear;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream};
use std::ffi::{CString, c_void};
use std::sync::Arc;
use tch::{Kind, Tensor};

const PTX: &str = concat!(include_str!("../../kernels/step.compute_80.ptx"), "\0");
const PTX_HOPPER: &str = concat!(include_str!("../../kernels/step.compute_90.ptx"), "\0");
const SAMPLE: &str = concat!(include_str!("../../kernels/sample.compute_80.ptx"), "\0");
const SAMPLE_HOPPER: &str = concat!(include_str!("../../kernels/sample.compute_90.ptx"), "\0");
const NORMS: &str = concat!(include_str!("../../kernels/norms.compute_80.ptx"), "\0");
const NORMS_HOPPER: &str = concat!(include_str!("../../kernels/norms.compute_90.ptx"), "\0");
const THREADS: u32 = 256;
/// Threads of a block that draws a token.
const DRAWERS: u32 = 1024;
/// Rows of a product's tile.
pub(super) const ROWS: usize = 16;
/// Columns that the kernels of a product have room for.
const WIDTHS: [usize; 4] = [8, 16, 32, 64];
/// Parts of a column's squares that a tile, or a token, brings.
pub(super) const PARTS: usize = 4;
/// Bytes of a stage of a block's ring of weights, and, for each column, of its warps' sums, twice: of kernels/step.cu.
const STAGE: usize = 8 * 4096;
const COLUMN_SUMS: usize = 2 * 8 * ROWS * 4;
/// Times [`ROWS`] that a tile has, by width.
const TALL: [usize; 4] = [1, 1, 2, 2];
/// Stages of a ring, at most and at least: more would leave no room for a block of attention. And shared memory that is the
/// compiler's.
const STAGES: [usize; 2] = [4, 2];
const ASIDE: usize = 1024;
/// The most columns of a step.
pub(super) const MOST_COLUMNS: usize = 64;

pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        let error = text.unwrap_or_else(|_| format!("{:?}", error.0));
        Error::Cache(paged_kernels::Error::Cuda { call, error })
    }
}

/// The step's kernels on a card, launched on one stream.
pub(super) struct Kernels {
    stream: Arc<CudaStream>,
    modules: [sys::CUmodule; 3],
    /// By width.
    products: Vec<sys::CUfunction>,
    embed: sys::CUfunction,
    seat: sys::CUfunction,
    draw: sys::CUfunction,
    add_normed: sys::CUfunction,
    norm_whole: sys::CUfunction,
    /// Whether a kernel may start while the one before it ends.
    overlaps: bool,
    multiprocessors: usize,
    /// Of a ring, by width.
    stages: [usize; 4],
}

// SAFETY: the raw handles name a module and its functions, which any thread may use once the context is bound to it, as
// every method here does first.
unsafe impl Send for Kernels {}
// SAFETY: as above, and its methods change nothing of it.
unsafe impl Send for Turner {}
// SAFETY: as above.
unsafe impl Sync for Turner {}
// SAFETY: as above.
unsafe impl Send for Scored {}
// SAFETY: as above.
unsafe impl Sync for Scored {}

impl Kernels {
    /// Loads them onto the card of `stream`, on which a cache works already.
    pub fn load(stream: Arc<CudaStream>) -> Result<Self> {
        let context = stream.context().clone();
        let capability = context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?;
        let overlaps = capability >= (9, 0);
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("cuDeviceGetAttribute"))?;
        let shared = context
            .attribute(
                sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )
            .map_err(failed("cuDeviceGetAttribute"))?;
        let stages = WIDTHS
            .map(|width| (shared as usize).saturating_sub(width * COLUMN_SUMS + ASIDE) / STAGE);
        if stages[0] < STAGES[1] {
            let what = "ring of weights that fits this card's shared memory";
            return Err(Error::Step { what, advice: "take one with 80 KB a block or more" });
        }
        let stages = stages.map(|stages| stages.min(STAGES[0]));
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let [step, sample, norms] = match overlaps {
            true => [PTX_HOPPER, SAMPLE_HOPPER, NORMS_HOPPER],
            false => [PTX, SAMPLE, NORMS],
        }
        .map(load);
        let modules = [step?, sample?, norms?];
        let [step, sample, norms] = modules;
        let product = |(width, stages): (usize, usize)| {
            let product = function(step, &format!("step_product_{width}"))?;
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            let bytes = room(width, stages) as i32;
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(product, SHARED, bytes) }
                .map_err(failed("cuFuncSetAttribute"))?;
            Ok(product)
        };
        let kernels = Self {
            products: WIDTHS.into_iter().zip(stages).map(product).collect::<Result<_>>()?,
            embed: function(step, "step_embed")?,
            seat: function(step, "step_seat")?,
            draw: function(sample, "sample_draw")?,
            add_normed: function(norms, "norms_add")?,
            norm_whole: function(norms, "norms_whole")?,
            stream,
            modules,
            overlaps,
            multiprocessors: multiprocessors as usize,
            stages,
        };
        let sizes = Tensor::f_zeros([6], (Kind::Int, device(&kernels.stream)))?;
        after_torch(&kernels.stream)?;
        let start = address(&sizes, Kind::Int, 6)?;
        kernels.launch(function(step, "step_sizes")?, grid(1, 1), &start)?;
        kernels.launch(function(sample, "sample_sizes")?, grid(1, 1), &(start + 12))?;
        kernels.launch(function(norms, "norms_sizes")?, grid(1, 1), &(start + 16))?;
        before_torch(&kernels.stream)?;
        let sizes = Vec::<i32>::try_from(&sizes)?;
        let mirrored = [
            size_of::<ProductCall>(),
            size_of::<EmbedCall>(),
            size_of::<SeatCall>(),
            size_of::<DrawCall>(),
            size_of::<norms::AddNormedCall>(),
            size_of::<norms::NormWholeCall>(),
        ];
        assert_eq!(
            sizes,
            mirrored.map(|size| size as i32),
            "the kernels' structs are as they are mirrored here"
        );
        Ok(kernels)
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// `end` of `input` times the rows of `weights`, one after the other.
    pub fn product(&self, call: Product<'_>) -> Result<()> {
        let Product { weight, more, input, norm, columns, end } = call;
        let (rows, inner) = matrix(weight)?;
        let mut raw = ProductCall {
            weight: address(&weight.weight, Kind::BFloat16, rows * inner)?,
            bias: optional(weight.bias.as_ref(), Kind::BFloat16, rows)?,
            input: address(input.tensor, Kind::BFloat16, columns * inner)?,
            rows: rows as u32,
            inner: inner as u32,
            columns: columns as u32,
            run: input.run as u32,
            run_inverse: (1u64 << 32).div_ceil(input.run as u64) as u32,
            run_stride: input.run_stride as u32,
            column_stride: input.column_stride as u32,
            ..ProductCall::default()
        };
        let mut total = rows;
        if let Some(more) = more {
            let (rows, width) = matrix(more)?;
            assert_eq!(
                (width, total % 8),
                (inner, 0),
                "joined rows are of one width, eight by eight"
            );
            (raw.more, raw.more_rows) =
                (address(&more.weight, Kind::BFloat16, rows * inner)?, rows as u32);
            raw.more_bias = optional(more.bias.as_ref(), Kind::BFloat16, rows)?;
            total += rows;
        }
        if let Some(norm) = norm {
            raw.squares = address(norm.squares, Kind::Float, columns * norm.parts)?;
            (raw.parts, raw.epsilon) = (norm.parts as u32, norm.epsilon);
        }
        let mut tiles = total.div_ceil(ROWS);
        raw.kind = match end {
            End::Store(out) => {
                raw.out = address(out, Kind::BFloat16, columns * total)?;
                0
            }
            End::Gated(out) => {
                raw.out = address(out, Kind::BFloat16, columns * rows / 2)?;
                tiles = (rows / 2).div_ceil(ROWS / 2);
                1
            }
            End::Add { residual, norm, normed, squares } => {
                raw.residual = address(residual, Kind::Float, columns * rows)?;
                raw.norm = address(norm, Kind::BFloat16, rows)?;
                raw.normed = address(normed, Kind::BFloat16, columns * rows)?;
                raw.next_squares = address(squares, Kind::Float, columns * tiles * PARTS)?;
                raw.next_parts = (tiles * PARTS) as u32;
                2
            }
            End::Score { scores, best, vocabulary } => {
                raw.out = address(scores, Kind::Float, columns * rows)?;
                raw.best = address(best, Kind::Int64, columns)?;
                raw.vocabulary = vocabulary as u32;
                3
            }
        };
        let width = self.width(columns)?;
        raw.stages = self.stages[width] as u32;
        tiles = tiles.div_ceil(TALL[width]);
        raw.tiles = tiles as u32;
        let grid = Grid {
            blocks: tiles.min(self.multiprocessors),
            threads: THREADS,
            shared: room(WIDTHS[width], self.stages[width]),
        };
        self.launch(self.products[width], grid, &raw)
    }

    /// Which kernels have room for so many columns.
    fn width(&self, columns: usize) -> Result<usize> {
        let mut widths = WIDTHS.iter().zip(self.stages);
        widths.position(|(&width, stages)| columns <= width && stages >= STAGES[1]).ok_or(
            Error::Step { what: "batch so large on this card", advice: "take a smaller one" },
        )
    }

    /// What the first layer reads of each column's token.
    pub fn embed(&self, call: Embed<'_>) -> Result<()> {
        let [vocabulary, width] = call.embedding.size()[..] else { unreachable!("a matrix") };
        let (vocabulary, width) = (vocabulary as usize, width as usize);
        let Stream { residual, normed, squares } = call.stream;
        let raw = EmbedCall {
            embedding: address(call.embedding, Kind::BFloat16, vocabulary * width)?,
            tokens: address(call.tokens, Kind::Int, call.columns)?,
            residual: address(residual, Kind::Float, call.columns * width)?,
            norm: address(call.norm, Kind::BFloat16, width)?,
            normed: address(normed, Kind::BFloat16, call.columns * width)?,
            squares: address(squares, Kind::Float, call.columns * PARTS)?,
            width: width as u32,
            vocabulary: vocabulary as u32,
        };
        self.launch(self.embed, grid(call.columns, THREADS), &raw)
    }

    /// Seats another batch: of each column the token of a place before, or, where that is negative, a fresh one.
    pub fn seat(
        &self,
        tokens: &Tensor,
        from: &Tensor,
        fresh: &Tensor,
        columns: usize,
    ) -> Result<()> {
        let [tokens, from, fresh] =
            [tokens, from, fresh].map(|tensor| address(tensor, Kind::Int, columns));
        let raw = SeatCall {
            tokens: tokens?,
            from: from?,
            fresh: fresh?,
            columns: columns as u32,
            unused: 0,
        };
        self.launch(self.seat, grid(1, MOST_COLUMNS as u32), &raw)
    }

    /// Draws each column's token.
    pub fn draw(&self, call: Draw<'_>) -> Result<()> {
        let Draw { scores, best, draws, tokens, positions, columns, rows, vocabulary } = call;
        let raw = DrawCall {
            scores: address(scores, Kind::Float, columns * rows)?,
            best: address(best, Kind::Int64, columns)?,
            temperatures: address(&draws.temperatures, Kind::Float, columns)?,
            tops: address(&draws.tops, Kind::Int, columns)?,
            nuclei: address(&draws.nuclei, Kind::Float, columns)?,
            randoms: address(&draws.randoms, Kind::Double, columns)?,
            tokens: address(tokens, Kind::Int, columns)?,
            positions: address(positions, Kind::Float, columns)?,
            rows: rows as u32,
            vocabulary: vocabulary as u32,
        };
        self.launch(self.draw, grid(columns, DRAWERS), &raw)
    }

    /// Copies `data` to the front of `tensor`, in the order of the stream. Returns once `data` may go.
    pub fn upload<T: Element>(&self, data: &[T], tensor: &Tensor) -> Result<()> {
        let to = address(tensor, T::KIND, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        self.stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: the tensor holds as many elements of this type, and the copy from pageable memory has taken it all in when
        // the call returns.
        unsafe { result::memcpy_htod_async(to, data, self.stream.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Puts what `work` launches into a graph.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        let relaxed = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.stream.begin_capture(relaxed).map_err(failed("cuStreamBeginCapture"))?;
        let done = work();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        done?;
        let empty = || DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        let graph = graph.and_then(|graph| graph.ok_or_else(empty));
        let graph = graph.map_err(failed("cuStreamEndCapture"))?;
        graph.upload().map_err(failed("cuGraphUpload"))?;
        Ok(graph)
    }

    fn launch<T>(&self, kernel: sys::CUfunction, grid: Grid, call: &T) -> Result<()> {
        launch(&self.stream, self.overlaps, kernel, grid, call)
    }
}

/// Launches a kernel whose only argument is `call`; `overlaps` if it may start while the one before it ends.
fn launch<T>(
    stream: &CudaStream,
    overlaps: bool,
    kernel: sys::CUfunction,
    grid: Grid,
    call: &T,
) -> Result<()> {
    stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
    let mut overlap = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid.blocks as u32,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared as u32,
        hStream: stream.cu_stream(),
        attrs: &raw mut overlap,
        numAttrs: overlaps.into(),
    };
    let mut arguments = [std::ptr::from_ref(call).cast_mut().cast::<c_void>()];
    let (arguments, extra) = (arguments.as_mut_ptr(), std::ptr::null_mut());
    // SAFETY: `call` is the kernel's argument, which the driver copies before it returns; its addresses are of tensors
    // that hold what the kernel reads and writes, as the methods of this module have checked, and live as it says.
    unsafe { sys::cuLaunchKernelEx(&raw const config, kernel, arguments, extra) }
        .result()
        .map_err(failed("cuLaunchKernelEx"))
}

impl Drop for Kernels {
    fn drop(&mut self) {
        unload(&self.stream, &self.modules);
    }
}

/// Ends modules of which no function is named any more.
fn unload(stream: &CudaStream, modules: &[sys::CUmodule]) {
    let context = stream.context();
    if context.bind_to_thread().is_ok() {
        for &module in modules {
            // SAFETY: nothing else names the module's functions, and unloading waits for what still runs.
            context.record_err(unsafe { result::module::unload(module) });
        }
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy)]
struct Grid {
    blocks: usize,
    threads: u32,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

fn grid(blocks: usize, threads: u32) -> Grid {
    Grid { blocks, threads, shared: 0 }
}

/// Bytes of a product's shared memory for so many columns.
fn room(width: usize, stages: usize) -> usize {
    stages * STAGE + width * COLUMN_SUMS
}

/// A product of few columns with a weight, or with two whose rows follow each other.
pub(super) struct Product<'a> {
    pub weight: &'a Linear,
    pub more: Option<&'a Linear>,
    pub input: Input<'a>,
    pub norm: Option<Norm<'a>>,
    pub columns: usize,
    pub end: End<'a>,
}

/// bf16: element `i` of column `c` is `i / run * run_stride + c * column_stride + i % run`; runs are of a multiple of 8.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub tensor: &'a Tensor,
    pub run: usize,
    pub run_stride: usize,
    pub column_stride: usize,
}

/// The norm of the inputs, of which the weight is in them already.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    /// f32 `[columns, parts]`.
    pub squares: &'a Tensor,
    pub parts: usize,
    pub epsilon: f32,
}

/// What becomes of a product.
pub(super) enum End<'a> {
    /// bf16 `[columns, rows]`, with bias.
    Store(&'a Tensor),
    /// bf16 `[columns, rows / 2]`: SiLU of the first half times the second.
    Gated(&'a Tensor),
    /// Added to the residual stream, f32 `[columns, rows]`, with bias, and made ready for the next norm.
    Add { residual: &'a Tensor, norm: &'a Tensor, normed: &'a Tensor, squares: &'a Tensor },
    /// f32 `[columns, rows]`, and the best of those under `vocabulary`.
    Score { scores: &'a Tensor, best: &'a Tensor, vocabulary: usize },
}

/// The residual stream of each column, f32 and bf16 `[columns, width]`, and the sums of its squares, f32 `[columns, parts]`.
#[derive(Clone, Copy)]
pub(super) struct Stream<'a> {
    pub residual: &'a Tensor,
    pub normed: &'a Tensor,
    pub squares: &'a Tensor,
}

/// See [`Kernels::embed`].
pub(super) struct Embed<'a> {
    /// bf16 `[vocabulary, width]`.
    pub embedding: &'a Tensor,
    /// i32 `[columns]`.
    pub tokens: &'a Tensor,
    /// The first layer's norm, bf16 `[width]`.
    pub norm: &'a Tensor,
    pub stream: Stream<'a>,
    pub columns: usize,
}

/// How each column draws.
pub(super) struct Draws {
    /// f32: 0 takes the likeliest.
    pub temperatures: Tensor,
    /// i32: only so many of the likeliest; 0 is no limit.
    pub tops: Tensor,
    /// f32: only the likeliest that reach this probability.
    pub nuclei: Tensor,
    /// f64, from 0 up to 1: the chance.
    pub randoms: Tensor,
}

/// See [`Kernels::draw`].
pub(super) struct Draw<'a> {
    /// f32 `[columns, rows]`.
    pub scores: &'a Tensor,
    /// i64, what [`End::Score`] found; zero afterwards.
    pub best: &'a Tensor,
    pub draws: &'a Draws,
    /// i32: chosen, -1 where a score was NaN.
    pub tokens: &'a Tensor,
    /// f32: one further.
    pub positions: &'a Tensor,
    pub columns: usize,
    pub rows: usize,
    pub vocabulary: usize,
}

#[derive(Default)]
#[repr(C)]
struct ProductCall {
    weight: u64,
    more: u64,
    bias: u64,
    more_bias: u64,
    input: u64,
    squares: u64,
    out: u64,
    residual: u64,
    norm: u64,
    normed: u64,
    next_squares: u64,
    best: u64,
    tiles: u32,
    rows: u32,
    more_rows: u32,
    inner: u32,
    columns: u32,
    run: u32,
    run_stride: u32,
    column_stride: u32,
    parts: u32,
    vocabulary: u32,
    epsilon: f32,
    stages: u32,
    kind: u32,
    next_parts: u32,
    run_inverse: u32,
    unused: u32,
}

#[repr(C)]
struct EmbedCall {
    embedding: u64,
    tokens: u64,
    residual: u64,
    norm: u64,
    normed: u64,
    squares: u64,
    width: u32,
    vocabulary: u32,
}

#[repr(C)]
struct SeatCall {
    tokens: u64,
    from: u64,
    fresh: u64,
    columns: u32,
    unused: u32,
}

#[repr(C)]
struct DrawCall {
    scores: u64,
    best: u64,
    temperatures: u64,
    tops: u64,
    nuclei: u64,
    randoms: u64,
    tokens: u64,
    positions: u64,
    rows: u32,
    vocabulary: u32,
}

pub(super) fn load(ptx: &'static str) -> Result<sys::CUmodule> {
    // SAFETY: the image is PTX that ends in a zero byte; the caller has bound a context.
    unsafe { result::module::load_data(ptx.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))
}

pub(super) fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction> {
    let name = CString::new(name).expect("no zero byte within");
    // SAFETY: the module is loaded into the bound context.
    unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))
}

/// Rows and columns of a weight.
fn matrix(linear: &Linear) -> Result<(usize, usize)> {
    match linear.weight.size()[..] {
        [rows, inner] if inner % 8 == 0 => Ok((rows as usize, inner as usize)),
        _ => Err(layout(&linear.weight, "a matrix whose width is a multiple of 8")),
    }
}

/// Queues all that a graph holds.
pub(super) fn replay(graph: &CudaGraph) -> Result<()> {
    graph.launch().map_err(failed("cuGraphLaunch"))
}
