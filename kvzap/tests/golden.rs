//! The plain forward against kvpress; tests/golden/make.py tells how the numbers came.

use kvzap::{Array, Dtype, Surrogate};
use safetensors::SafeTensors;

fn golden(name: &str) -> Array {
    let bytes = std::fs::read("tests/golden/scores.safetensors").unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let numbers = view.data().as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
    Array::new(numbers, view.shape()).unwrap()
}

#[test]
fn scores_are_those_of_kvpress() {
    for name in ["linear", "mlp"] {
        let surrogate = Surrogate::load(format!("tests/golden/{name}")).unwrap();
        let expected = golden(&format!("{name}.f32"));
        let found: Vec<f32> = (0..surrogate.layers())
            .flat_map(|layer| surrogate.forward(layer, &golden("hidden")).unwrap().data().to_vec())
            .collect();
        assert_eq!(found.len(), expected.data().len());
        let error =
            found.iter().zip(expected.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error <= 1e-5, "{name}: {error}");
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
