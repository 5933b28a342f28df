//! What a run that is cut off leaves in its report, for the same command to go on with.

use super::methods::Variant;
use super::{Args, ModelArgs, Report};
use crate::{files, fnv};
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// How far a run came.
#[derive(Default, Serialize, Deserialize)]
pub struct Unfinished {
    /// All that decides its rows.
    run: Map<String, Value>,
    /// Tasks and lengths that are measured, in the order of the command.
    pub cells: usize,
    /// Of the next one's samples, from the first on, each variant's share removed, that of the judged tokens, and score.
    pub samples: Vec<Vec<[f64; 3]>>,
}

impl Unfinished {
    /// The beginning of what `args` asks of `variants`.
    pub fn new(args: &Args, model: &ModelArgs, variants: &[Variant]) -> Result<Self> {
        let prints = |paths: &mut dyn Iterator<Item = &PathBuf>| -> Result<Vec<String>> {
            paths.map(|path| fnv::fingerprint(path)).collect()
        };
        let names: Vec<String> = variants
            .iter()
            .map(|Variant { method, asked, .. }| format!("{method} {asked}"))
            .collect();
        let run = serde_json::json!({
            "model": prints(&mut [&model.model].into_iter().chain(&model.repo))?,
            "device": model.json()["device"], "dtype": model.json()["dtype"],
            "surrogates": prints(&mut args.surrogate.iter())?,
            "texts": args.texts, "documents": prints(&mut args.documents.iter())?,
            "tasks": args.task, "contexts": args.tokens, "samples": args.samples, "methods": names,
            "window": args.window, "protect": args.protect, "seed": args.seed,
        });
        let run = run.as_object().cloned().unwrap_or_default();
        Ok(Self { run, ..Self::default() })
    }

    /// Whether nothing was begun, or all is done.
    pub fn is_nothing(&self) -> bool {
        self.run.is_empty()
    }

    /// The report at `path` if a run such as this one was cut off and left it.
    ///
    /// # Errors
    /// If another run did: what that has measured would be lost.
    pub fn report(&self, path: &Path) -> Result<Option<Report>> {
        let text = if path.is_file() { files::bytes(path)? } else { Vec::new() };
        let Ok(report) = serde_json::from_slice::<Report>(&text) else { return Ok(None) };
        if report.unfinished.is_nothing() {
            return Ok(None);
        }
        for (name, theirs) in &report.unfinished.run {
            let ours = self.run.get(name).unwrap_or(&Value::Null);
            ensure!(
                theirs == ours,
                "{} is of a run that was cut off, whose {name} is {theirs}, and now it is {ours}; give the same settings, \
                 or another --json, and --merge this one",
                path.display()
            );
        }
        Ok(Some(report))
    }
}
