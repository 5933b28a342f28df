//! The golden file, and the weights it was made with (tests/golden/make.py).
#![allow(dead_code, reason = "each test binary uses its part")]

use repo_pos::Module;
use safetensors::{Dtype, SafeTensors};

static GOLDEN: &[u8] = include_bytes!("../golden/golden.safetensors");

/// One tensor of golden.safetensors, f32 or f64, as f64.
pub fn golden(name: &str) -> Vec<f64> {
    let file = SafeTensors::deserialize(GOLDEN).unwrap();
    let tensor = file.tensor(name).unwrap();
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        other => panic!("{other:?}"),
    }
}

/// The same where f32 is meant: what the file holds as f32 comes back bit by bit.
pub fn golden_f32(name: &str) -> Vec<f32> {
    golden(name).into_iter().map(|x| x as f32).collect()
}

/// The golden layer's weights and input, by formula.
pub fn wave(t: u8, len: usize, scale: f64) -> Vec<f32> {
    (0..len).map(|n| (scale * (1.7 * f64::from(t) + 0.731 * n as f64).sin()) as f32).collect()
}

/// The golden layer's position maps: hidden 16, width 2, 2 heads.
pub fn module() -> Module {
    Module::new(16, 2, wave(2, 32, 0.8), wave(3, 32, 0.8), wave(4, 4, 2.0)).unwrap()
}

/// Holds `found` to `expected` by `tolerance`, and says by how much they differ.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let pairs = found.iter().zip(expected);
    let worst = pairs.map(|(&f, e)| (f64::from(f) - e).abs()).fold(0.0, f64::max);
    println!("{what}: largest difference {worst:.1e}, allowed {tolerance:.0e}");
    assert!(worst <= tolerance, "{what}: largest difference {worst:e}, allowed {tolerance:e}");
    assert!(found.iter().all(|x| x.is_finite()), "{what} has a NaN");
}
