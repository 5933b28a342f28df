//! The launch of kernels/turn.cu, on libtorch's own stream: what a prompt's queries and keys are turned by.

use super::super::memory::{address, before_torch, device, layout, torch_stream};
use super::{THREADS, failed, function, grid, launch, load, unload};
use crate::error::Result;
use cudarc::driver::CudaStream;
use cudarc::driver::sys;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

const PTX: &str = concat!(include_str!("../../../kernels/turn.compute_80.ptx"), "\0");
/// The widest maps that the kernel has room for.
const INNER: usize = 2048;

/// The kernel, on a card.
pub(crate) struct Turner {
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    heads: sys::CUfunction,
}

/// See [`Turner::turn`].
pub(crate) struct Turn<'a> {
    /// Queries, keys and values, bf16 `[…, (query_heads + 2 kv_heads) * head_dim]`, contiguous.
    pub projected: &'a Tensor,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// What positions are read from, f32 `[tokens, 2 * inner]`, and the last map, f32 `[kv_heads, inner]`.
    pub read: Option<(&'a Tensor, &'a Tensor)>,
    /// The tokens' indices, f32, over and over.
    pub index: &'a Tensor,
    /// Angles of a position of 1, f32 `[head_dim / 2]`.
    pub inverse: &'a Tensor,
    /// What cosines and sines are multiplied by.
    pub turned: f32,
}

impl Turner {
    pub fn load(on: Device) -> Result<Self> {
        let stream = torch_stream(on)?;
        stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let module = load(PTX)?;
        let heads = function(module, "turn_heads")?;
        let turner = Self { stream, module, heads };
        let size = Tensor::f_zeros([1], (Kind::Int, device(&turner.stream)))?;
        let start = address(&size, Kind::Int, 1)?;
        launch(&turner.stream, false, function(module, "turn_sizes")?, grid(1, 1), &start)?;
        before_torch(&turner.stream)?;
        let mirrored = size_of::<TurnCall>() as i64;
        assert_eq!(
            size.int64_value(&[0]),
            mirrored,
            "the kernel's struct is as it is mirrored here"
        );
        Ok(turner)
    }

    /// Whether it turns heads of these widths.
    pub fn takes(head_dim: usize, inner: usize) -> bool {
        head_dim.is_multiple_of(4) && inner <= INNER
    }

    /// Turns queries and keys where they lie, each kv head's by its position.
    pub fn turn(&self, call: Turn<'_>) -> Result<()> {
        let Turn { projected, query_heads, kv_heads, head_dim, read, index, inverse, turned } =
            call;
        let stride = (query_heads + 2 * kv_heads) * head_dim;
        let tokens = projected.numel() / stride;
        let inner = read.map_or(0, |(_, last)| last.numel() / kv_heads);
        if !Self::takes(head_dim, inner) || !projected.numel().is_multiple_of(stride) {
            return Err(layout(projected, "projections of heads that the kernel takes"));
        }
        let mut raw = TurnCall {
            projected: address(projected, Kind::BFloat16, tokens * stride)?,
            units: 0,
            last: 0,
            index: address(index, Kind::Float, 1)?,
            inverse: address(inverse, Kind::Float, head_dim / 2)?,
            stride: stride as u32,
            inner: inner as u32,
            period: index.numel() as u32,
            kv_heads: kv_heads as u32,
            group: (query_heads / kv_heads) as u32,
            pairs: head_dim as u32 / 2,
            turned,
            unused: 0,
        };
        if let Some((units, last)) = read {
            raw.units = address(units, Kind::Float, tokens * 2 * inner)?;
            raw.last = address(last, Kind::Float, kv_heads * inner)?;
        }
        launch(&self.stream, false, self.heads, grid(tokens, THREADS), &raw)
    }
}

impl Drop for Turner {
    fn drop(&mut self) {
        unload(&self.stream, &[self.module]);
    }
}

impl std::fmt::Debug for Turner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turner").finish_non_exhaustive()
    }
}

#[repr(C)]
struct TurnCall {
    projected: u64,
    units: u64,
    last: u64,
    index: u64,
    inverse: u64,
    stride: u32,
    inner: u32,
    period: u32,
    kv_heads: u32,
    group: u32,
    pairs: u32,
    turned: f32,
    unused: u32,
}
