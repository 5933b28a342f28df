//! The benchmarks, one a file.

pub(crate) mod needle;
pub(crate) mod ruler;
