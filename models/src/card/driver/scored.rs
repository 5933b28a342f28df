//! The launch of kernels/scored.cu, on libtorch's own stream: the norm before a prompt's projections, with a surrogate's scores.

use super::super::memory::{address, before_torch, device, layout, torch_stream};
use super::{failed, function, grid, launch, load, unload};
use crate::error::Result;
use crate::layers::RmsNorm;
use cudarc::driver::{CudaStream, sys};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

const PTX: &str = concat!(include_str!("../../../kernels/scored.compute_80.ptx"), "\0");
const THREADS: u32 = 64;
/// Tokens of a block, columns that a row is a multiple of, the most that registers have room for, and rows of the map.
const TOKENS: usize = 32;
const CHUNK: i64 = 32;
const MOST: i64 = 18 * CHUNK;
const ROWS: i64 = 8;

/// The kernel, on a card.
pub(crate) struct Scored {
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    linear: sys::CUfunction,
}

impl Scored {
    pub fn load(on: Device) -> Result<Self> {
        let stream = torch_stream(on)?;
        stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let module = load(PTX)?;
        let scored = Self { stream, module, linear: function(module, "scored_linear")? };
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

    /// Whether the kernel scores a `residual` stream by this map, whose rows are padded to eight.
    pub fn takes(residual: &Tensor, (weight, bias): &(Tensor, Tensor)) -> bool {
        let bf16 = |x: &Tensor| x.kind() == Kind::BFloat16 && x.is_contiguous();
        let (&[_, _, dim], &[rows, inputs]) = (&residual.size()[..], &weight.size()[..]) else {
            return false;
        };
        let fits = dim % CHUNK == 0 && dim <= MOST && inputs == dim && rows == ROWS;
        fits && [residual, weight, bias].into_iter().all(bf16)
    }

    /// `residual`, bf16 `[texts, tokens, dim]`, normed, and its scores by a map, bf16 `[texts, heads, tokens]`.
    pub fn linear(
        &self,
        residual: &Tensor,
        norm: &RmsNorm,
        map: &(Tensor, Tensor),
        heads: usize,
    ) -> Result<(Tensor, Tensor)> {
        if !Self::takes(residual, map) || heads > ROWS as usize {
            return Err(layout(residual, "rows and a map that the kernel takes"));
        }
        let (texts, tokens, dim) = residual.size3()?;
        let hidden = residual.f_empty_like()?;
        let kind = (Kind::BFloat16, residual.device());
        let scores = Tensor::f_empty([texts, heads as i64, tokens], kind)?;
        let place = |x: &Tensor| address(x, Kind::BFloat16, x.numel());
        let raw = ScoredCall {
            residual: place(residual)?,
            norm: address(&norm.weight, Kind::BFloat16, dim as usize)?,
            hidden: place(&hidden)?,
            map: place(&map.0)?,
            bias: address(&map.1, Kind::BFloat16, ROWS as usize)?,
            scores: place(&scores)?,
            all: (texts * tokens) as u32,
            tokens: tokens as u32,
            dim: dim as u32,
            heads: heads as u32,
            epsilon: norm.epsilon as f32,
            unused: 0,
        };
        let blocks = ((texts * tokens) as usize).div_ceil(TOKENS);
        launch(&self.stream, false, self.linear, grid(blocks, THREADS), &raw)?;
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
    map: u64,
    bias: u64,
    scores: u64,
    all: u32,
    tokens: u32,
    dim: u32,
    heads: u32,
    epsilon: f32,
    unused: u32,
}
