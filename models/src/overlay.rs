//! What training has added to a model or changed in it, without the model: a safetensors file that is laid over its base.
//!
//! Its tensors have their Hugging Face names: the position maps of [RePo](repo_pos) and whatever else changed, each whole.
//! Its metadata are `format`, which is `longctx-repo`; `base`, the [fingerprint](Source::fingerprint) of the model it was
//! made for; and `pe_config`, the JSON object of a config.json that says which layers have maps.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::folder::{Fields, Shard, shard};
use crate::positions;
use crate::weights::{Source, Stored};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;
use tch::Tensor;

const FORMAT: &str = "longctx-repo";
/// Bytes of a large tensor that go into a fingerprint, at its begin, middle and end.
const SAMPLE: usize = 1 << 14;

/// An opened overlay.
#[derive(Debug)]
pub struct Overlay {
    shard: Shard,
    base: String,
    fields: Fields,
}

impl Overlay {
    /// Reads the header of an overlay and maps it.
    pub fn open(path: &Path) -> Result<Self> {
        let shard = Shard::open(path)?;
        let wrong = |what: &str, wanted: &str, found: Option<String>| Error::Format {
            path: path.to_owned(),
            what: what.to_owned(),
            wanted: wanted.to_owned(),
            found: found.unwrap_or_else(|| "absent".to_owned()),
            advice: "give a file that longctx wrote as an overlay",
        };
        let text = |key: &str| shard.metadata(key).map(str::to_owned);
        if text("format").as_deref() != Some(FORMAT) {
            return Err(wrong("metadata format", FORMAT, text("format")));
        }
        let base = text("base").ok_or_else(|| wrong("metadata base", "a fingerprint", None))?;
        let mut map = Map::new();
        if let Some(text) = text("pe_config") {
            let value = serde_json::from_str(&text)
                .map_err(|_| wrong("metadata pe_config", "a JSON object", Some(text)))?;
            map.insert("pe_config".to_owned(), value);
        }
        Ok(Self { fields: Fields::new(path, map), shard, base })
    }

    /// Writes `tensors`, f32 or bf16 by their Hugging Face names, as an overlay for `base`: beside `path` first, so that a
    /// half-written one is never found.
    pub fn write(
        path: &Path,
        base: &Source,
        pe_config: &Value,
        tensors: &[(String, Tensor)],
    ) -> Result<()> {
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("base".to_owned(), base.fingerprint()),
            ("pe_config".to_owned(), pe_config.to_string()),
        ]);
        shard::write(path, tensors, metadata)
    }

    /// The config of `base` with this over it, if it was made for `base` and fits it.
    pub(crate) fn config(&self, base: &Source) -> Result<Config> {
        let path = self.shard.path();
        let found = base.fingerprint();
        if found != self.base {
            let wanted = self.base.clone();
            return Err(Error::OtherBase {
                path: path.to_owned(),
                base: base.path().to_owned(),
                wanted,
                found,
            });
        }
        let mut config = base.config().clone();
        if self.fields.value("pe_config").is_some() {
            config.positions = positions::planned(&self.fields, config.layers)?;
        }
        let advice = "write the overlay again";
        positions::reconcile(
            &config.positions,
            path,
            |name| self.has(name) || base.has(name),
            |name| Error::MissingTensor { path: path.to_owned(), tensor: name.to_owned(), advice },
        )?;
        let stray = |name: &&String| !base.has(name) && !positions::is_map(name, config.layers);
        match self.shard.names().iter().find(stray) {
            None => Ok(config),
            Some(name) => {
                Err(Error::StrayTensor { path: path.to_owned(), tensor: name.to_owned() })
            }
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.shard.has(name)
    }

    pub(crate) fn stored(&self, name: &str) -> Result<Stored<'_>> {
        self.shard.stored(name)
    }
}

impl Source {
    /// SHA-256, in hexadecimal, of the name, type and shape of each tensor that can be read, in the order of names, and of
    /// its bytes: all of a small one, 16 KiB at the begin, middle and end of another. The same weights in another format or
    /// quantisation are another base.
    pub fn fingerprint(&self) -> String {
        let mut digest = Sha256::new();
        for stored in self.all() {
            let shape: Vec<String> = stored.shape.iter().map(ToString::to_string).collect();
            let line = format!("{} {:?} [{}]\n", stored.name, stored.encoding, shape.join(","));
            digest.update(line.as_bytes());
            let bytes = stored.bytes;
            if bytes.len() <= 3 * SAMPLE {
                digest.update(bytes);
            } else {
                for at in [0, (bytes.len() - SAMPLE) / 2, bytes.len() - SAMPLE] {
                    digest.update(&bytes[at..at + SAMPLE]);
                }
            }
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
