#![doc = include_str!("../README.md")]

mod array;
mod error;
mod file;
mod policy;
mod random;
mod scorer;
mod streaming;
mod surrogate;
mod train;
mod window;

#[cfg(feature = "tch")]
mod oracle;
#[cfg(feature = "tch")]
mod torch;

pub use array::Array;
pub use error::{Error, Result};
#[cfg(feature = "tch")]
pub use oracle::{Spans, kvzip_plus};
pub use policy::{Budget, Policy, Scope, Threshold};
pub use random::Random;
pub use scorer::{LayerInput, Scorer};
pub use streaming::StreamingLlm;
pub use surrogate::{Affine, Dtype, Surrogate};
#[cfg(feature = "tch")]
pub use torch::TorchSurrogate;
pub use train::Ridge;
#[cfg(feature = "tch")]
pub use train::{Collector, MlpFit, MlpSettings, Rows, Samples, r2};
pub use window::{WINDOW, judged};
