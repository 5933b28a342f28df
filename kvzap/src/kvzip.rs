mod rules;

pub use rules::{Pass, Rules};

#[cfg(feature = "tch")]
pub use press::Kvzip;

#[cfg(feature = "tch")]
mod press;
