#![doc = include_str!("../README.md")]

mod files;
mod fit;
#[cfg(feature = "models")]
mod fnv;
mod generate;
mod haystack;
mod intervals;
pub mod metrics;
mod records;
pub mod report;
pub mod results;
pub mod suite;
mod task;
mod tasks;

#[cfg(feature = "models")]
pub mod commands;
#[cfg(feature = "models")]
mod method;
#[cfg(feature = "models")]
mod positions;
#[cfg(feature = "models")]
mod runner;
#[cfg(feature = "models")]
mod together;

pub use generate::{Answer, Generate, run};
pub use haystack::{Haystack, documents};
pub use task::{Sample, Task};
pub use tasks::aime::Aime;
pub use tasks::facts::{Facts, Family, Words};
pub use tasks::infinitebench::InfiniteBench;
pub use tasks::longbench::LongBench;
pub use tasks::longbench_v2::LongBenchV2;
pub use tasks::needle::Needle;
pub use tasks::noisy_qa::NoisyQa;
pub use tasks::published::Published;
pub use tasks::ruler::{Ruler, Texts, TooShort};
pub use tasks::shared::SharedContext;

#[cfg(feature = "models")]
pub use method::{FirstToken, Method};
#[cfg(feature = "models")]
pub use positions::{Head, Near, Positions};
#[cfg(feature = "models")]
pub use runner::{Reading, Runner};
#[cfg(feature = "models")]
pub use together::{Asked, Shared, Together};
