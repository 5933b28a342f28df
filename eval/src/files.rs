//! Reading files, with errors that say what to do.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// The bytes of a file.
pub fn bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| unreadable(path))
}

/// The text of a file.
pub fn text(path: &Path) -> Result<String> {
    let text = String::from_utf8(bytes(path)?);
    text.with_context(|| {
        format!("{} is not UTF-8; convert it, or give another file", path.display())
    })
}

/// What a folder holds, by name.
pub fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).and_then(|all| all.map(|e| Ok(e?.path())).collect());
    let mut entries: Vec<PathBuf> = entries.with_context(|| unreadable(folder))?;
    entries.sort();
    Ok(entries)
}

/// What to say of a file or folder that does not open.
pub fn unreadable(path: &Path) -> String {
    format!("cannot read {}; is it there, and may you read it?", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_open_is_named_with_what_to_look_at() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let errors = [bytes(&path).unwrap_err(), entries(&path).unwrap_err()];
        std::fs::write(&path, b"\xff").unwrap();
        for error in errors.into_iter().chain([text(&path).unwrap_err()]) {
            let error = format!("{error:#}");
            assert!(error.contains(&*path.to_string_lossy()), "{error}");
            assert!(
                error.contains("is it there, and may you") || error.contains("convert it"),
                "{error}"
            );
        }
        std::fs::write(folder.path().join("a"), "x").unwrap();
        assert_eq!(entries(folder.path()).unwrap(), [folder.path().join("a"), path]);
    }
}
