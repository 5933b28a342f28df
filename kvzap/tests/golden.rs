//! The plain forward against kvpress; tests/golden/make.py and shipped.py tell how the numbers came.

use kvzap::{Array, Calibration, Dtype, Surrogate, WINDOW};
use safetensors::SafeTensors;

fn golden(file: &str, name: &str) -> Array {
    let bytes = std::fs::read(format!("tests/golden/{file}.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let numbers = view.data().as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
    Array::new(numbers, view.shape()).unwrap()
}

/// Whether the scores of `hidden` by the surrogate in `folder`, layer after layer, are `expected`.
fn assert_scores(folder: &str, hidden: &Array, expected: &Array) {
    let surrogate = Surrogate::load(folder).unwrap();
    let found: Vec<f32> = (0..surrogate.layers())
        .flat_map(|layer| surrogate.forward(layer, hidden).unwrap().data().to_vec())
        .collect();
    assert_eq!(found.len(), expected.data().len(), "{folder}");
    let each = found.iter().zip(expected.data()).map(|(a, b)| (a - b).abs() / b.abs().max(1.0));
    let error = each.fold(0.0, f32::max);
    assert!(error <= 1e-5, "{folder}: {error}");
}

#[test]
fn scores_are_those_of_kvpress() {
    for name in ["linear", "mlp"] {
        let expected = golden("scores", &format!("{name}.f32"));
        assert_scores(&format!("tests/golden/{name}"), &golden("scores", "hidden"), &expected);
        let shipped = format!("surrogates/smollm2-135m-instruct-{name}");
        assert_scores(&shipped, &golden("shipped", "hidden"), &golden("shipped", name));
    }
}

#[test]
fn each_that_is_shipped_fits_the_model_and_knows_its_thresholds() {
    let folders = std::fs::read_dir("surrogates").unwrap().map(|entry| entry.unwrap().path());
    let shipped: Vec<_> = folders.filter(|folder| folder.join("config.json").exists()).collect();
    assert_eq!(shipped.len(), 3);
    for folder in shipped {
        Surrogate::load(&folder).unwrap().check(30, 576, 3).unwrap();
        let threshold = Calibration::load(&folder).unwrap().threshold(0.75, 2000, WINDOW).unwrap();
        assert!(threshold.is_finite(), "{}", folder.display());
    }
}

#[test]
fn a_folder_keeps_its_sizes_and_dtype_and_is_written_back_byte_for_byte() {
    for (name, dtype, maps) in [("linear", Dtype::F32, 1), ("mlp", Dtype::Bf16, 2)] {
        let surrogate = Surrogate::load(format!("tests/golden/{name}")).unwrap();
        surrogate.check(2, 48, 3).unwrap();
        assert_eq!((surrogate.dtype(), surrogate.maps(1).unwrap().len()), (dtype, maps));

        let folder = tempfile::tempdir().unwrap();
        let saved = folder.path().join("made/on/the/way");
        surrogate.save(&saved).unwrap();
        assert_eq!(Surrogate::load(&saved).unwrap(), surrogate);
        let read =
            |folder: &std::path::Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert_eq!(read(&saved), read(format!("tests/golden/{name}").as_ref()), "{name}");
        assert_eq!(std::fs::read_dir(&saved).unwrap().count(), 2, "a part file was left");
    }
}
