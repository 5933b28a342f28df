//! Decoding on an NVIDIA card at the speed of its memory.
//!
//! libtorch reads prompts, of which launches are a small part. A step of one token a text is a hundred kernels that take
//! microseconds each, so it runs outside libtorch: a graph that is captured once for each size of a batch and replayed, in
//! which nothing waits for the host.

mod buffers;
mod cache;
mod driver;
mod executor;
mod join;
mod measure;
mod memory;
mod nccl;
mod pool;
mod ranks;
mod room;
mod step;
mod text;
mod turn;

pub use cache::CardCache;
pub use executor::CardExecutor;
pub use measure::{Bench, Capacity, Decoded, Prefilled};
pub use paged_kernels::Mode;
pub(crate) use ranks::CardSum;
pub use ranks::resident_for;
pub(crate) use room::check_memory;
pub use room::{CardRoom, TextRoom, text_cache};
pub use step::{Gates, Place, Step, StepTokens, Token};
pub use text::CardText;
pub(crate) use turn::Turning;

use crate::error::Result;
use cudarc::driver::CudaStream;
use paged_kernels::{CacheShape, Resident, Seats};
use std::sync::Arc;
use tch::Device;

/// A cache on the card that libtorch calls `device`, on a stream of its own.
///
/// # Errors
/// Those of [`Resident::on`]; [`Error::NoCuda`](crate::Error::NoCuda) for another device.
pub fn resident(device: Device, shape: CacheShape, seats: Seats) -> Result<Resident> {
    let stream: Arc<CudaStream> = memory::stream(device)?;
    Ok(Resident::on(stream, shape, seats)?)
}
