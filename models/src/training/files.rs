//! What a training leaves behind: its state, and what came of it.

use super::{AdamW, Role, Trainable, factor};
use crate::error::{Error, Result};
use crate::folder::{Shard, shard};
use crate::overlay::Overlay;
use crate::weights::{Source, Tensors};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const STATE: &str = "longctx-training";
const VECTORS: [&str; 3] = ["weights", "first", "second"];

impl Trainable {
    /// Writes all that [`restore`](Self::restore) needs to go on as if nothing had happened. `settings` say what training it
    /// is, `notes` are the caller's.
    pub fn save(&self, path: &Path, optimizer: &AdamW, settings: &str, notes: &str) -> Result<()> {
        let vectors = [&self.master, &optimizer.first, &optimizer.second];
        let tensors: Vec<_> = VECTORS
            .iter()
            .zip(vectors)
            .map(|(name, v)| ((*name).to_owned(), v.shallow_clone()))
            .collect();
        let metadata = [
            ("format", STATE.to_owned()),
            ("settings", settings.to_owned()),
            ("steps", optimizer.steps.to_string()),
            ("notes", notes.to_owned()),
        ];
        let metadata = metadata.map(|(key, text)| (key.to_owned(), text));
        shard::write(path, &tensors, HashMap::from(metadata))
    }

    /// Goes on from a state that [`save`](Self::save) wrote, and returns its notes.
    ///
    /// # Errors
    /// The file is no state, or one of another training.
    pub fn restore(
        &mut self,
        path: &Path,
        optimizer: &mut AdamW,
        settings: &str,
    ) -> Result<String> {
        let shard = Shard::open(path)?;
        let wrong = |what: &str, wanted: &str| Error::Format {
            path: path.to_owned(),
            what: what.to_owned(),
            wanted: wanted.to_owned(),
            found: shard.metadata(what).unwrap_or("absent").to_owned(),
            advice: "remove it to begin anew",
        };
        if shard.metadata("format") != Some(STATE) {
            return Err(wrong("format", STATE));
        }
        let found = shard.metadata("settings").unwrap_or_default();
        if found != settings {
            return Err(Error::OtherTraining { path: path.to_owned(), found: found.to_owned() });
        }
        let steps = shard.metadata("steps").and_then(|steps| steps.parse().ok());
        let steps = steps.ok_or_else(|| wrong("steps", "a number"))?;
        let read = |name: &str| -> Result<Tensor> {
            let stored = shard.stored(name)?;
            if stored.shape != [self.numbers()] {
                return Err(Error::WrongShape {
                    path: path.to_owned(),
                    tensor: name.to_owned(),
                    wanted: self.master.size(),
                    found: stored.shape,
                });
            }
            stored.read(None, Kind::Float, Device::Cpu)
        };
        let [weights, first, second] = VECTORS.map(read);
        let notes = shard.metadata("notes").unwrap_or_default().to_owned();
        tch::no_grad(|| -> Result<()> {
            self.master.f_copy_(&weights?)?;
            optimizer.first.f_copy_(&first?)?;
            optimizer.second.f_copy_(&second?)?;
            self.round()
        })?;
        optimizer.steps = steps;
        Ok(notes)
    }

    /// What was trained, by its Hugging Face names in bf16, each tensor whole: a weight with a low-rank update has it added.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        for part in &self.parts {
            let vector =
                self.master.f_narrow(0, part.range.start, part.range.end - part.range.start)?;
            let tensor = match (part.role, part.name.strip_suffix(".a")) {
                (Role::Factor, None) => continue, // comes with the other factor
                (Role::Factor, Some(name)) => {
                    debug_assert!(self.index.contains_key(&factor(name, 'b')));
                    (name.to_owned(), self.tensor_as(name, &[], Kind::Float)?.f_detach()?)
                }
                _ => (part.name.clone(), vector.f_view(part.shape.as_slice())?),
            };
            tensors.push((tensor.0, tensor.1.f_to_kind(Kind::BFloat16)?));
        }
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(tensors)
    }

    /// Writes what was trained as an [`Overlay`] for `base`, whose layers stand as `pe_config` says.
    pub fn write_overlay(&self, path: &Path, base: &Source, pe_config: &Value) -> Result<()> {
        Overlay::write(path, base, pe_config, &self.tensors()?)
    }

    /// Writes the whole model, trained from scratch, as model.safetensors into a Hugging Face folder.
    pub fn write_folder(&self, folder: &Path) -> Result<()> {
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        shard::write(&folder.join("model.safetensors"), &self.tensors()?, format)
    }
}
