#![doc = include_str!("../README.md")]

mod array;
mod error;
mod frequencies;
mod module;
mod pattern;
mod reposition;
mod rope;
#[cfg(feature = "tch")]
mod torch;

pub use array::Array;
pub use error::{Error, Result};
pub use frequencies::{Frequencies, Precision, Yarn};
pub use module::{Module, Repo};
pub use pattern::Pattern;
pub use reposition::Repositioner;
#[cfg(feature = "tch")]
pub use torch::{Rotary, RoundZ, TorchModule, TorchRepo, rotate};
