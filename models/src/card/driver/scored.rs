//! The launch of kernels/scored.cu, on libtorch's own stream: the norm before a prompt's projections, with a surrogate's scores.

use super::super::memory::{address, before_torch, device, layout, torch_stream};
use super::{Grid, failed, function, grid, launch, load, unload};
use crate::error::Result;
use crate::layers::RmsNorm;
use cudarc::driver::{CudaStream, result, sys};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

const PTX: &str = concat!(include_str!("../../../kernels/scored.compute_80.ptx"), "\0");
/// Threads of a block that scores by a linear map, and by an MLP.
const THREADS: [u32; 2] = [64, 256];
/// Tokens of a warp of 32 threads, columns that a row is a multiple of, and the most that registers have room for.
const TOKENS: usize = 16;
const CHUNK: i64 = 32;
const MOST: i64 = 18 * CHUNK;
/// Rows of a tile of a map, the most tiles of an MLP's first, and the most heads.
const ROWS: i64 = 8;
const TILES: i64 = 9;
const HEADS: usize = 8;

/// The kernels, on a card.
pub(crate) struct Scored {
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    linear: sys::CUfunction,
    mlp: sys::CUfunction,
    multiprocessors: usize,
}

/// Bytes of an MLP's first map of so many rows.
fn shared(dim: i64, rows: i64) -> usize {
    (dim * rows * 2) as usize
}

impl Scored {
    pub fn load(on: Device) -> Result<Self> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
        let stream = torch_stream(on)?;
        stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let count = stream.context().attribute(COUNT).map_err(failed("cuDeviceGetAttribute"))?;
        let module = load(PTX)?;
        let (linear, mlp) = (function(module, "scored_linear")?, function(module, "scored_mlp")?);
        let most = shared(MOST, ROWS * TILES) as i32;
        // SAFETY: the function is loaded.
        unsafe { result::function::set_function_attribute(mlp, SHARED, most) }
            .map_err(failed("cuFuncSetAttribute"))?;
        let scored = Self { stream, module, linear, mlp, multiprocessors: count as usize };
        let size = Tensor::f_zeros([1], (Kind::Int, device(&scored.stream)))?;
        let start = address(&size, Kind::Int, 1)?;
        launch(&scored.stream, false, function(module, "scored_sizes")?, grid(1, 1), &start)?;
        before_torch(&scored.stream)?;
        assert_eq!(
            size.int64_value(&[0]),
            size_of::<ScoredCall>() as i64,
            "the kernel's struct is as it is mirrored here"
        );
        Ok(scored)
    }

    /// Whether there is a kernel that scores a `residual` stream by these `maps`, whose rows are padded to eights.
    pub fn takes(residual: &Tensor, maps: &[(Tensor, Tensor)], heads: usize) -> bool {
        let bf16 = |x: &Tensor| x.kind() == Kind::BFloat16 && x.is_contiguous();
        let &[_, _, dim] = residual.size().as_slice() else { return false };
        let sizes: Vec<_> = maps.iter().map(|(weight, _)| weight.size()).collect();
        let suits = match sizes.iter().map(Vec::as_slice).collect::<Vec<_>>()[..] {
            [&[ROWS, inputs]] => inputs == dim,
            [&[rows, inputs], &[ROWS, units]] => {
                let fits = rows % ROWS == 0 && rows <= ROWS * TILES;
                fits && inputs == dim && units <= rows && units % 2 == 0
            }
            _ => false,
        };
        let mut all = maps.iter().flat_map(|(weight, bias)| [weight, bias]).chain([residual]);
        suits && heads <= HEADS && dim % CHUNK == 0 && dim <= MOST && all.all(bf16)
    }

    /// `residual`, bf16 `[texts, tokens, dim]`, normed, and its scores by `maps`, bf16 `[texts, heads, tokens]`.
    pub fn run(
        &self,
        residual: &Tensor,
        norm: &RmsNorm,
        maps: &[(Tensor, Tensor)],
        heads: usize,
    ) -> Result<(Tensor, Tensor)> {
        if !Self::takes(residual, maps, heads) {
            return Err(layout(residual, "rows and maps that the kernels take"));
        }
        let (texts, tokens, dim) = residual.size3()?;
        let (first, first_bias) = &maps[0];
        let rows = first.size()[0];
        let hidden = residual.f_empty_like()?;
        let kind = (Kind::BFloat16, residual.device());
        let scores = Tensor::f_empty([texts, heads as i64, tokens], kind)?;
        let place = |x: &Tensor| address(x, Kind::BFloat16, x.numel());
        let mut raw = ScoredCall {
            residual: place(residual)?,
            norm: address(&norm.weight, Kind::BFloat16, dim as usize)?,
            hidden: place(&hidden)?,
            first: place(first)?,
            first_bias: address(first_bias, Kind::BFloat16, rows as usize)?,
            second: 0,
            second_bias: 0,
            scores: place(&scores)?,
            all: (texts * tokens) as u32,
            tokens: tokens as u32,
            dim: dim as u32,
            units: 0,
            tiles: (rows / ROWS) as u32,
            heads: heads as u32,
            epsilon: norm.epsilon as f32,
            unused: 0,
        };
        let blocks =
            |threads: u32| ((texts * tokens) as usize).div_ceil(threads as usize / 32 * TOKENS);
        let Some((second, bias)) = maps.get(1) else {
            let grid = grid(blocks(THREADS[0]), THREADS[0]);
            launch(&self.stream, false, self.linear, grid, &raw)?;
            return Ok((hidden, scores));
        };
        (raw.second, raw.second_bias) = (place(second)?, address(bias, Kind::BFloat16, heads)?);
        raw.units = second.size()[1] as u32;
        let grid = Grid {
            blocks: blocks(THREADS[1]).min(self.multiprocessors),
            threads: THREADS[1],
            shared: shared(dim, rows),
        };
        launch(&self.stream, false, self.mlp, grid, &raw)?;
        Ok((hidden, scores))
    }
}

impl Drop for Scored {
    fn drop(&mut self) {
        unload(&self.stream, &[self.module]);
    }
}

impl std::fmt::Debug for Scored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scored").finish_non_exhaustive()
    }
}

#[repr(C)]
struct ScoredCall {
    residual: u64,
    norm: u64,
    hidden: u64,
    first: u64,
    first_bias: u64,
    second: u64,
    second_bias: u64,
    scores: u64,
    all: u32,
    tokens: u32,
    dim: u32,
    units: u32,
    tiles: u32,
    heads: u32,
    epsilon: f32,
    unused: u32,
}
