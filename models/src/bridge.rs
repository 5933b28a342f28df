//! The one place for `unsafe`: memory that Rust cannot see the owner of.
#![allow(unsafe_code)]

use memmap2::Mmap;
use std::{fs::File, io};

/// Maps a file for reading.
pub(crate) fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is read-only and outlives `file`. Its bytes change only if someone writes to the file or
    // truncates it meanwhile, which no reader of a model file can survive or prevent; they are read as plain numbers, and
    // every length taken from them is checked where it is read, so that a change gives wrong weights at worst, or SIGBUS.
    unsafe { Mmap::map(file) }
}
