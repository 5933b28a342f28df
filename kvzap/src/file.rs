//! Files, whole or not at all.

use crate::error::{Error, Result};
use std::path::Path;
use std::{fs, io, process};

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|cause| Error::File { path: path.into(), cause })
}

/// Written beside its place and renamed into it, so that no reader sees half a file.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_extension(format!("{}.part", process::id()));
    let written: io::Result<()> = (|| {
        fs::write(&beside, bytes)?;
        fs::rename(&beside, path)
    })();
    written.map_err(|cause| {
        let _ = fs::remove_file(&beside);
        Error::File { path: path.into(), cause }
    })
}
