//! The cache: outside the checkout, so that clones share it, and never seen half filled.

use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, bail};

/// The environment variable that puts the cache elsewhere.
pub const VARIABLE: &str = "LONGCTX_CACHE";

/// Where the cache is, whether it exists or not.
pub fn root() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = set(VARIABLE)
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("longctx")))
        .or_else(|| Some(set("HOME")?.join(".cache/longctx")));
    let Some(root) = root else { bail!("no home folder is known: set {VARIABLE} to a folder") };
    absolute(&root).with_context(|| format!("cannot tell where {} is", root.display()))
}

/// A folder in the cache to fill before it is moved into place, for one process at a time. It goes when this is
/// dropped; what a killed process left behind goes when the next one begins.
pub struct Stage {
    /// Empty at first, and on the cache's own disk.
    pub path: PathBuf,
    _lock: File,
}

impl Stage {
    /// Waits for its turn.
    pub fn open(cache: &Path) -> Result<Self> {
        let advice = || {
            let cache = cache.display();
            format!("cannot write to {cache}: set {VARIABLE} to a folder where you may")
        };
        fs::create_dir_all(cache).with_context(advice)?;
        let lock = File::create(cache.join(".lock")).with_context(advice)?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            say!("another `cargo xtask` is filling {}: waiting for it", cache.display());
        }
        lock.lock().with_context(|| format!("cannot lock {}", cache.display()))?;
        let path = cache.join(".partial");
        if path.exists() {
            fs::remove_dir_all(&path).with_context(advice)?;
        }
        fs::create_dir(&path).with_context(advice)?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Should it fail, the next stage tries again.
        let _ = fs::remove_dir_all(&self.path);
    }
}
