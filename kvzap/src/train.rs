//! How surrogates are made: samples are collected from a model's passes, lie on disk, and are fitted a few layers at a time.

mod ridge;

#[cfg(feature = "tch")]
mod collector;
#[cfg(feature = "tch")]
mod correlation;
#[cfg(feature = "tch")]
mod mlp;
#[cfg(feature = "tch")]
mod samples;

pub use ridge::Ridge;

#[cfg(feature = "tch")]
pub use collector::Collector;
#[cfg(feature = "tch")]
pub use correlation::r2;
#[cfg(feature = "tch")]
pub use mlp::{MlpFit, MlpSettings};
#[cfg(feature = "tch")]
pub use samples::{Rows, Samples};
