//! Methods that KVzap is compared with, one a file. What a file says of kvpress is of version 0.5.5.

pub(crate) mod random;

mod keydiff;
mod knorm;
mod streaming;

#[cfg(feature = "tch")]
mod duo;
#[cfg(feature = "tch")]
mod expected;
#[cfg(feature = "tch")]
mod fast_kvzip;
#[cfg(feature = "tch")]
mod observed;
#[cfg(feature = "tch")]
mod snapkv;
#[cfg(feature = "tch")]
mod tova;

#[cfg(feature = "tch")]
pub use duo::DuoAttention;
#[cfg(feature = "tch")]
pub use expected::ExpectedAttention;
#[cfg(feature = "tch")]
pub use fast_kvzip::FastKvzip;
pub use keydiff::KeyDiff;
pub use knorm::Knorm;
#[cfg(feature = "tch")]
pub use observed::ObservedAttention;
pub use random::Random;
#[cfg(feature = "tch")]
pub use snapkv::SnapKv;
pub use streaming::StreamingLlm;
#[cfg(feature = "tch")]
pub use tova::Tova;
