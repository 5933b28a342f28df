//! The benchmarks, one a file.

pub(crate) mod aime;
pub(crate) mod facts;
pub(crate) mod infinitebench;
pub(crate) mod longbench;
pub(crate) mod longbench_v2;
pub(crate) mod needle;
pub(crate) mod noisy_qa;
pub(crate) mod published;
pub(crate) mod ruler;
pub(crate) mod shared;
