//! The launch of kernels/fused.cu.

use super::resident::{RawState, State, Targets, WARPS};
use super::{Device, Grid, RawView, grid};
use crate::cuda::fused::{Gate, HeadNorms, Positions, Projected};
use crate::cuda::scores::ScorePrecision;
use crate::cuda::view::DeviceViewMut;
use crate::error::Result;

impl Device {
    /// Planned rows into one layer, and the queries, from what the layer has projected. All is checked.
    pub fn append_fused(
        &self,
        state: &State,
        to: Targets<'_>,
        projected: &Projected<'_>,
        threshold: f32,
        queries: &mut DeviceViewMut<'_>,
    ) -> Result<()> {
        let [query_heads, texts, _] = queries.shape();
        let heads = state.kv_heads;
        assert_eq!(to.rows.words, heads * texts);
        let Projected { qkv, norms, positions, inverse, turned, gate } = projected;
        let none = RawView { data: 0, head_stride: 0, token_stride: 0, dtype: 0, unused: 0 };
        let norm = |pick: fn(&HeadNorms<'_>) -> RawView| norms.as_ref().map_or(none, pick);
        let gated = |pick: fn(&Gate<'_>) -> RawView| gate.as_ref().map_or(none, pick);
        let (query_norm, key_norm) =
            (norm(|norms| norms.query.raw()), norm(|norms| norms.key.raw()));
        let (stands, last, beside) = match *positions {
            Positions::Given(positions) => (positions, None, None),
            Positions::Read { units, last, beside } => (units, Some(last), beside),
        };
        let [second, bias] = [0, 1].map(|i| {
            gate.as_ref().and_then(|gate| gate.second).map_or(none, |second| second[i].raw())
        });
        let torch = gate.is_some_and(|gate| gate.rule.precision == ScorePrecision::MatchTorchBf16);
        let call = FusedCall {
            state: state.raw(),
            qkv: qkv.raw(),
            positions: stands.raw(),
            queries: queries.raw(),
            inverse: inverse.raw().data,
            query_norm: query_norm.data,
            key_norm: key_norm.data,
            units: gated(|gate| gate.units.raw()),
            second: second.data,
            second_bias: bias.data,
            last: last.map_or(none, |last| last.raw()).data,
            index: beside.map_or(none, |beside| beside.index.raw()).data,
            rows: to.rows.address,
            marks: to.marks.address,
            texts: texts as u32,
            group: (query_heads / heads) as u32,
            position_heads: stands.shape()[0] as u32,
            read: last.map_or(0, |last| last.shape()[2]) as u32,
            last_type: last.map_or(none, |last| last.raw()).dtype,
            norm_type: query_norm.dtype,
            width: gate.map_or(0, |gate| gate.units.shape()[2]) as u32,
            weight_type: second.dtype,
            epsilon: norms.map_or(0.0, |norms| norms.epsilon),
            threshold,
            torch: torch.into(),
            turned: *turned,
            of_read: beside.map_or(1.0, |beside| beside.of_read),
            of_index: beside.map_or(0.0, |beside| beside.of_index),
        };
        // A warp a task: each query head's row, a key, a value, and a score if there is a surrogate.
        let tasks = heads * texts * (query_heads / heads + 2 + usize::from(gate.is_some()));
        let grid = Grid { overlaps: self.overlaps, ..grid(tasks.div_ceil(WARPS), 0) };
        // SAFETY: the views hold what their shapes say, which go with each other and the cache, as the caller has checked;
        // rows and marks are those that `begin` or `begin_pass` has written for as many. It may overlap: it waits before it
        // reads what the kernel before writes.
        unsafe { self.launch(state.fused(last.is_some()), grid, &call) }
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
    last: u64,
    index: u64,
    rows: u64,
    marks: u64,
    texts: u32,
    group: u32,
    position_heads: u32,
    read: u32,
    last_type: u32,
    norm_type: u32,
    width: u32,
    weight_type: u32,
    epsilon: f32,
    threshold: f32,
    torch: u32,
    turned: f32,
    of_read: f32,
    of_index: f32,
}
