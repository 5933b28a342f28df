//! Samples in parquet, the hub's own format: `string`, `int64` and `list<string>` columns, snappy or not compressed.

use super::Record;
use crate::files::unreadable;
use anyhow::{Context, Result, anyhow, bail};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;
use std::fs::File;
use std::path::Path;

/// The rows of a file.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let broken = || format!("{} is no parquet file, or cut off; fetch it again", path.display());
    let file = File::open(path).with_context(|| unreadable(path))?;
    // The crate panics where a page is not what the footer says.
    let read = std::panic::catch_unwind(|| rows(file));
    read.unwrap_or_else(|_| Err(anyhow!("its pages are broken"))).with_context(broken)
}

fn rows(file: File) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for row in SerializedFileReader::new(file)?.get_row_iter(None)? {
        match row?.to_json_value() {
            Value::Object(record) => records.push(record),
            _ => bail!("a row is no record"),
        }
    }
    Ok(records)
}
