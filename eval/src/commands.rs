//! What the `longctx` command can do, one subcommand a file.

pub mod bench;
pub mod calibrate;
pub mod curve;
pub mod demo;
pub mod eval;
pub mod facts;
pub mod generate;
pub mod positions;
mod prompt;
pub mod report;
pub mod train;

use crate::files;
use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use kvzap::Surrogate;
use models::Model;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};
use tempfile::NamedTempFile;

/// Which model, and how it runs.
#[derive(clap::Args, Debug)]
#[group(args = ["model"])] // a struct with another in it is an empty group, and clap would never find it given
pub struct ModelArgs {
    /// A GGUF file or a Hugging Face folder
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// RePo's positions for this model: an overlay that was made for it
    #[arg(long, value_name = "FILE")]
    repo: Option<PathBuf>,
    #[command(flatten)]
    machine: Machine,
}

/// Where and in what it computes.
#[derive(clap::Args, Debug)]
struct Machine {
    /// Where it runs
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceName,
    /// What its weights and cache are held in; f32 on the CPU and bf16 on a card if left out
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,
    /// CPU threads; all cores if left out
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum DtypeName {
    F32,
    Bf16,
}

impl Machine {
    /// The dtype and the device, after the threads are set.
    fn prepare(&self) -> Result<(Kind, Device)> {
        if self.threads == Some(0) {
            bail!("--threads 0: give 1 or more, or leave it out for all cores");
        }
        let threads = self
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
        tch::set_num_threads(i32::try_from(threads)?);
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        let kind = match self.dtype() {
            DtypeName::F32 => Kind::Float,
            DtypeName::Bf16 => Kind::BFloat16,
        };
        let device = match self.device {
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda => models::cuda()?,
        };
        Ok((kind, device))
    }

    fn dtype(&self) -> DtypeName {
        self.dtype.unwrap_or(match self.device {
            DeviceName::Cpu => DtypeName::F32,
            DeviceName::Cuda => DtypeName::Bf16,
        })
    }

    /// These settings, for a report.
    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "device": format!("{:?}", self.device).to_lowercase(),
            "dtype": format!("{:?}", self.dtype()).to_lowercase(),
            "threads": tch::get_num_threads(),
        })
    }
}

impl ModelArgs {
    /// Loads the model; says so on a terminal.
    fn load(&self) -> Result<Model> {
        let (kind, device) = self.machine.prepare()?;
        let bar = spinner("loading the model");
        let model = Model::load_overlaid(&self.model, self.repo.as_deref(), kind, device)?;
        bar.finish_and_clear();
        note(&model);
        Ok(model)
    }

    fn is_cuda(&self) -> bool {
        matches!(self.machine.device, DeviceName::Cuda)
    }

    /// Where and in what it computes, once the threads are set.
    fn machine(&self) -> Result<(Kind, Device)> {
        self.machine.prepare()
    }

    /// The file or folder.
    fn path(&self) -> &Path {
        &self.model
    }

    /// The model's file or folder, with the overlay's, for a title.
    fn name(&self) -> String {
        let last = |path: &Path| {
            path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
        };
        match &self.repo {
            Some(repo) => format!("{} with {}", last(&self.model), last(repo)),
            None => last(&self.model),
        }
    }

    /// These settings, for a report.
    fn json(&self) -> serde_json::Value {
        let mut json = serde_json::json!({
            "model": self.model.display().to_string(),
            "repo": self.repo.as_ref().map(|path| path.display().to_string()),
        });
        if let (Some(json), Value::Object(machine)) = (json.as_object_mut(), self.machine.json()) {
            json.extend(machine);
        }
        json
    }
}

/// Says what a person should know of how a model's files were read.
fn note(model: &Model) {
    for note in &model.notes {
        eprintln!("note: {note}");
    }
}

fn surrogate(folder: Option<&Path>) -> Result<Option<Surrogate>> {
    folder.map(|folder| Ok(Surrogate::load(folder)?)).transpose()
}

/// A table without borders; the columns named in `right` hold numbers.
fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn spinner(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    bar
}

fn progress(length: u64, what: impl Into<std::borrow::Cow<'static, str>>) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(length).with_style(style).with_message(what);
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    bar
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    write(path, format!("{value:#}\n").as_bytes())
}

/// A file beside `path`, to be renamed to it. Made before a long run, it says in time that there is no place for the results.
fn beside(path: &Path) -> Result<NamedTempFile> {
    ensure!(
        !path.exists() || path.is_file(),
        "{} is no plain file; give another path",
        path.display()
    );
    files::beside(path).with_context(|| no_place(path))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = beside(path)?;
    file.write_all(bytes).with_context(|| no_place(path))?;
    file.persist(path).with_context(|| no_place(path))?;
    Ok(())
}

fn no_place(path: &Path) -> String {
    format!(
        "cannot write {}; does its folder exist, has it room, and may you write there?",
        path.display()
    )
}

/// 1234567 bytes as `1.23 MB`.
fn megabytes(bytes: usize) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_that_have_no_place_are_refused_before_and_after_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        write(&file, b"whole").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"whole");
        // A folder that is a file cannot be written to by anybody, nor one that is not there.
        for path in [file.join("results.json"), folder.path().join("nowhere/results.json")] {
            for error in [beside(&path).map(drop).unwrap_err(), write(&path, b"x").unwrap_err()] {
                let text = format!("{error:#}");
                assert!(text.contains(&*path.to_string_lossy()), "{text}");
                assert!(text.contains("may you write there?"), "{text}");
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside");
    }
}
