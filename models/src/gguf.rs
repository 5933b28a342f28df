//! A GGUF file: metadata, tokenizer and tensors in one, after llama.cpp's conventions.

mod config;
mod header;
mod metadata;
mod names;

use crate::bridge;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::weights::Stored;
use header::{Header, Type};
use memmap2::Mmap;
pub use metadata::Metadata;
use std::fs::File;
use std::path::{Path, PathBuf};

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    header: Header,
    config: Config,
}

impl Gguf {
    /// Maps the file and reads its header. Version 2 and 3, little-endian.
    pub fn open(path: &Path) -> Result<Self> {
        let unreadable = |cause| Error::Io {
            path: path.to_owned(),
            cause,
            advice: "check that it is a file that may be read",
        };
        let file = File::open(path).map_err(unreadable)?;
        let map = bridge::map_file(&file).map_err(unreadable)?;
        let header = Header::parse(&map).map_err(|fault| fault.at(path))?;
        let config = config::read(Metadata { path, file: &map, header: &header })?;
        Ok(Self { path: path.to_owned(), map, header, config })
    }

    /// The model's shapes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata, such as `tokenizer.ggml.tokens`.
    pub fn metadata(&self) -> Metadata<'_> {
        Metadata { path: &self.path, file: &self.map, header: &self.header }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        names::in_gguf(name, self.config.architecture)
            .is_some_and(|name| self.header.tensors.contains_key(&name))
    }

    /// All tensors that can be read, by their names in the file.
    pub(crate) fn all(&self) -> impl Iterator<Item = Stored<'_>> {
        self.header.tensors.keys().filter_map(|name| stored(self.metadata(), name).ok())
    }

    pub(crate) fn stored(&self, name: &str) -> Result<Stored<'_>> {
        let architecture = self.config.architecture;
        let in_file = names::in_gguf(name, architecture).unwrap_or_else(|| name.to_owned());
        let mut stored = stored(self.metadata(), &in_file)?;
        stored.map = Some(&self.map);
        if names::interleaved(name, architecture) {
            let (rows, head_dim) = (stored.shape[0], self.config.head_dim);
            if !rows.is_multiple_of(head_dim) {
                return Err(Error::Format {
                    path: self.path.clone(),
                    what: format!("the rows of tensor {in_file}"),
                    wanted: format!("a multiple of the head dim {head_dim}"),
                    found: rows.to_string(),
                    advice: "convert the model again",
                });
            }
            stored.interleaved = Some(head_dim);
        }
        Ok(stored)
    }
}

/// A tensor by its name in the file, rows as they lie there.
fn stored<'a>(Metadata { path, file, header }: Metadata<'a>, name: &str) -> Result<Stored<'a>> {
    let Some(tensor) = header.tensors.get(name) else {
        return Err(Error::MissingTensor {
            path: path.to_owned(),
            tensor: name.to_owned(),
            advice: "convert or fetch the file again",
        });
    };
    let Type::Known(encoding) = tensor.kind else {
        return Err(Error::WrongDtype {
            path: path.to_owned(),
            tensor: name.to_owned(),
            found: tensor.kind.to_string(),
        });
    };
    Ok(Stored {
        path,
        name: name.to_owned(),
        shape: tensor.shape.clone(),
        encoding,
        bytes: &file[tensor.bytes.clone()],
        map: None,
        interleaved: None,
    })
}
