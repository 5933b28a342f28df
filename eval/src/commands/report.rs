//! `longctx report`: one page, pictures and tables from folders of results.

use super::{table, write, write_json};
use crate::report::{load, report};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Which results, and what to make of them.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Folders of result folders, ours or kvpress's; shards of a run in several of them are put together
    #[arg(default_value = "results")]
    results: Vec<PathBuf>,
    /// The page
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    html: PathBuf,
    /// The table of all runs in Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// The same with every task, in comma-separated values
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Each chart as a picture
    #[arg(long, value_name = "FOLDER")]
    svg: Option<PathBuf>,
    /// All numbers and settings
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let (runs, notes) = load(&args.results)?;
    let report = report(&runs, notes)?;
    for note in report.notes() {
        eprintln!("note: {note}");
    }
    write(&args.html, report.html()?.as_bytes())?;
    if let Some(path) = &args.markdown {
        write(path, report.markdown().as_bytes())?;
    }
    if let Some(path) = &args.csv {
        write(path, &report.csv()?)?;
    }
    if let Some(folder) = &args.svg {
        std::fs::create_dir_all(folder).with_context(|| super::no_place(folder))?;
        for (name, svg) in report.pictures() {
            write(&folder.join(name).with_extension("svg"), svg.as_bytes())?;
        }
    }
    if let Some(path) = &args.json {
        write_json(path, &serde_json::to_value(&report)?)?;
    }
    let mut table = table(&["runs", "page"], &[0]);
    table.add_row([runs.len().to_string(), args.html.display().to_string()]);
    println!("{table}");
    Ok(())
}
