//! Files, whole or not at all.

use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::path::Path;
use std::{fs, io, process};

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|cause| Error::File { path: path.into(), cause })
}

/// Written beside its place and renamed into it, so that no reader sees half a file.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |beside| fs::write(beside, bytes))
        .map_err(|cause: io::Error| Error::File { path: path.into(), cause })
}

/// The same, by whatever writes the file.
pub(crate) fn write_with<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&Path) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let beside = path.with_extension(format!("{}.part", process::id()));
    let written = write(&beside).and_then(|()| Ok(fs::rename(&beside, path)?));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    remove_left_beside(path);
    written
}

/// Removes what processes that are no more began to write in place of `path` and left: a shard of samples is hundreds of megabytes.
fn remove_left_beside(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_stem().and_then(OsStr::to_str))
    else {
        return;
    };
    if !Path::new("/proc/self").exists() {
        return; // who lives is not to be seen
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let rest = file.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('.'));
        let process = rest.and_then(|rest| rest.strip_suffix(".part")?.parse::<u32>().ok());
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
        let names = ["a.4294967295.part", "b.4294967295.part", "a.1.part", "a.x.part"];
        for name in names {
            fs::write(path(name), "half").unwrap();
        }
        write(&path("a.safetensors"), b"whole").unwrap();
        assert_eq!(names.map(|name| path(name).exists()), [false, true, true, true]);
        assert_eq!(read(&path("a.safetensors")).unwrap(), b"whole");
    }
}
