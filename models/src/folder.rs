//! A Hugging Face folder: config.json, generation_config.json and the safetensors files of its
//! index.

mod config;
mod fields;
pub(crate) mod shard;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::positions;
use crate::weights::Stored;
pub(crate) use fields::Fields;
pub(crate) use shard::Shard;
use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// The shapes and constants of a folder that need not hold weights.
pub(crate) fn config(path: &Path) -> Result<Config> {
    config::read(path)
}

/// An opened Hugging Face folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    tensors: HashMap<String, usize>,
    notes: Vec<String>,
}

impl Folder {
    /// Reads the configs and the headers of the weight files, and maps these.
    ///
    /// If there is an index, the files it names are opened and no other; else model.safetensors;
    /// else every safetensors file, which must not share a tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let mut config = config::read(path)?;
        let index = path.join(INDEX);
        let (shards, tensors) =
            if index.exists() { open_index(path, &index)? } else { open_unindexed(path)? };
        let mut notes = Vec::new();
        if config.tied_embeddings && tensors.contains_key("lm_head.weight") {
            // As transformers 5 does.
            config.tied_embeddings = false;
            notes.push(format!(
                "{}: tie_word_embeddings is true, but there is lm_head.weight, which is used",
                path.join(config::FILE).display()
            ));
        }
        let folder = Self { path: path.to_owned(), config, shards, tensors, notes };
        positions::reconcile(
            &folder.config.positions,
            &path.join(config::FILE),
            |name| folder.has(name),
            |name| folder.missing(name, "take pe_config and weights of the same model"),
        )?;
        Ok(folder)
    }

    /// The model's shapes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn stored(&self, name: &str) -> Result<Stored<'_>> {
        match self.tensors.get(name) {
            Some(&shard) => self.shards[shard].stored(name),
            None if name == "lm_head.weight" => Err(self.missing(
                name,
                "set tie_word_embeddings to true, or fetch the weights again if they should hold it",
            )),
            None => Err(self.missing(name, "take config.json and weights of the same model")),
        }
    }

    fn missing(&self, name: &str, advice: &'static str) -> Error {
        let path = match &self.shards[..] {
            [only] => only.path().to_owned(),
            _ => self.path.join(INDEX),
        };
        Error::MissingTensor { path, tensor: name.to_owned(), advice }
    }
}

type Opened = (Vec<Shard>, HashMap<String, usize>);

fn open_index(folder: &Path, index: &Path) -> Result<Opened> {
    let fields = Fields::read(index)?;
    let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in
        fields.object("weight_map")?.ok_or_else(|| fields.missing("weight_map"))?
    {
        let file = file
            .as_str()
            .ok_or_else(|| fields.wrong(&format!("the file of {tensor}"), "a string", file))?;
        files.entry(file).or_default().push(tensor);
    }
    let mut opened = Opened::default();
    for (file, tensors) in files {
        // Links are followed, for Hugging Face's cache consists of them; it is the name that must
        // not lead elsewhere.
        let inside = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside || file.is_empty() {
            return Err(Error::OutsideFolder { path: index.to_owned(), file: file.to_owned() });
        }
        let path = folder.join(file);
        let missing = |tensor: &str, advice| Error::MissingTensor {
            path: path.clone(),
            tensor: tensor.to_owned(),
            advice,
        };
        if !path.exists() {
            return Err(missing(
                tensors[0],
                "the index names this file, which is not there: fetch it",
            ));
        }
        let shard = Shard::open(&path)?;
        for tensor in tensors {
            if !shard.has(tensor) {
                return Err(missing(
                    tensor,
                    "the index says it is in this file: fetch the folder again",
                ));
            }
            opened.1.insert(tensor.to_owned(), opened.0.len());
        }
        opened.0.push(shard);
    }
    Ok(opened)
}

fn open_unindexed(folder: &Path) -> Result<Opened> {
    let single = folder.join(SINGLE);
    let files = if single.exists() { vec![single] } else { safetensors_in(folder)? };
    let mut opened = Opened::default();
    for path in files {
        let shard = Shard::open(&path)?;
        for tensor in shard.names() {
            if let Some(first) = opened.1.insert(tensor.clone(), opened.0.len()) {
                let first = opened.0[first].path().to_owned();
                return Err(Error::DuplicateTensor { tensor, first, second: path });
            }
        }
        opened.0.push(shard);
    }
    Ok(opened)
}

fn safetensors_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |cause| Error::Io {
        path: folder.to_owned(),
        cause,
        advice: "check the folder's permissions",
    };
    let mut files = std::fs::read_dir(folder)
        .map_err(unreadable)?
        .map(|entry| Ok(entry.map_err(unreadable)?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    if files.is_empty() {
        return Err(Error::Io {
            path: folder.join(SINGLE),
            cause: std::io::ErrorKind::NotFound.into(),
            advice: "fetch the weights as safetensors, the only format read from a folder",
        });
    }
    Ok(files)
}
