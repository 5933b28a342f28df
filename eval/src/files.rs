//! Reading files, with errors that say what to do; and writing them whole or not at all.

use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::{io, process};
use tempfile::NamedTempFile;

/// The bytes of a file.
pub fn bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| unreadable(path))
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
    let entries = fs::read_dir(folder).and_then(|all| all.map(|e| Ok(e?.path())).collect());
    let mut entries: Vec<PathBuf> = entries.with_context(|| unreadable(folder))?;
    entries.sort();
    Ok(entries)
}

/// What to say of a file or folder that does not open.
pub fn unreadable(path: &Path) -> String {
    format!("cannot read {}; is it there, and may you read it?", path.display())
}

/// A file beside `path`, to be renamed to it, so that a half-written one is never found. Those go that killed processes left
/// there.
pub fn beside(path: &Path) -> io::Result<NamedTempFile> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let begun = format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy());
    remove_left(folder, &begun);
    tempfile::Builder::new()
        .prefix(&format!("{begun}{}.", process::id()))
        .permissions(Permissions::from_mode(0o644)) // a temporary file is its owner's alone
        .tempfile_in(folder)
}

/// Removes the files of `folder` that begin with `begun` and the number of a process that is no more.
fn remove_left(folder: &Path, begun: &str) {
    if !Path::new("/proc/self").exists() {
        return; // who lives is not to be seen
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(begun)?.split_once('.'));
        let process = number.and_then(|(number, _)| number.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_goes_and_what_another_writes_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let names = [".a.json.4294967295.x", ".b.json.4294967295.x", ".a.json.1.x", ".a.json.x"];
        for name in names {
            fs::write(path(name), "half").unwrap();
        }
        drop(beside(&path("a.json")).unwrap());
        assert_eq!(names.map(|name| path(name).exists()), [false, true, true, true]);
        let file = beside(&path("a.json")).unwrap();
        let own = format!(".a.json.{}.", process::id());
        assert!(file.path().file_name().unwrap().to_str().unwrap().starts_with(&own));
        file.persist(path("a.json")).unwrap();
        assert_eq!(fs::metadata(path("a.json")).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
    }

    #[test]
    fn what_does_not_open_is_named_with_what_to_look_at() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let errors = [bytes(&path).unwrap_err(), entries(&path).unwrap_err()];
        fs::write(&path, b"\xff").unwrap();
        for error in errors.into_iter().chain([text(&path).unwrap_err()]) {
            let error = format!("{error:#}");
            assert!(error.contains(&*path.to_string_lossy()), "{error}");
            assert!(
                error.contains("is it there, and may you") || error.contains("convert it"),
                "{error}"
            );
        }
        fs::write(folder.path().join("a"), "x").unwrap();
        assert_eq!(entries(folder.path()).unwrap(), [folder.path().join("a"), path]);
    }
}
