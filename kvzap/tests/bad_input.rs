//! Damaged and foreign surrogates: a typed error that names the place, and no panic.

use kvzap::{Affine, Array, Error, Surrogate};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use tempfile::TempDir;

/// The golden linear surrogate, to be broken.
fn linear() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new("tests/golden/linear").join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn edit(folder: &TempDir, from: &str, to: &str) {
    let path = folder.path().join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

/// Replaces one tensor, or leaves it out.
fn put(folder: &TempDir, name: &str, tensor: Option<(Dtype, Vec<usize>, Vec<u8>)>) {
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = file.tensors();
    tensors.retain(|(other, _)| other != name);
    if let Some((dtype, shape, data)) = &tensor {
        tensors.push((name.into(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    }
    let bytes = safetensors::serialize(tensors, None).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The error's message, which must hold all `parts`.
#[track_caller]
fn fails(folder: &Path, parts: &[&str]) -> Error {
    let error = Surrogate::load(folder).unwrap_err();
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    error
}

#[test]
fn a_missing_folder_or_file_is_named() {
    fails("no/such/folder".as_ref(), &["no/such/folder/config.json", "check that it is there"]);
    let folder = linear();
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    fails(folder.path(), &["model.safetensors", "check that it is there"]);
}

#[test]
fn a_config_of_something_else_is_refused() {
    for (from, to, parts) in [
        ("\"kvzap\"", "\"llama\"", ["model_type", "\"llama\"", "expected \"kvzap\""]),
        ("\"n_modules\": 2", "\"n_modules\": 0", ["n_modules", "0", "above zero"]),
        ("\"n_modules\": 2", "\"n_modules\": -2", ["-2", "line", "KVzap surrogate"]),
        ("\"input_dim\": 48", "\"depth\": 48", ["input_dim", "missing", "KVzap surrogate"]),
        ("float32", "float64", ["float64", "bfloat16", "line"]),
        ("{", "", ["config.json", "line", "KVzap surrogate"]),
    ] {
        let folder = linear();
        edit(&folder, from, to);
        fails(folder.path(), &parts);
    }
}

#[test]
fn a_full_disk_is_no_missing_file() {
    for (kind, wanted) in
        [(ErrorKind::StorageFull, "make room"), (ErrorKind::NotFound, "check that it is there")]
    {
        let error = Error::File { path: "shard".into(), cause: kind.into() };
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn a_cut_or_swollen_file_is_refused() {
    let folder = linear();
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(11) {
        fs::write(&path, &bytes[..length]).unwrap();
        let error = fails(folder.path(), &["model.safetensors", "fetch it again"]);
        assert!(matches!(error, Error::Safetensors { .. }));
        assert!(std::error::Error::source(&error).is_none(), "its text says the cause, once");
    }
    for header in [u64::MAX, 1 << 40, bytes.len() as u64] {
        let mut bytes = bytes.clone();
        bytes[..8].copy_from_slice(&header.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        fails(folder.path(), &["model.safetensors", "fetch it again"]);
    }
    fs::write(&path, [bytes, vec![0; 4]].concat()).unwrap();
    fails(folder.path(), &["model.safetensors", "fetch it again"]);
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let folder = linear();
    put(&folder, "layers.1.bias", None);
    fails(folder.path(), &["no tensor layers.1.bias"]);
    put(&folder, "layers.1.bias", Some((Dtype::F32, vec![4], vec![0; 16])));
    fails(folder.path(), &["layers.1.bias", "[4]", "[3]"]);
    put(&folder, "layers.1.bias", Some((Dtype::I32, vec![3], vec![0; 12])));
    fails(folder.path(), &["layers.1.bias", "I32", "F32, F16 or BF16"]);

    let folder = linear();
    edit(&folder, "\"n_modules\": 2", "\"n_modules\": 1000000000000");
    fails(folder.path(), &["no tensor layers.2.weight"]);
    edit(&folder, "\"hidden_dim\": null", "\"hidden_dim\": 6");
    fails(folder.path(), &["no tensor layers.0.0.weight"]);
}

#[test]
fn weights_that_are_no_numbers_are_refused() {
    for value in [f32::NAN, f32::INFINITY] {
        let folder = linear();
        let data = [0.5, value, 1.0].iter().flat_map(|x: &f32| x.to_le_bytes()).collect();
        put(&folder, "layers.0.bias", Some((Dtype::F32, vec![3], data)));
        fails(folder.path(), &["layers.0.bias", &value.to_string(), "at 1"]);
    }
    let folder = linear();
    edit(&folder, "float32", "float16");
    let data = [0.5, 1e6, 1.0].iter().flat_map(|x: &f32| x.to_le_bytes()).collect();
    put(&folder, "layers.0.bias", Some((Dtype::F32, vec![3], data)));
    fails(folder.path(), &["layers.0.bias", "inf at 1"]);
}

#[test]
fn numbers_of_any_dtype_are_rounded_to_the_configs() {
    let folder = linear();
    let f16 =
        [0.1_f32, -2.0, 3.0].iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    put(&folder, "layers.0.bias", Some((Dtype::F16, vec![3], f16)));
    let bias = |folder: &TempDir| {
        Surrogate::load(folder.path()).unwrap().maps(0).unwrap()[0].bias().to_vec()
    };
    assert_eq!(bias(&folder), [0.099975586, -2.0, 3.0]);

    // The older name, and both names at once.
    edit(&folder, "\"dtype\": \"float32\"", "\"torch_dtype\": \"bfloat16\"");
    assert_eq!(bias(&folder), [0.100097656, -2.0, 3.0]);
    edit(&folder, "\"torch_dtype\"", "\"dtype\": \"float32\", \"torch_dtype\"");
    assert_eq!(bias(&folder), [0.099975586, -2.0, 3.0]);
}

#[test]
fn a_surrogate_of_another_model_says_what_differs() {
    let surrogate = Surrogate::load("tests/golden/linear").unwrap();
    for (sizes, expected) in [
        ((3, 48, 3), "layers 2, the model 3"),
        ((2, 64, 3), "hidden size 48, the model 64"),
        ((2, 48, 8), "kv heads 3, the model 8"),
    ] {
        let message = surrogate.check(sizes.0, sizes.1, sizes.2).unwrap_err().to_string();
        assert!(
            message.contains("surrogate of another model") && message.contains(expected),
            "{message}"
        );
    }
    let hidden = Array::new(vec![0.0; 64], &[1, 1, 64]).unwrap();
    let message = surrogate.forward(0, &hidden).unwrap_err().to_string();
    assert!(message.contains("[1, 1, 64]") && message.contains("48"), "{message}");
    assert!(matches!(surrogate.forward(2, &hidden), Err(Error::Layer { layer: 2, layers: 2 })));
}

#[test]
fn maps_that_do_not_fit_together_are_refused() {
    let map = |outputs: usize, inputs: usize| {
        Affine::new(vec![0.0; outputs * inputs], vec![0.0; outputs])
    };
    assert!(map(0, 3).is_err() && map(3, 0).is_err());
    assert!(Affine::new(vec![0.0; 7], vec![0.0; 2]).is_err());
    assert!(Surrogate::linear(vec![]).is_err());
    let uneven = Surrogate::linear(vec![map(2, 3).unwrap(), map(2, 4).unwrap()]);
    assert!(matches!(uneven, Err(Error::Build { layer: 1, .. })));
    let apart = Surrogate::mlp(vec![[map(2, 3).unwrap(), map(2, 3).unwrap()]]);
    assert!(matches!(apart, Err(Error::Build { layer: 0, .. })));
}

#[test]
fn a_folder_that_cannot_be_written_is_named_and_keeps_what_it_held() {
    let surrogate = Surrogate::load("tests/golden/linear").unwrap();
    // Root may write anywhere but into /proc; others are held off by a folder's permissions alone.
    let message = surrogate.save("/proc/self/surrogate").unwrap_err().to_string();
    assert!(
        message.contains("/proc/self/surrogate") && message.contains("you may use it"),
        "{message}"
    );

    // A folder in the place of a file: written beside, not renamed, and the part is taken away.
    let folder = linear();
    let place = folder.path().join("model.safetensors");
    fs::remove_file(&place).unwrap();
    fs::create_dir(&place).unwrap();
    let message = surrogate.save(folder.path()).unwrap_err().to_string();
    assert!(message.contains("model.safetensors"), "{message}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}
