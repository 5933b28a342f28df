//! The launch of kernels/fused.cu.

use super::resident::{RawState, State, Step};
use super::{Device, RawView, grid};
use crate::cuda::fused::{Gate, HeadNorms, Projected};
use crate::cuda::scores::ScorePrecision;
use crate::cuda::view::DeviceViewMut;
use crate::error::Result;

impl Device {
    /// A planned step's rows into one layer, and its queries, from what the layer has projected. All is checked.
    pub fn append_fused(
        &self,
        state: &State,
        step: &Step,
        layer: usize,
        projected: &Projected<'_>,
        threshold: f32,
        queries: &mut DeviceViewMut<'_>,
    ) -> Result<()> {
        let [query_heads, texts, _] = queries.shape();
        let heads = state.kv_heads();
        let (rows, marks) = step.rows_and_marks(layer, heads * texts);
        let Projected { qkv, norms, positions, inverse, gate } = projected;
        let none = RawView { data: 0, head_stride: 0, token_stride: 0, dtype: 0, unused: 0 };
        let norm = |pick: fn(&HeadNorms<'_>) -> RawView| norms.as_ref().map_or(none, pick);
        let gated = |pick: fn(&Gate<'_>) -> RawView| gate.as_ref().map_or(none, pick);
        let (query_norm, key_norm) =
            (norm(|norms| norms.query.raw()), norm(|norms| norms.key.raw()));
        let second = gated(|gate| gate.second.raw());
        let torch = gate.is_some_and(|gate| gate.rule.precision == ScorePrecision::MatchTorchBf16);
        let call = FusedCall {
            state: state.raw(),
            qkv: qkv.raw(),
            positions: positions.raw(),
            queries: queries.raw(),
            inverse: inverse.raw().data,
            query_norm: query_norm.data,
            key_norm: key_norm.data,
            units: gated(|gate| gate.units.raw()),
            second: second.data,
            second_bias: gated(|gate| gate.bias.raw()).data,
            rows,
            marks,
            texts: texts as u32,
            group: (query_heads / heads) as u32,
            position_heads: positions.shape()[0] as u32,
            norm_type: query_norm.dtype,
            width: gate.map_or(0, |gate| gate.units.shape()[2]) as u32,
            weight_type: second.dtype,
            epsilon: norms.map_or(0.0, |norms| norms.epsilon),
            threshold,
            torch: torch.into(),
            unused: 0,
        };
        // SAFETY: the views hold what their shapes say, which go with each other and the cache, as the caller has checked;
        // rows and marks are those that `begin` has written for as many texts.
        unsafe { self.launch(state.fused(), grid(heads * texts, 0), &call) }
    }
}

/// Mirror of `Fused` in kernels/fused.cu.
#[repr(C)]
pub(super) struct FusedCall {
    state: RawState,
    qkv: RawView,
    positions: RawView,
    queries: RawView,
    inverse: u64,
    query_norm: u64,
    key_norm: u64,
    units: RawView,
    second: u64,
    second_bias: u64,
    rows: u64,
    marks: u64,
    texts: u32,
    group: u32,
    position_heads: u32,
    norm_type: u32,
    width: u32,
    weight_type: u32,
    epsilon: f32,
    threshold: f32,
    torch: u32,
    unused: u32,
}
