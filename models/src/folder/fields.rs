//! A JSON object read from a file, its fields by name and type.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// An object of a JSON file. A field that is absent or `null` is `None`.
#[derive(Debug)]
pub(crate) struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|cause| Error::Io {
            path: path.to_owned(),
            cause,
            advice: "fetch the whole Hugging Face folder, or give a .gguf file",
        })?;
        let map = serde_json::from_slice(&text).map_err(|error| Error::Format {
            path: path.to_owned(),
            what: "the content".to_owned(),
            wanted: "a JSON object".to_owned(),
            found: error.to_string(),
            advice: "fetch the file again",
        })?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// Those of an object that `path` holds.
    pub(crate) fn new(path: &Path, map: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), map }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The fields of an object inside this one.
    pub(crate) fn within(&self, key: &str) -> Result<Option<Self>> {
        Ok(self.object(key)?.map(|map| Self { path: self.path.clone(), map: map.clone() }))
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<&Map<String, Value>>> {
        self.typed(key, "an object", Value::as_object)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number from 0", |value| usize::try_from(value.as_u64()?).ok())
    }

    /// One token id, or a list of them.
    pub(crate) fn tokens(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let token = |value: &Value| u32::try_from(value.as_u64()?).ok();
        self.typed(key, "a token id or a list of them", |value| match value.as_array() {
            Some(list) => list.iter().map(token).collect(),
            None => Some(vec![token(value)?]),
        })
    }

    /// A field that must be there.
    pub(crate) fn required<T>(
        &self,
        key: &str,
        read: impl FnOnce(&Self, &str) -> Result<Option<T>>,
    ) -> Result<T> {
        read(self, key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn missing(&self, key: &str) -> Error {
        self.wrong(key, "a value", &"absent")
    }

    pub(crate) fn wrong(&self, key: &str, wanted: &str, found: &dyn std::fmt::Display) -> Error {
        // A value can be a whole object: enough of it to recognise.
        let found: String = found.to_string().chars().take(80).collect();
        Error::Format {
            path: self.path.clone(),
            what: key.to_owned(),
            wanted: wanted.to_owned(),
            found,
            advice: "take the file that came with the weights",
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, wanted, value))
    }
}
