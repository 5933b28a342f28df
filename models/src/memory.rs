//! Whether something fits the host's memory, asked before it is filled.

use crate::error::{Error, Result};

/// Bytes that a process could take without swapping; `None` where the system does not say (it does on Linux).
pub fn free_memory() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// The most bytes of memory that this process has held at any time, mapped files among them; `None` where the system does not
/// say.
pub fn peak_memory() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

fn field(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?)
}

/// Refuses what cannot fit.
pub(crate) fn check(what: &'static str, wanted: u64) -> Result<()> {
    match free_memory() {
        Some(free) if wanted > free => Err(Error::Memory { what, wanted, free }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_free_is_known_and_more_is_refused_with_both_numbers() {
        let free = free_memory().unwrap();
        assert!((1 << 20..1 << 50).contains(&free), "{free}");
        assert!((1 << 20..1 << 50).contains(&peak_memory().unwrap()));
        check("pages", 1 << 10).unwrap();
        let error = check("pages", 1 << 60).unwrap_err().to_string();
        assert!(error.starts_with("pages take 1152921504606846976 bytes, of memory"), "{error}");
    }
}
