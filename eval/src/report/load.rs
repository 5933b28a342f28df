//! Runs as they lie in folders: ours and kvpress's.

use crate::files;
use crate::results::{Journal, Row, Settings, read_predictions};
use crate::tasks::ruler;
use anyhow::{Result, bail, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// One folder of results.
#[derive(Debug)]
pub struct Run {
    /// The folder.
    pub folder: PathBuf,
    /// `ruler 4096 Qwen3-8B`: what runs of one chart have in common.
    pub benchmark: String,
    /// The model.
    pub model: String,
    /// kvpress's name of the method.
    pub press: String,
    /// Its threshold or share.
    pub level: String,
    /// What is known of how it ran.
    pub settings: Settings,
    /// Its samples.
    pub rows: Vec<Row>,
    /// The tasks that were left out, and the tokens that a sample of each needs.
    pub refused: BTreeMap<String, usize>,
}

/// The runs below some folders: journals of ours, and `predictions.csv` files of kvpress where there is no journal. Shards of a
/// run that lie in several of them are one.
pub fn load(folders: &[impl AsRef<Path>]) -> Result<(Vec<Run>, Vec<String>)> {
    let (mut runs, mut notes) = (Vec::<Run>::new(), Vec::new());
    for folder in folders {
        for run in load_one(folder.as_ref(), &mut notes)? {
            let same = |other: &&mut Run| {
                other.folder.file_name() == run.folder.file_name()
                    && other.settings == run.settings
                    && !run.settings.is_empty()
            };
            match runs.iter_mut().find(same) {
                Some(other) => other.merge(run),
                None => runs.push(run),
            }
        }
    }
    Ok((runs, notes))
}

fn load_one(folder: &Path, notes: &mut Vec<String>) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        let mut below = files::entries(&folder)?;
        below.reverse();
        open.extend(below.iter().filter(|path| path.is_dir()).cloned());
        let found = if !Journal::all(&folder)?.is_empty() {
            journal(&folder)
        } else if folder.join("predictions.csv").is_file() {
            predictions(&folder)
        } else {
            continue;
        };
        match found {
            Ok(run) if run.rows.is_empty() => {
                notes.push(format!("{}: no sample is answered", folder.display()))
            }
            Ok(run) => runs.push(run),
            Err(error) => notes.push(format!("{error:#}")),
        }
    }
    ensure!(
        !runs.is_empty(),
        "{} holds no results; give a folder that longctx eval or kvpress filled{}",
        folder.display(),
        notes.iter().map(|note| format!("; {note}")).collect::<String>()
    );
    Ok(runs)
}

impl Run {
    /// Takes the samples of another shard.
    fn merge(&mut self, other: Self) {
        let known: BTreeSet<_> =
            self.rows.iter().map(|row| (row.task.clone(), row.index)).collect();
        let new = |row: &Row| !known.contains(&(row.task.clone(), row.index));
        self.rows.extend(other.rows.into_iter().filter(new));
        self.refused.extend(other.refused);
    }

    /// What decides its samples: what is set, but for the method.
    pub(super) fn data(&self) -> Settings {
        let mut data = self.settings.clone();
        data.retain(|name, _| !["method", "level", "surrogate_files"].contains(&&**name));
        data
    }
}

fn journal(folder: &Path) -> Result<Run> {
    let (settings, rows) = Journal::merged(folder)?;
    let text = |name: &str| match settings.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => String::new(),
    };
    let (_, press, level) = named(folder)?;
    let model = text("model");
    let benchmark = [text("dataset"), text("data_dir"), model.clone()].join(" ").replace("  ", " ");
    let mut refused = BTreeMap::new();
    for path in Journal::all(folder)? {
        refused.extend(Journal::refused(&path)?);
    }
    Ok(Run { folder: folder.to_owned(), benchmark, model, press, level, settings, rows, refused })
}

/// The parts of a folder's name, in kvpress's order: what is before the method, the method, its level.
fn named(folder: &Path) -> Result<(Vec<String>, String, String)> {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // kvpress puts a second run of the same settings into a numbered folder below.
    let own = name(folder);
    let own = match own.parse::<u32>() {
        Ok(_) => name(folder.parent().unwrap_or(folder)),
        Err(_) => own,
    };
    let parts: Vec<&str> = own.split("__").collect();
    let level = parts.iter().rposition(|part| part.parse::<f64>().is_ok() && part.contains('.'));
    let Some(level) = level.filter(|&level| level >= 2) else {
        bail!("{} is not named dataset__model__press__level", folder.display());
    };
    let before = parts[..level - 1].iter().map(|part| (*part).to_owned()).collect();
    Ok((before, parts[level - 1].to_owned(), parts[level].to_owned()))
}

/// A run of kvpress's: RULER's answers are scored again.
fn predictions(folder: &Path) -> Result<Run> {
    let (before, press, level) = named(folder)?;
    let path = folder.join("predictions.csv");
    ensure!(
        before[0] == "ruler",
        "{}: of kvpress's results RULER's are read, not {}",
        path.display(),
        before[0]
    );
    let mut rows = read_predictions(&path)?;
    for row in &mut rows {
        row.score = ruler::score(&row.task, &row.answers, &row.predicted_answer);
    }
    let model = before.last().cloned().unwrap_or_default();
    Ok(Run {
        folder: folder.to_owned(),
        benchmark: before.join(" "),
        model,
        press,
        level,
        settings: Settings::new(),
        rows,
        refused: BTreeMap::new(),
    })
}
