//! Many texts at once: they come and go, share pages, wait their turn, and get what they would get alone.

mod executor;

pub use executor::{Drawn, Executor, Held, Limits, TextId};
