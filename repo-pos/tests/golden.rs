//! Numbers of the published code and of transformers; tests/golden/make.py tells how they came.

mod common;

use common::{assert_close, golden, golden_f32, module, wave};
use repo_pos::{Array, Frequencies, Yarn};

const TOKENS: usize = 5;
const HIDDEN: usize = 16;
const HEADS: usize = 2;
const HEAD_DIM: usize = 8;

#[test]
fn the_golden_layer_with_learned_positions() {
    let hidden = Array::new(wave(1, TOKENS * HIDDEN, 1.0), [1, TOKENS, HIDDEN]).unwrap();
    let positions = module().positions(&hidden).unwrap();
    assert_eq!(positions.shape(), [1, HEADS, TOKENS]);
    check_layer("layer", positions.data());
}

#[test]
fn the_golden_layer_with_plain_rotary_embedding() {
    check_layer("rope", &[0., 1., 2., 3., 4., 0., 1., 2., 3., 4.]);
}

/// An OLMo 2 layer in f32 around this crate's rotation, each stage held to the golden one.
fn check_layer(name: &str, positions: &[f32]) {
    let check = |stage: &str, found: &[f32]| {
        assert_close(stage, found, &golden(&format!("{name}.{stage}")), 1e-5);
    };
    check("positions", positions);

    let x = wave(1, TOKENS * HIDDEN, 1.0);
    let square = |t| wave(t, HIDDEN * HIDDEN, 0.3);
    let mut q = heads(&norm(&linear(&x, &square(5), HIDDEN), 9));
    let mut k = heads(&norm(&linear(&x, &square(6), HIDDEN), 10));
    let v = heads(&linear(&x, &square(7), HIDDEN));
    check("q", &q);
    check("k", &k);
    let frequencies = Frequencies::plain(500_000.0, HEAD_DIM).unwrap();
    frequencies.rotate(&mut q, positions, TOKENS).unwrap();
    frequencies.rotate(&mut k, positions, TOKENS).unwrap();
    check("rotated_q", &q);
    check("rotated_k", &k);

    let (mut scores, mut probabilities, mut mixed) = (vec![], vec![], vec![0.0; x.len()]);
    let size = TOKENS * HEAD_DIM;
    for head in 0..HEADS {
        let [q, k, v] = [&q, &k, &v].map(|tensor| &tensor[head * size..][..size]);
        let logits = linear(q, k, HEAD_DIM).iter().map(|x| x / 8f32.sqrt()).collect::<Vec<_>>();
        for (i, row) in logits.chunks(TOKENS).enumerate() {
            let weights = row.iter().enumerate().map(|(j, x)| if j <= i { x.exp() } else { 0.0 });
            let sum: f32 = weights.clone().sum();
            for (j, weight) in weights.enumerate() {
                probabilities.push(weight / sum);
                for (dim, value) in v[j * HEAD_DIM..][..HEAD_DIM].iter().enumerate() {
                    mixed[i * HIDDEN + head * HEAD_DIM + dim] += weight / sum * value;
                }
            }
        }
        scores.extend(logits);
    }
    check("scores", &scores);
    check("probabilities", &probabilities);
    let attention = linear(&mixed, &square(8), HIDDEN);
    check("attention", &attention);

    let x = add(&x, &norm(&attention, 11));
    let gate = linear(&x, &wave(13, 24 * HIDDEN, 0.3), HIDDEN);
    let up = linear(&x, &wave(14, 24 * HIDDEN, 0.3), HIDDEN);
    let inner: Vec<_> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    let mlp = linear(&inner, &wave(15, HIDDEN * 24, 0.3), 24);
    check("out", &add(&x, &norm(&mlp, 12)));
}

/// `x` [n, size] times `weight` [m, size] transposed.
fn linear(x: &[f32], weight: &[f32], size: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    x.chunks(size).flat_map(|x| weight.chunks(size).map(move |w| dot(x, w))).collect()
}

fn norm(x: &[f32], t: u8) -> Vec<f32> {
    let weight: Vec<_> = wave(t, HIDDEN, 0.1).iter().map(|w| 1.0 + w).collect();
    let scale = |x: &[f32]| (x.iter().map(|x| x * x).sum::<f32>() / HIDDEN as f32 + 1e-6).sqrt();
    let row = |x: &[f32]| x.iter().zip(&weight).map(|(v, w)| v / scale(x) * w).collect::<Vec<_>>();
    x.chunks(HIDDEN).flat_map(row).collect()
}

/// [tokens, heads * head_dim] to [heads, tokens, head_dim].
fn heads(x: &[f32]) -> Vec<f32> {
    let head = |h| x.chunks(HIDDEN).flat_map(move |x| x[h * HEAD_DIM..][..HEAD_DIM].to_vec());
    (0..HEADS).flat_map(head).collect()
}

fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// To the last bit: one unit in the last place is 0.008 radians at position 131,072.
#[test]
fn inverse_frequencies_are_those_of_transformers_bit_by_bit() {
    let llama3 = |dim, factor| Frequencies::llama3(500_000.0, dim, factor, 1.0, 4.0, 8192);
    let cases = [
        ("plain.1e4.64", Frequencies::plain(10_000.0, 64)),
        ("plain.1e5.64", Frequencies::plain(100_000.0, 64)),
        ("plain.5e5.128", Frequencies::plain(500_000.0, 128)),
        ("plain.1e6.80", Frequencies::plain(1_000_000.0, 80)),
        ("linear.1e4.64.3", Frequencies::linear(10_000.0, 64, 3.0)),
        ("llama3.5e5.128.8", llama3(128, 8.0)),
        ("llama3.5e5.64.32", llama3(64, 32.0)),
    ];
    for (name, found) in cases {
        assert_eq!(found.unwrap().inverse(), golden_f32(&format!("inverse.{name}")), "{name}");
    }
}

#[test]
fn yarns_frequencies_and_factors_are_those_of_transformers_bit_by_bit() {
    let odd = Yarn {
        beta_fast: 16.0,
        beta_slow: 2.0,
        truncate: false,
        attention_factor: 0.5,
        ..Yarn::new(8.0, 2048)
    };
    for (name, theta, dim, yarn) in [
        ("5e5.128.2", 500_000.0, 128, Yarn::new(2.0, 4096)),
        ("5e5.128.4", 500_000.0, 128, Yarn::new(4.0, 4096)),
        ("1e4.64.8", 10_000.0, 64, odd),
        ("1e6.8.40", 1_000_000.0, 8, Yarn::new(40.0, 32)),
    ] {
        let found = Frequencies::yarn(theta, dim, yarn).unwrap();
        assert_eq!(found.inverse(), golden_f32(&format!("inverse.yarn.{name}")), "{name}");
        assert_eq!([found.scale()], golden_f32(&format!("scale.yarn.{name}"))[..], "{name}");
    }
}

/// A vector of ones and zeros comes out as cosines and sines, scaled.
#[test]
fn yarn_scales_the_rotation_at_real_positions() {
    let frequencies = Frequencies::yarn(500_000.0, 128, Yarn::new(4.0, 4096)).unwrap();
    let mut x = [[1.0; 64], [0.0; 64]].concat().repeat(4);
    frequencies.rotate(&mut x, &[3.5, -37.8175, 4095.0, 15000.25], 4).unwrap();
    let (cos, sin): (Vec<_>, Vec<_>) =
        x.chunks(128).map(|row| (row[..64].to_vec(), row[64..].to_vec())).unzip();
    assert_close("cosine", &cos.concat(), &golden("yarn.cos"), 1e-6);
    assert_close("sine", &sin.concat(), &golden("yarn.sin"), 1e-6);
}

#[test]
fn rotation_is_that_of_transformers_near_and_far() {
    let frequencies = Frequencies::plain(500_000.0, 64).unwrap();
    let positions = golden_f32("rotation.positions");
    let mut x = golden_f32("rotation.x");
    frequencies.rotate(&mut x, &positions, positions.len()).unwrap();
    assert_close("rotation", &x, &golden("rotation.out"), 1e-6);
}
