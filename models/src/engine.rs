//! Many texts at once: they come and go, share pages, wait their turn, and get what they would get alone.

mod contexts;
mod executor;
mod request;
mod scheduler;

pub use executor::{Drawn, Executor, Held, Limits, TextId};
pub use request::{End, Event, Request, RequestId, Usage};
pub use scheduler::{Admission, Scheduler, Settings, Totals};
