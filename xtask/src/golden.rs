//! `golden`: makes the golden files again, with the Python libraries that `xtask/golden.txt` pins.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::fetch::fetch;
use crate::sh;

const PINS: &str = "xtask/golden.txt";
const SCRIPT: &str = "tests/golden/make.py";

/// Runs `<crate>/tests/golden/make.py`, in its own folder, for the crates named or for all, and says what changed.
pub fn golden(names: &[String]) -> Result<()> {
    let crates = crates()?;
    if let Some(name) = names.iter().find(|name| !crates.contains(name)) {
        bail!("there is no {name}/{SCRIPT}; there is one for: {}", crates.join(", "));
    }
    let chosen: Vec<_> = crates.iter().filter(|c| names.is_empty() || names.contains(c)).collect();
    let data = fetch()?;
    let python = python()?;
    let folders: Vec<_> = chosen.iter().map(|name| format!("{name}/tests/golden")).collect();
    for folder in &folders {
        let mut make = sh::command(&python);
        make.arg("make.py").current_dir(sh::root().join(folder)).envs(data.variables());
        sh::run(make.env("PYTHONDONTWRITEBYTECODE", "1"))?;
    }
    let status = sh::read(sh::command("git").args(["status", "--short", "--"]).args(&folders))?;
    if status.is_empty() {
        eprintln!("nothing changed");
        return Ok(());
    }
    eprint!("changed:\n{status}");
    sh::run(sh::command("git").args(["--no-pager", "diff", "--stat", "--"]).args(&folders))
}

/// The crates that have a script, sorted.
fn crates() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(sh::root()).context("cannot list the checkout")? {
        let path = entry.context("cannot list the checkout")?.path();
        if path.join(SCRIPT).exists() {
            names.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// The Python of an environment under `target`, made anew when the pins are not those it was made from.
fn python() -> Result<PathBuf> {
    let folder = sh::target().join("golden");
    let (python, made_from) = (folder.join("bin/python"), folder.join("pins.txt"));
    let pins = fs::read_to_string(sh::root().join(PINS)).context("cannot read the pins")?;
    if fs::read_to_string(&made_from).is_ok_and(|text| text == pins) {
        return Ok(python);
    }
    sh::run(sh::command("python3").args(["-m", "venv", "--clear"]).arg(&folder))
        .context("cannot make an environment: install Python 3.11 with venv and pip")?;
    sh::run(sh::command(&python).args(["-m", "pip", "install", "--requirement", PINS])).context(
        "pip could not install it, as it says above: check the network, and that Python is 3.11",
    )?;
    fs::write(&made_from, pins).with_context(|| format!("cannot write {}", made_from.display()))?;
    Ok(python)
}
