#![doc = include_str!("../README.md")]

mod branches;
mod bridge;
mod cache;
#[cfg(feature = "cuda")]
mod card;
mod causal_lm;
mod chat;
mod config;
mod decoder;
mod device;
pub mod engine;
mod error;
mod fan;
mod folder;
mod gemv;
mod gguf;
mod hooks;
mod kvzip;
mod layers;
mod memory;
mod model;
mod overlay;
mod paged;
mod pool;
mod positions;
mod random;
pub mod ranks;
mod sampling;
mod session;
mod tokenizer;
mod training;
mod weights;

pub use branches::{Branches, Turn};
pub use cache::{Dense, KvCache, Usage, causal};
#[cfg(feature = "cuda")]
pub use card::{
    Bench, Capacity, CardCache, CardExecutor, CardRoom, CardText, Decoded, Gates, Mode, Place,
    Prefilled, Step, StepTokens, TextRoom, Token, resident, resident_for, text_cache,
};
pub use causal_lm::{Attend, CausalLm, Pass, Whose};
pub use chat::{ChatTemplate, Message, RenderOptions};
pub use config::{Architecture, Config, RopeScaling};
pub use decoder::Decoder;
pub use device::cuda;
pub use error::{Error, Result};
pub use fan::Fan;
pub use hooks::{Hooks, PositionSink, Pruning};
pub use kvzip::{kvzip, kvzip_passes};
pub use memory::{free_memory, peak_memory};
pub use model::Model;
pub use overlay::Overlay;
pub use paged::{Paged, cache_shape};
pub use paged_kernels::{Cpu, Dtype, Reference};
pub use pool::Pool;
pub use positions::LayerPositions;
pub use random::Random;
pub use sampling::{Sampler, Sampling};
pub use session::{Generated, Session, Steps, Stop};
pub use tokenizer::{GgufVocabulary, Specials, Tokenizer};
pub use training::{AdamW, Extent, Rates, Rows, Trainable, Trained, Way};
pub use weights::{Source, Weights, open};

pub use kvzap::WINDOW;
pub use repo_pos::{Precision, RoundZ, Yarn};

/// The examples of the front page, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct FrontPage;
