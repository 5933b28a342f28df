//! FNV-1a, which tells settings and files apart where nobody means harm.

use crate::files;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The hash of the words so far.
#[derive(Clone, Copy, Debug)]
pub struct Fnv(pub u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl<W: Into<u64>> Extend<W> for Fnv {
    fn extend<I: IntoIterator<Item = W>>(&mut self, words: I) {
        for word in words {
            self.0 = (self.0 ^ word.into()).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Tells files apart that have the same name: FNV-1a over the names and sizes of all its files, and over a thousand places
/// spread over each, so that gigabytes of weights take no time.
pub fn fingerprint(path: &Path) -> Result<String> {
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        files = files::entries(path)?;
        files.retain(|path| path.is_file());
    }
    fingerprint_of(&files)
}

/// As [`fingerprint`], of these files.
pub fn fingerprint_of(files: &[PathBuf]) -> Result<String> {
    let mut hash = Fnv::default();
    let mut add = |bytes: &[u8]| hash.extend(bytes.iter().copied());
    for file in files {
        let named = || files::unreadable(file);
        let length = std::fs::metadata(file).with_context(named)?.len();
        add(file.file_name().unwrap_or_default().as_encoded_bytes());
        add(&length.to_le_bytes());
        let mut open = File::open(file).with_context(named)?;
        const PIECE: u64 = 4096;
        let step = (length / 1000).max(PIECE);
        let mut at = 0;
        while at < length {
            open.seek(SeekFrom::Start(at)).with_context(named)?;
            let mut piece = Vec::new();
            (&open).take(PIECE).read_to_end(&mut piece).with_context(named)?;
            add(&piece);
            at += step;
        }
    }
    Ok(format!("{:016x}", hash.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_published_one() {
        let of = |bytes: &[u8]| {
            let mut hash = Fnv::default();
            hash.extend(bytes.iter().copied());
            hash.0
        };
        // From the reference's own test vectors.
        assert_eq!(of(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(of(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(of(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
