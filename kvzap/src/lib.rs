#![doc = include_str!("../README.md")]

mod array;
mod baselines;
mod calibration;
mod error;
mod file;
mod kvzip;
mod overhead;
mod policy;
mod scorer;
mod surrogate;
mod train;
mod window;

#[cfg(feature = "tch")]
mod attention;
#[cfg(feature = "tch")]
mod oracle;
#[cfg(feature = "tch")]
mod torch;

pub use array::Array;
#[cfg(feature = "tch")]
pub use baselines::{DuoAttention, ExpectedAttention, FastKvzip, ObservedAttention, SnapKv, Tova};
pub use baselines::{KeyDiff, Knorm, Random, StreamingLlm};
pub use calibration::Calibration;
pub use error::{Error, Result};
#[cfg(feature = "tch")]
pub use kvzip::Kvzip;
pub use kvzip::{Pass, Rules};
#[cfg(feature = "tch")]
pub use oracle::{Spans, kvzip_plus};
pub use overhead::{ModelShape, Overhead};
#[cfg(feature = "tch")]
pub use policy::{Allocation, Rule};
pub use policy::{Budget, Policy, Scope, Threshold};
pub use scorer::{LayerInput, Scorer};
pub use surrogate::{Affine, Dtype, Surrogate};
#[cfg(feature = "tch")]
pub use torch::TorchSurrogate;
pub use train::Ridge;
#[cfg(feature = "tch")]
pub use train::{Collector, MlpFit, MlpSettings, Rows, Samples, r2};
pub use window::{WINDOW, judged};
