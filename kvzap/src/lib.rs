#![doc = include_str!("../README.md")]

mod array;
mod error;
mod policy;
mod random;
mod ridge;
mod scorer;
mod streaming;
mod surrogate;
mod window;

#[cfg(feature = "tch")]
mod collector;
#[cfg(feature = "tch")]
mod oracle;
#[cfg(feature = "tch")]
mod torch;

pub use array::Array;
#[cfg(feature = "tch")]
pub use collector::Collector;
pub use error::{Error, Result};
#[cfg(feature = "tch")]
pub use oracle::{Spans, kvzip_plus};
pub use policy::{Budget, Policy, Scope, Threshold};
pub use random::Random;
pub use ridge::Ridge;
pub use scorer::{LayerInput, Scorer};
pub use streaming::StreamingLlm;
pub use surrogate::{Affine, Dtype, Surrogate};
#[cfg(feature = "tch")]
pub use torch::TorchSurrogate;
pub use window::{WINDOW, judged};
