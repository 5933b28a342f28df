//! Whether something fits the host's memory, asked before it is filled.

use crate::error::{Error, Result};

/// Bytes that a process could take without swapping; `None` where the system does not say (it does on Linux).
pub fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
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
        check("pages", 1 << 10).unwrap();
        let error = check("pages", 1 << 60).unwrap_err().to_string();
        assert!(error.starts_with("pages take 1152921504606846976 bytes, of memory"), "{error}");
    }
}
