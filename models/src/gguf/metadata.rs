//! Typed reading of the key-value part.

use super::header::{Header, List, Value};
use crate::error::{Error, Result};
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// The metadata of a GGUF file. A key that is not there is `None`, a value of another type an
/// error.
#[derive(Clone, Copy)]
pub struct Metadata<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a [u8],
    pub(super) header: &'a Header,
}

impl<'a> Metadata<'a> {
    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        let Value::Text(place) = value else { return Err(self.wrong(key, "a text", value)) };
        self.utf8(key, place.clone()).map(Some)
    }

    /// A flag.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a flag", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A number from 0 of any whole type.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number from 0", |value| match value {
            Value::Whole(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A token id.
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a token id", |value| match value {
            Value::Whole(n) => u32::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| match value {
            Value::Real(n) => Some(*n),
            Value::Whole(n) => Some(*n as f64),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(list) = self.list(key, List::TEXT, "a list of texts")? else { return Ok(None) };
        let mut texts = Vec::with_capacity(list.count);
        let mut at = list.bytes.start;
        while let Some((length, _)) = self.file[at..list.bytes.end].split_first_chunk() {
            let start = at + size_of::<u64>();
            at = start + u64::from_le_bytes(*length) as usize;
            texts.push(self.utf8(key, start..at)?);
        }
        Ok(Some(texts))
    }

    /// A list of f32.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        Ok(self
            .words(key, List::F32, "a list of f32")?
            .map(|words| words.map(f32::from_le_bytes).collect()))
    }

    /// A list of i32.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        Ok(self
            .words(key, List::I32, "a list of i32")?
            .map(|words| words.map(i32::from_le_bytes).collect()))
    }

    /// A value that must be there.
    pub(super) fn required<T>(
        &self,
        key: &str,
        read: impl FnOnce(&Self, &str) -> Result<Option<T>>,
    ) -> Result<T> {
        read(self, key)?.ok_or_else(|| self.fault(key, "a value", "absent".to_owned()))
    }

    fn words(
        &self,
        key: &str,
        item: u32,
        wanted: &str,
    ) -> Result<Option<impl Iterator<Item = [u8; 4]> + 'a>> {
        let list = self.list(key, item, wanted)?;
        Ok(list.map(|list| self.file[list.bytes.clone()].as_chunks::<4>().0.iter().copied()))
    }

    fn list(&self, key: &str, item: u32, wanted: &str) -> Result<Option<&'a List>> {
        match self.header.values.get(key) {
            None => Ok(None),
            Some(Value::List(list)) if list.item == item => Ok(Some(list)),
            Some(value) => Err(self.wrong(key, wanted, value)),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.header.values.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, wanted, value))
    }

    fn utf8(&self, key: &str, place: Range<usize>) -> Result<&'a str> {
        let at = place.start;
        std::str::from_utf8(&self.file[place])
            .map_err(|_| self.fault(key, "UTF-8", format!("other bytes at {at}")))
    }

    fn wrong(&self, key: &str, wanted: &str, value: &Value) -> Error {
        let found = match value {
            Value::Whole(n) => n.to_string(),
            Value::Real(n) => n.to_string(),
            Value::Flag(flag) => flag.to_string(),
            Value::Text(_) => "a text".to_owned(),
            Value::List(list) => format!("a list of {} values of type {}", list.count, list.item),
        };
        self.fault(key, wanted, found)
    }

    fn fault(&self, key: &str, wanted: &str, found: String) -> Error {
        Error::Format {
            path: self.path.to_owned(),
            what: key.to_owned(),
            wanted: wanted.to_owned(),
            found,
            advice: "convert the model again",
        }
    }
}

impl fmt::Debug for Metadata<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata").field("path", &self.path).finish_non_exhaustive()
    }
}
