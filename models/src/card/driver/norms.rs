//! The launches of kernels/norms.cu.

use super::super::memory::{address, layout, optional};
use super::{Kernels, PARTS, Stream, THREADS, grid};
use crate::error::Result;
use tch::{Kind, Tensor};

/// See [`Kernels::add_normed`].
pub(in crate::card) struct AddNormed<'a> {
    /// f32 `[columns, width]`.
    pub written: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    /// The norm over what is written, bf16 `[width]`.
    pub own: &'a Tensor,
    /// The norm that is next, bf16 `[width]`.
    pub next: &'a Tensor,
    pub stream: Stream<'a>,
    pub columns: usize,
    pub epsilon: f32,
}

/// See [`Kernels::norm_whole`].
pub(in crate::card) struct NormWhole<'a> {
    /// bf16 `[columns, stride]`.
    pub projected: &'a Tensor,
    /// bf16, as wide as all queries and all keys.
    pub norms: &'a [Tensor; 2],
    pub columns: usize,
    pub stride: usize,
    pub epsilon: f32,
}

impl Kernels {
    /// Adds what a block has written to the residual stream, normed, and readies that for the next norm.
    pub fn add_normed(&self, call: AddNormed<'_>) -> Result<()> {
        let AddNormed { written, bias, own, next, stream, columns, epsilon } = call;
        let (width, Stream { residual, normed, squares }) = (own.numel(), stream);
        let raw = AddNormedCall {
            written: address(written, Kind::Float, columns * width)?,
            bias: optional(bias, Kind::BFloat16, width)?,
            own: address(own, Kind::BFloat16, width)?,
            residual: address(residual, Kind::Float, columns * width)?,
            next: address(next, Kind::BFloat16, width)?,
            normed: address(normed, Kind::BFloat16, columns * width)?,
            squares: address(squares, Kind::Float, columns * PARTS)?,
            width: width as u32,
            epsilon,
        };
        self.launch(self.add_normed, grid(columns, THREADS), &raw)
    }

    /// Norms queries and keys, each over all of their heads together, where they lie.
    pub fn norm_whole(&self, call: NormWhole<'_>) -> Result<()> {
        let NormWhole { projected, norms: [query, key], columns, stride, epsilon } = call;
        let widths = [query.numel(), key.numel()];
        if widths.iter().sum::<usize>() > stride {
            return Err(layout(query, "norms no wider than what is projected"));
        }
        let raw = NormWholeCall {
            projected: address(projected, Kind::BFloat16, columns * stride)?,
            weights: [
                address(query, Kind::BFloat16, widths[0])?,
                address(key, Kind::BFloat16, widths[1])?,
            ],
            widths: widths.map(|width| width as u32),
            stride: stride as u32,
            epsilon,
        };
        self.launch(self.norm_whole, grid(2 * columns, THREADS), &raw)
    }
}

#[repr(C)]
pub(super) struct AddNormedCall {
    written: u64,
    bias: u64,
    own: u64,
    residual: u64,
    next: u64,
    normed: u64,
    squares: u64,
    width: u32,
    epsilon: f32,
}

#[repr(C)]
pub(super) struct NormWholeCall {
    projected: u64,
    weights: [u64; 2],
    widths: [u32; 2],
    stride: u32,
    epsilon: f32,
}
