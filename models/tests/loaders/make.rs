//! Files to load: a small Llama in either layout, to be spoilt.

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A GGUF file in parts.
#[derive(Clone)]
pub struct GgufFile {
    pub version: u32,
    pub values: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<GgufTensor>,
    pub tensor_count: Option<u64>,
    pub value_count: Option<u64>,
}

#[derive(Clone)]
pub struct GgufTensor {
    pub name: String,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// Instead of where `bytes` lie.
    pub offset: Option<u64>,
}

pub const F32: u32 = 0;

impl GgufFile {
    /// One layer of width 64: 4 query heads, 2 key/value heads of dim 16, an MLP of 32, 8 tokens.
    /// No weights but the embedding, all ones.
    pub fn llama() -> Self {
        let mut file = Self {
            version: 3,
            values: vec![],
            tensors: vec![],
            tensor_count: None,
            value_count: None,
        };
        file.set("general.architecture", text("llama"));
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 128),
            ("embedding_length", 64),
            ("feed_forward_length", 32),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
        ] {
            file.set(&format!("llama.{key}"), whole(value));
        }
        file.set("llama.attention.layer_norm_rms_epsilon", real(1e-5));
        file.put("token_embd.weight", &[64, 8], &[1.0; 512]);
        file
    }

    pub fn set(&mut self, key: &str, value: Vec<u8>) {
        self.values.retain(|(other, _)| other != key);
        self.values.push((key.to_owned(), value));
    }

    pub fn put(&mut self, name: &str, dims: &[u64], values: &[f32]) {
        self.put_bytes(
            name,
            dims,
            F32,
            values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        );
    }

    pub fn put_bytes(&mut self, name: &str, dims: &[u64], kind: u32, bytes: Vec<u8>) {
        self.tensors.retain(|tensor| tensor.name != name);
        self.tensors.push(GgufTensor {
            name: name.to_owned(),
            dims: dims.to_vec(),
            kind,
            bytes,
            offset: None,
        });
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.value_count.unwrap_or(self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            out.extend(string(key));
            out.extend(value);
        }
        let mut data = Vec::new();
        for GgufTensor { name, dims, kind, bytes, offset } in &self.tensors {
            out.extend(string(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    pub fn save(&self) -> Saved {
        save("model.gguf", &self.bytes())
    }
}

/// A file or folder that goes when this goes.
pub struct Saved {
    pub path: PathBuf,
    _folder: TempDir,
}

pub fn save(name: &str, bytes: &[u8]) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    Saved { path, _folder: folder }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub fn text(text: &str) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &string(text)].concat()
}

pub fn whole(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn real(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn flag(value: bool) -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &[value.into()]].concat()
}

/// A list whose items are encoded already.
pub fn list(item: u32, count: u64, items: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &item.to_le_bytes(), &count.to_le_bytes(), items].concat()
}

pub fn texts(texts: &[&str]) -> Vec<u8> {
    list(8, texts.len() as u64, &texts.iter().flat_map(|text| string(text)).collect::<Vec<_>>())
}

/// The config of the same model in Hugging Face's words.
pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "tie_word_embeddings": true,
        "eos_token_id": 2, "bos_token_id": 1
    })
}

/// [`config`] with some fields changed; `null` takes one away.
pub fn config_with(changes: Value) -> Value {
    let mut config = config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// A folder with a config, and an embedding of ones as its weights.
pub fn folder(config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_json(&folder.path().join("config.json"), config);
    write_weights(
        &folder.path().join("model.safetensors"),
        &[("model.embed_tokens.weight", &[8, 64], &[1.0; 512])],
    );
    folder
}

pub fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

pub fn write_weights(path: &Path, tensors: &[(&str, &[usize], &[f32])]) {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (*name, Dtype::F32, shape.to_vec(), bytes)
        })
        .collect();
    write_typed(path, &tensors);
}

pub fn write_typed(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A safetensors file by its header's text.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}
