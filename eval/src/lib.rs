#![doc = include_str!("../README.md")]

mod fit;
mod generate;
mod haystack;
pub mod metrics;
mod task;
mod tasks;

#[cfg(feature = "models")]
pub mod commands;
#[cfg(feature = "models")]
mod method;
#[cfg(feature = "models")]
mod runner;

pub use generate::{Answer, Generate, run};
pub use haystack::{Haystack, documents};
pub use task::{Sample, Task};
pub use tasks::needle::Needle;
pub use tasks::ruler::{Ruler, Texts, TooShort};

#[cfg(feature = "models")]
pub use method::{FirstToken, Method};
#[cfg(feature = "models")]
pub use runner::{Reading, Runner};
