//! `setup`: after it, plain `cargo build`, `cargo test` and `cargo run` find libtorch with nothing exported.

use std::env;
use std::fs;
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::sh;
use crate::wheels;

const PINS: &str = "libtorch.txt";
const FOLDER: &str = "libtorch-2.11.0";
const CONFIG: &str = ".cargo/libtorch.toml";
const INSTEAD: &str = "set LIBTORCH to the folder of a libtorch 2.11.0 of your own";

/// Finds or fetches libtorch and writes [`CONFIG`]. Quick when there is nothing to do.
pub fn setup() -> Result<()> {
    let config = sh::root().join(CONFIG);
    let written = fs::read_to_string(&config).unwrap_or_default();
    let ours = cache::root()?.join(FOLDER);
    let libtorch = match chosen(env::var_os("LIBTORCH").map(PathBuf::from), &written, &ours)? {
        Some(folder) => folder,
        None => {
            wheels::install(PINS, &ours, INSTEAD)?;
            ours
        }
    };
    let text = config_text(&libtorch)?;
    // Rewriting nothing keeps a read-only checkout usable.
    if text != written {
        fs::write(&config, &text).with_context(|| format!("cannot write {}", config.display()))?;
    }
    say!("libtorch: {} (written to {CONFIG})", libtorch.display());
    Ok(())
}

/// The folder that `LIBTORCH` asks for, or `None` for our own. Cargo sets the variable from what we have `written`,
/// so the value alone does not tell whether a person wants it: where it is ours and gone, it is fetched again.
fn chosen(variable: Option<PathBuf>, written: &str, ours: &Path) -> Result<Option<PathBuf>> {
    let Some(folder) = variable.filter(|folder| !folder.as_os_str().is_empty() && folder != ours)
    else {
        return Ok(None);
    };
    let folder = absolute(folder).context("cannot tell where LIBTORCH is")?;
    if ["so", "dylib"]
        .iter()
        .any(|end| folder.join("lib/libtorch_cpu").with_extension(end).exists())
    {
        return Ok(Some(folder));
    }
    if config_text(&folder).is_ok_and(|text| text == written) {
        return Ok(None);
    }
    bail!(
        "LIBTORCH is {0}, but {0}/lib holds no libtorch_cpu: correct it, or unset it and one is fetched",
        folder.display()
    )
}

/// What cargo has to know. A change of it rebuilds everything, the C++ of torch-sys too.
fn config_text(libtorch: &Path) -> Result<String> {
    let folder = libtorch.to_str().filter(|folder| !folder.contains(['"', '\\', ',', '\n']));
    let Some(folder) = folder else {
        let (path, variable) = (libtorch.display(), cache::VARIABLE);
        bail!(
            "{path} cannot be handed to the linker: move it, or set {variable} to another folder"
        );
    };
    let rpath = format!(r#"["-Clink-arg=-Wl,-rpath,{folder}/lib"]"#);
    Ok(format!(
        "[env]\nLIBTORCH = \"{folder}\"\n\n[build]\nrustflags = {rpath}\nrustdocflags = {rpath}\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_libtorch_and_the_rpath() {
        let text = "[env]\nLIBTORCH = \"/a b\"\n\n[build]\nrustflags = [\"-Clink-arg=-Wl,-rpath,/a b/lib\"]\nrustdocflags = [\"-Clink-arg=-Wl,-rpath,/a b/lib\"]\n";
        assert_eq!(config_text(Path::new("/a b")).unwrap(), text);
        assert!(config_text(Path::new("/a,b")).is_err());
    }

    #[test]
    fn a_libtorch_of_ones_own_must_be_one() {
        let ours = Path::new("/cache/ours");
        let gone = Some(PathBuf::from("/nowhere"));
        let error = chosen(gone.clone(), "", ours).unwrap_err();
        assert!(format!("{error:#}").starts_with("LIBTORCH is /nowhere, but"));
        assert_eq!(chosen(gone, &config_text(Path::new("/nowhere")).unwrap(), ours).unwrap(), None);
        assert_eq!(chosen(Some("".into()), "", ours).unwrap(), None);
        assert_eq!(chosen(Some(ours.into()), "", ours).unwrap(), None);

        let own = env::temp_dir().join(format!("longctx-libtorch-{}", std::process::id()));
        fs::create_dir_all(own.join("lib")).unwrap();
        fs::write(own.join("lib/libtorch_cpu.so"), "").unwrap();
        assert_eq!(chosen(Some(own.clone()), "", ours).unwrap(), Some(own.clone()));
        fs::remove_dir_all(own).unwrap();
    }
}
