//! Many texts at once.

mod fake;
mod scheduler;
