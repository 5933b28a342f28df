#[cfg(feature = "tch")]
mod allocation;
mod budget;
mod threshold;

#[cfg(feature = "tch")]
pub use allocation::{Allocation, Rule};
pub use budget::{Budget, Scope};
pub use threshold::Threshold;

use crate::Result;

/// Decides from scores which tokens may be forgotten.
///
/// The deciding seam: it takes `[batch, kv_heads, tokens]` scores of a forward pass's new tokens,
/// as a [`Scorer`](crate::Scorer) made them, and returns as many bools, true for a token that goes
/// once it has left the window ([`judged`](crate::judged)). Bits are decided early and obeyed late:
/// whoever holds the cache keeps them until then. Implemented by [`Threshold`] and [`Budget`] for
/// [`Array`](crate::Array) with `Drops = Vec<bool>`, row-major, and with the feature `tch` for
/// `tch::Tensor` with `Drops = tch::Tensor`, Bool, on the device of the scores and without waiting
/// for it.
pub trait Policy<T> {
    /// The bools.
    type Drops;

    /// `[batch, kv_heads, tokens]` bools for as many `scores`: true, it may go.
    fn drops(&self, scores: &T) -> Result<Self::Drops>;
}

/// Bools of the same shape for `rows`, `[batch, places, rows]`: true for the `count` lowest of each
/// row; of equal ones, those at the first places.
#[cfg(feature = "tch")]
fn lowest(rows: &tch::Tensor, count: i64) -> Result<tch::Tensor> {
    let lowest = rows.f_sort_stable(true, 1, false)?.1.f_narrow(1, 0, count)?;
    Ok(rows.f_zeros_like()?.f_to_kind(tch::Kind::Bool)?.f_scatter_value(1, &lowest, 1)?)
}
