//! Files, whole or not at all.

use crate::error::{Error, Result};
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
    written.inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}
