//! What the kernels of a step hand to each other.

use super::driver::{Draws, PARTS, ROWS, Stream};
use crate::config::Config;
use crate::error::Result;
use tch::{Kind, Tensor};

/// Their addresses never change.
pub(super) struct Buffers {
    pub tokens: Tensor,
    pub positions: Tensor,
    pub residual: Tensor,
    pub normed: Tensor,
    pub squares: Tensor,
    pub projected: Tensor,
    pub queries: Tensor,
    pub attended: Tensor,
    pub hidden: Tensor,
    /// What a block writes before its norm, f32.
    pub written: Tensor,
    pub scores: Tensor,
    pub best: Tensor,
    pub draws: Draws,
    pub from: Tensor,
    pub fresh: Tensor,
}

impl Buffers {
    /// For steps of `columns` texts whose projections are `projected` wide.
    pub fn new(
        config: &Config,
        columns: usize,
        projected: usize,
        device: tch::Device,
    ) -> Result<Self> {
        let room = |width: usize, kind| Tensor::f_zeros([(columns * width) as i64], (kind, device));
        let (width, queries) = (config.hidden_size, config.query_heads * config.head_dim);
        let bf16 = Kind::BFloat16;
        Ok(Self {
            tokens: room(1, Kind::Int)?,
            positions: room(1, Kind::Float)?,
            residual: room(width, Kind::Float)?,
            normed: room(width, bf16)?,
            squares: room(width.div_ceil(ROWS) * PARTS, Kind::Float)?,
            projected: room(projected, bf16)?,
            queries: room(queries, bf16)?,
            attended: room(queries, bf16)?,
            hidden: room(config.intermediate_size, bf16)?,
            written: room(width, Kind::Float)?,
            scores: room(config.vocab_size, Kind::Float)?,
            best: room(1, Kind::Int64)?,
            draws: Draws {
                temperatures: room(1, Kind::Float)?,
                tops: room(1, Kind::Int)?,
                nuclei: room(1, Kind::Float)?,
                randoms: room(1, Kind::Double)?,
            },
            from: room(1, Kind::Int)?,
            fresh: room(1, Kind::Int)?,
        })
    }

    pub fn stream(&self) -> Stream<'_> {
        let Self { residual, normed, squares, .. } = self;
        Stream { residual, normed, squares }
    }
}
