//! `golden`: makes the golden files again, with the Python libraries that `xtask/golden.txt` pins.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::fetch::fetch;
use crate::sh;

const PINS: &str = "xtask/golden.txt";
const SCRIPT: &str = "make.py";

/// Runs the golden scripts, all or those of the names given, each in its own folder, and says what changed.
///
/// A script `<crate>/tests/golden/make.py` has the name `<crate>`, one in a folder below that `<crate>/<folder>`; a
/// crate's name means all of its scripts.
pub fn golden(names: &[String]) -> Result<()> {
    let scripts = scripts()?;
    let meant = |script: &str, name: &str| {
        script.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if let Some(name) = names.iter().find(|name| !scripts.keys().any(|s| meant(s, name))) {
        let known: Vec<_> = scripts.into_keys().collect();
        bail!("no golden files are named `{name}`; there are: {}", known.join(", "));
    }
    let chosen = |script: &str| names.is_empty() || names.iter().any(|name| meant(script, name));
    let folders: Vec<_> =
        scripts.iter().filter(|(name, _)| chosen(name)).map(|(_, folder)| folder).collect();

    let data = fetch()?;
    let python = python()?;
    for folder in &folders {
        let mut make = sh::command(&python);
        make.arg(SCRIPT).current_dir(folder).envs(data.variables());
        sh::run(make.env("PYTHONDONTWRITEBYTECODE", "1"))?;
    }
    let status = sh::read(sh::command("git").args(["status", "--short", "--"]).args(&folders))?;
    if status.is_empty() {
        say!("nothing changed");
        return Ok(());
    }
    say!("changed:\n{}", status.trim_end());
    sh::run(sh::command("git").args(["--no-pager", "diff", "--stat", "--"]).args(&folders))
}

/// The folders that hold a script, by the script's name.
fn scripts() -> Result<BTreeMap<String, PathBuf>> {
    let mut scripts = BTreeMap::new();
    for (name, path) in folders(&sh::root())? {
        let golden = path.join("tests/golden");
        if golden.is_dir() {
            for (below, path) in folders(&golden)? {
                scripts.insert(format!("{name}/{below}"), path);
            }
            scripts.insert(name, golden);
        }
    }
    scripts.retain(|_, folder| folder.join(SCRIPT).is_file());
    Ok(scripts)
}

fn folders(parent: &Path) -> Result<Vec<(String, PathBuf)>> {
    let list = || -> std::io::Result<_> {
        let entries = fs::read_dir(parent)?.collect::<Result<Vec<_>, _>>()?;
        let named =
            |entry: DirEntry| (entry.file_name().to_string_lossy().into_owned(), entry.path());
        Ok(entries.into_iter().map(named).filter(|(_, path)| path.is_dir()).collect())
    };
    list().with_context(|| format!("cannot list {}", parent.display()))
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
