//! Loading models: what is read, and what is said of files that cannot be.

mod families;
mod folder;
mod folder_faults;
mod gguf;
mod gguf_faults;
mod make;
mod repo;

use models::{Error, Source, Weights, open};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// A file of `tests/golden`.
fn golden(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn weights(path: &Path) -> Weights {
    Weights::new(open(path).unwrap(), Kind::Float, Device::Cpu).unwrap()
}

/// Why the source cannot be opened.
fn refusal(path: &Path) -> Error {
    match open(path) {
        Err(error) => error,
        Ok(source) => panic!("{} was opened: {:?}", path.display(), source.config()),
    }
}

/// Why a tensor cannot be read.
fn tensor_refusal(source: Source, name: &str, shape: &[i64]) -> Error {
    Weights::new(source, Kind::Float, Device::Cpu).unwrap().tensor(name, shape).unwrap_err()
}

/// Asserts that the error's text says each of `parts`.
#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(text.contains("; ") && !text.ends_with('.') && !text.contains('\n'), "{text}");
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

#[test]
fn a_path_that_is_not_there_is_named() {
    let error = refusal(Path::new("/nowhere/model.gguf"));
    assert!(matches!(error, Error::Io { .. }));
    says(&error, &["/nowhere/model.gguf", "No such file", "a Hugging Face folder"]);
}

#[test]
fn weights_are_f32_or_bf16() {
    let source = open(&golden("gguf/gqa2_llama31.gguf")).unwrap();
    let error = Weights::new(source, Kind::Half, Device::Cpu).unwrap_err();
    assert!(matches!(error, Error::WeightKind(_)));
    says(&error, &["Half", "f32 or bf16"]);
}
