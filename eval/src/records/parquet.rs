//! Samples in parquet, the hub's own format: `string`, `int64` and `list<string>` columns, snappy or not compressed.

use super::Record;
use crate::files::unreadable;
use anyhow::{Context, Result, anyhow, bail};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;
use std::cell::Cell;
use std::fs::File;
use std::panic::{catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Once;

/// The rows of a file.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let broken = || format!("{} is no parquet file, or cut off; fetch it again", path.display());
    let file = File::open(path).with_context(|| unreadable(path))?;
    // The crate panics where a page is not what the footer says.
    let read = quietly(|| catch_unwind(|| rows(file)));
    read.unwrap_or_else(|_| Err(anyhow!("its pages are broken"))).with_context(broken)
}

/// Prints nothing of a panic in `work`, on this thread.
fn quietly<T>(work: impl FnOnce() -> T) -> T {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                loud(panic);
            }
        }));
    });
    QUIET.set(true);
    let done = work();
    QUIET.set(false);
    done
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
