//! The journal: a line of JSON for the settings, then one for each answer, on the disk before the next question is asked.
//!
//! A line counts when it is whole, line end included; what a killed run left of its last one is cut off when the journal is
//! opened again.

use super::Row;
use crate::files;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// All that decides a run's answers, by name: model, method, data, protocol.
pub type Settings = Map<String, Value>;

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    done: HashSet<(String, u64)>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    settings: Settings,
}

/// A task that was left out.
#[derive(Serialize, Deserialize)]
struct Refused {
    refused: String,
    needs_tokens: usize,
}

impl Journal {
    /// Opens `name` in `folder`, both made if they are not there, to go on where this run or another of the same settings in
    /// this folder stopped.
    ///
    /// # Errors
    /// If a journal of the folder has other settings, or another process writes to this one.
    pub fn open(folder: &Path, name: &str, settings: &Settings) -> Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}; give another --out", folder.display()))?;
        let path = folder.join(name);
        let open = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let mut file = open.with_context(|| no_place(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "{} is being written by another run; wait for it, or give another --shard",
                path.display()
            ),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| no_place(&path));
            }
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).with_context(|| no_place(&path))?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64).with_context(|| no_place(&path))?;
        file.seek(SeekFrom::End(0)).with_context(|| no_place(&path))?;
        let mut journal = Self { file, path, done: HashSet::new() };
        if whole == 0 {
            journal.line(&Head { settings: settings.clone() })?;
        }
        for other in Self::all(folder)? {
            let (theirs, rows) = Self::read(&other)?;
            same(&other, &theirs, settings)?;
            journal.done.extend(rows.into_iter().map(|row| (row.task, row.index)));
        }
        Ok(journal)
    }

    /// Whether sample `index` of `task` is answered.
    pub fn has(&self, task: &str, index: u64) -> bool {
        self.done.contains(&(task.to_owned(), index))
    }

    /// Adds a row.
    pub fn append(&mut self, row: &Row) -> Result<()> {
        self.line(row)?;
        self.done.insert((row.task.clone(), row.index));
        Ok(())
    }

    /// Notes that a task is left out, as a sample of it needs so many tokens.
    pub fn refuse(&mut self, task: &str, needs_tokens: usize) -> Result<()> {
        let refused = task.to_owned();
        match Self::refused(&self.path)?.contains_key(task) {
            true => Ok(()),
            false => self.line(&Refused { refused, needs_tokens }),
        }
    }

    /// The tasks that a journal left out, and the tokens that each needs.
    pub fn refused(path: &Path) -> Result<BTreeMap<String, usize>> {
        let text = files::bytes(path)?;
        let lines = text.split(|&byte| byte == b'\n');
        let refused = lines.filter_map(|line| serde_json::from_slice::<Refused>(line).ok());
        Ok(refused.map(|line| (line.refused, line.needs_tokens)).collect())
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.with_context(|| no_place(&self.path))
    }

    /// The journals of a folder.
    pub fn all(folder: &Path) -> Result<Vec<PathBuf>> {
        let named = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("journal") && name.ends_with(".jsonl")
        };
        Ok(files::entries(folder)?.into_iter().filter(named).collect())
    }

    /// The settings and the rows of a journal; lines that are not whole are left out.
    pub fn read(path: &Path) -> Result<(Settings, Vec<Row>)> {
        let text = files::bytes(path)?;
        let mut lines = text.split_inclusive(|&byte| byte == b'\n').filter(|l| l.ends_with(b"\n"));
        let head = lines.next().and_then(|line| serde_json::from_slice::<Head>(line).ok());
        let Head { settings } = head.with_context(|| {
            format!(
                "{} does not begin with its settings; remove it, or give another --out",
                path.display()
            )
        })?;
        Ok((settings, lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()))
    }

    /// The rows of all journals of a folder, each sample once, in the order of `tasks` and index; and their settings.
    pub fn merged(folder: &Path) -> Result<(Settings, Vec<Row>)> {
        let (mut settings, mut rows) = (None, Vec::new());
        for path in Self::all(folder)? {
            let (theirs, more) = Self::read(&path)?;
            same(&path, &theirs, settings.get_or_insert_with(|| theirs.clone()))?;
            rows.extend(more);
        }
        let mut seen = HashSet::new();
        rows.retain(|row: &Row| seen.insert((row.task.clone(), row.index)));
        let settings =
            settings.with_context(|| format!("{} holds no journal", folder.display()))?;
        Ok((settings, rows))
    }
}

/// That two runs may stand in one folder.
fn same(path: &Path, theirs: &Settings, ours: &Settings) -> Result<()> {
    let names = ours.keys().chain(theirs.keys());
    let other = names.into_iter().find(|name| ours.get(*name) != theirs.get(*name));
    let show =
        |settings: &Settings, name| settings.get(name).map_or("nothing".into(), Value::to_string);
    if let Some(name) = other {
        let (theirs, ours) = (show(theirs, name), show(ours, name));
        ensure!(
            false,
            "{} is of another run: its {name} is {theirs}, now it is {ours}; give another --out",
            path.display()
        );
    }
    Ok(())
}

pub(super) fn no_place(path: &Path) -> String {
    format!("cannot write {}; is the disk full, and may you write there?", path.display())
}
