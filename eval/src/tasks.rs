//! The benchmarks, one a file.

pub(crate) mod needle;
