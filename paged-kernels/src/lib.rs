#![doc = include_str!("../README.md")]

mod backend;
mod book;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod e4m3;
mod error;
mod filled;
mod host;
mod page;
mod pool;
mod reference;
mod ring;
mod shape;
mod storage;
mod table;
mod view;

pub use backend::PagedAttention;
pub use book::Sequence;
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::{
    Beside, Cuda, DeviceBits, DeviceBitsMut, DeviceElement, DeviceView, DeviceViewMut, Gate,
    HeadNorms, Mode, Positions, Projected, Resident, ScorePrecision, ScoreRule, Scores, Seats,
    Surrogate, SurrogateWeights, Suspended,
};
#[cfg(feature = "cuda")]
pub use cudarc;
pub use error::{Error, Result};
pub use host::{Host, HostSuspended};
pub use page::{Move, PageId, Place, Slot};
pub use pool::PagePool;
pub use reference::Reference;
pub use ring::Recent;
pub use shape::{CacheShape, Dtype, Stats};
pub use table::PageTable;
pub use view::{Data, DataMut, View, ViewMut};
