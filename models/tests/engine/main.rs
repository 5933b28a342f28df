//! Many texts at once.

mod cpu;
mod fake;
mod scheduler;
mod soak;
mod threads;
