//! From a layer's projections to its cache in one launch.

use crate::cuda::resident::Resident;
use crate::cuda::scores::{ScorePrecision, ScoreRule};
use crate::cuda::view::{DeviceView, DeviceViewMut, check_type};
use crate::error::{Error, Result};
use crate::shape::{CacheShape, Dtype};
use crate::view::check_shape;
use half::bf16;

/// What [`Resident::append_fused`] makes rows and queries of, for a batch of N.
#[derive(Debug, Clone, Copy)]
pub struct Projected<'a> {
    /// Queries, keys and values of each token, `[1, N, (Hq + 2 H) · D]`.
    pub qkv: DeviceView<'a>,
    /// Root-mean-square norms of each head's query and key, where the model has them.
    pub norms: Option<HeadNorms<'a>>,
    /// Where each token stands.
    pub positions: Positions<'a>,
    /// The angle of a position of 1 for each pair of dimensions, f32 `[1, 1, D / 2]`; `i` is paired with `i + D / 2`.
    pub inverse: DeviceView<'a>,
    /// What cosines and sines are multiplied by: 1, or YaRN's factor.
    pub turned: f32,
    /// A surrogate whose first layer ran with the projections. Without it all tokens stay.
    pub gate: Option<Gate<'a>>,
}

/// Where tokens stand.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// There, f32 `[1, N, 1]`, or `[H, N, 1]` if each kv head and its queries have positions of their own.
    Given(DeviceView<'a>),
    /// Yet to be read, one for each kv head and its queries, by a gated module whose first layer ran with the projections
    /// (RePo): `last · (silu(gate) · content)`.
    Read {
        /// Gates and contents side by side, `[1, N, 2 width]`.
        units: DeviceView<'a>,
        /// `[1, H, width]`, rows contiguous.
        last: DeviceView<'a>,
        /// The index, where it counts too.
        beside: Option<Beside<'a>>,
    },
}

/// A token's index beside a position that is read: `of_read · read + of_index · index`.
#[derive(Debug, Clone, Copy)]
pub struct Beside<'a> {
    /// f32 `[1, N, 1]`, contiguous.
    pub index: DeviceView<'a>,
    /// What the index is multiplied by.
    pub of_index: f32,
    /// What is read is multiplied by this.
    pub of_read: f32,
}

/// Norms over the dimensions of a head (Qwen3).
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Weights, `[1, 1, D]`.
    pub query: DeviceView<'a>,
    /// Weights, `[1, 1, D]`, of the same type.
    pub key: DeviceView<'a>,
    /// Added to the mean of squares.
    pub epsilon: f32,
}

/// What is left to do of a KVzap surrogate.
#[derive(Debug, Clone, Copy)]
pub struct Gate<'a> {
    /// Hidden units of an MLP with their bias, before GELU, `[1, N, width]`; scores of a linear surrogate, `[1, N, H]`.
    pub units: DeviceView<'a>,
    /// The second layer of an MLP: weights, `[1, H, width]`, rows contiguous, and bias, `[1, 1, H]`, of one type.
    pub second: Option<[DeviceView<'a>; 2]>,
    /// Which tokens to drop.
    pub rule: ScoreRule,
}

impl Resident {
    /// Does for a layer of a step what stands between projections and attention: norms, rotary positions, the rows of
    /// [`append`](Self::append), and drop bits by a surrogate. Rotated queries go to `queries`, `[Hq, N, D]`; what lies
    /// there for a place that nobody has is left alone.
    ///
    /// Angles are the f32 products of position and frequency, reduced in full, as transformers has them. Sums are f32, and
    /// each result is rounded once. Norms, frequencies, the surrogate's weights and those of positions are read early: the kernel before must not
    /// write them if it lets this one begin before its end.
    ///
    /// # Errors
    /// Those of [`append`](Self::append); an odd head dim; positions, frequencies that are not f32.
    pub fn append_fused(
        &mut self,
        layer: usize,
        projected: Projected<'_>,
        queries: &mut DeviceViewMut<'_>,
    ) -> Result<()> {
        let CacheShape { kv_heads, query_heads, head_dim, .. } = *self.shape();
        let texts = self.places();
        let Projected { qkv, norms, positions, inverse, gate, .. } = projected;
        if !head_dim.is_multiple_of(2) {
            let advice = "rotary positions need an even one";
            return Err(Error::CacheShape { field: "head_dim", found: head_dim, advice });
        }
        check_shape("qkv", qkv.shape(), [1, texts, (query_heads + 2 * kv_heads) * head_dim])?;
        check_shape("queries", queries.shape(), [query_heads, texts, head_dim])?;
        match positions {
            Positions::Given(positions) => {
                let own = if positions.shape()[0] == kv_heads { kv_heads } else { 1 };
                check_shape("positions", positions.shape(), [own, texts, 1])?;
                check_type("positions", positions.dtype(), Dtype::F32)?;
            }
            Positions::Read { units, last, beside } => {
                let width = last.shape()[2];
                check_shape("last map", last.shape(), [1, kv_heads, width])?;
                check_shape("gates and contents", units.shape(), [1, texts, 2 * width])?;
                if last.raw().token_stride != width as i64 {
                    return Err(Error::Rows { tensor: "last map" });
                }
                if let Some(Beside { index, .. }) = beside {
                    check_shape("index", index.shape(), [1, texts, 1])?;
                    check_type("index", index.dtype(), Dtype::F32)?;
                    if texts > 1 && index.raw().token_stride != 1 {
                        return Err(Error::Rows { tensor: "index" });
                    }
                }
            }
        }
        check_shape("inverse", inverse.shape(), [1, 1, head_dim / 2])?;
        check_type("inverse", inverse.dtype(), Dtype::F32)?;
        if let Some(HeadNorms { query, key, .. }) = norms {
            check_shape("query norm", query.shape(), [1, 1, head_dim])?;
            check_shape("key norm", key.shape(), [1, 1, head_dim])?;
            check_type("key norm", key.dtype(), query.dtype())?;
        }
        let mut threshold = f32::NEG_INFINITY;
        if let Some(Gate { units, second, rule }) = gate {
            let width = if second.is_some() { units.shape()[2] } else { kv_heads };
            check_shape("units", units.shape(), [1, texts, width])?;
            if width == 0 {
                let (field, most) = ("hidden units", u32::MAX as usize);
                return Err(Error::Surrogate { field, found: 0, most });
            }
            if let Some([second, bias]) = second {
                check_shape("second", second.shape(), [1, kv_heads, width])?;
                check_shape("bias", bias.shape(), [1, 1, kv_heads])?;
                check_type("bias", bias.dtype(), second.dtype())?;
                if second.raw().token_stride != width as i64 {
                    return Err(Error::Rows { tensor: "second" });
                }
            }
            threshold = match rule.precision {
                ScorePrecision::F32 => rule.threshold,
                ScorePrecision::MatchTorchBf16 => bf16::from_f32(rule.threshold).to_f32(),
            };
        }
        self.appended(layer)?;
        self.launch_fused(layer, &projected, threshold, queries)
    }
}
