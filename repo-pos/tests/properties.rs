//! What must hold of any positions, heads and weights.

use proptest::prelude::*;
use repo_pos::{Array, Error, Frequencies, Module, Repo, Repositioner};

const MAX_HEADS: usize = 4;
const MAX_TOKENS: usize = 6;

#[derive(Clone, Debug)]
struct Heads {
    frequencies: Frequencies,
    tokens: usize,
    x: Vec<f32>,         // [heads, tokens, head_dim]
    positions: Vec<f32>, // [heads, tokens]
}

impl Heads {
    fn rotated(&self, positions: &[f32]) -> Vec<f32> {
        let mut x = self.x.clone();
        self.frequencies.rotate(&mut x, positions, self.tokens).unwrap();
        x
    }
}

/// Positions as trained models spread them: real, of either sign, hundreds wide.
fn heads() -> impl Strategy<Value = Heads> {
    let sizes = (1..=MAX_HEADS, 1..=MAX_TOKENS, prop::sample::select(vec![2usize, 8, 64, 80]));
    sizes.prop_flat_map(|(heads, tokens, dim)| {
        let x = prop::collection::vec(-2f32..2.0, heads * tokens * dim);
        let positions = prop::collection::vec(-300f32..300.0, heads * tokens);
        let theta = prop::sample::select(vec![1e4, 5e5]);
        (x, positions, theta).prop_map(move |(x, positions, theta)| {
            let frequencies = Frequencies::plain(theta, dim).unwrap();
            Heads { frequencies, tokens, x, positions }
        })
    })
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn rotation_keeps_norms(h in heads()) {
        let dim = h.frequencies.head_dim();
        for (a, b) in h.x.chunks(dim).zip(h.rotated(&h.positions).chunks(dim)) {
            let (a, b) = (dot(a, a).sqrt(), dot(b, b).sqrt());
            prop_assert!((a - b).abs() <= 1e-5 * a.max(1.0), "{} became {}", a, b);
        }
    }

    #[test]
    fn scores_see_only_differences_of_positions(h in heads(), shift in -300f32..300.0) {
        let dim = h.frequencies.head_dim();
        let moved: Vec<_> = h.positions.iter().map(|z| z + shift).collect();
        let (here, there) = (h.rotated(&h.positions), h.rotated(&moved));
        let size = h.tokens * dim;
        for (here, there) in here.chunks(size).zip(there.chunks(size)) {
            for (q, k) in (0..h.tokens).flat_map(|q| (0..h.tokens).map(move |k| (q, k))) {
                let score = |x: &[f32]| dot(&x[q * dim..][..dim], &x[k * dim..][..dim]);
                // f32 positions near 600 are 6e-5 apart, times norms of at most 4 * dim.
                let allowed = 2e-4 * dim as f32;
                prop_assert!((score(here) - score(there)).abs() <= allowed);
            }
        }
    }

    /// The textbook form: pair (i, i + d/2) is a complex number, turned by n radians of its speed.
    #[test]
    fn integer_positions_are_plain_rotary_embedding(h in heads(), first in 0u32..4000) {
        let dim = h.frequencies.head_dim();
        let index: Vec<_> = (0..h.tokens).map(|n| (first as usize + n) as f32).collect();
        for (row, (x, found)) in h.x.chunks(dim).zip(h.rotated(&index).chunks(dim)).enumerate() {
            let n = f64::from(index[row % h.tokens]);
            for (i, inverse) in h.frequencies.inverse().iter().enumerate() {
                let (sin, cos) = (n * f64::from(*inverse)).sin_cos();
                let (re, im) = (f64::from(x[i]), f64::from(x[i + dim / 2]));
                prop_assert!((f64::from(found[i]) - (re * cos - im * sin)).abs() < 1e-3);
                prop_assert!((f64::from(found[i + dim / 2]) - (re * sin + im * cos)).abs() < 1e-3);
            }
        }
    }

    #[test]
    fn a_head_moves_alone(h in heads(), by in 1f32..50.0) {
        let mut moved = h.positions.clone();
        moved[..h.tokens].iter_mut().for_each(|z| *z += by);
        let (before, after) = (h.rotated(&h.positions), h.rotated(&moved));
        let size = h.tokens * h.frequencies.head_dim();
        prop_assert_eq!(&before[size..], &after[size..]);
        prop_assert_ne!(&before[..size], &after[..size]);
    }

    #[test]
    fn rotating_back_undoes(h in heads()) {
        let back: Vec<_> = h.positions.iter().map(|z| -z).collect();
        let there = Heads { x: h.rotated(&h.positions), ..h.clone() };
        for (a, b) in h.x.iter().zip(there.rotated(&back)) {
            prop_assert!((a - b).abs() < 1e-5, "{} became {}", a, b);
        }
    }

    #[test]
    fn queries_share_the_positions_of_their_kv_head(h in heads(), group in 1usize..4) {
        let size = h.tokens * h.frequencies.head_dim();
        let repeated = |rows: &[f32], size| -> Vec<f32> {
            rows.chunks(size).flat_map(|row| row.repeat(group)).collect()
        };
        let queries = Heads { x: repeated(&h.x, size), ..h.clone() };
        prop_assert_eq!(queries.rotated(&h.positions), repeated(&h.rotated(&h.positions), size));
    }

    /// No look at the index or the neighbours: prefill and decode agree, evictions move nothing.
    #[test]
    fn positions_follow_the_hidden_state_alone(
        hidden in prop::collection::vec(-1f32..1.0, 2 * 3 * 8),
        maps in prop::collection::vec(-1f32..1.0, 2 * 16 + 6),
    ) {
        let [gate, content, last] = [&maps[..16], &maps[16..32], &maps[32..]].map(<[f32]>::to_vec);
        let module = Module::new(8, 3, gate, content, last).unwrap();
        let all = module.positions(&Array::new(hidden.clone(), [2, 3, 8]).unwrap()).unwrap();
        prop_assert_eq!(all.shape(), [2, 3, 3]);
        for (n, state) in hidden.chunks(8).enumerate() {
            let one = module.positions(&Array::new(state.to_vec(), [1, 1, 8]).unwrap()).unwrap();
            for head in 0..3 {
                let (batch, token) = (n / 3, n % 3);
                prop_assert_eq!(all.data()[(batch * 3 + head) * 3 + token], one.data()[head]);
            }
        }
    }
}

fn module(hidden: usize, heads: usize) -> Module {
    Module::new(hidden, heads, vec![0.1; hidden], vec![0.2; hidden], vec![0.3; heads]).unwrap()
}

#[test]
fn layers_without_maps_keep_the_index() {
    let repo = Repo::new(vec![None, Some(module(4, 2))]).unwrap();
    let hidden = Array::new(vec![1.0; 4], [1, 1, 4]).unwrap();
    assert_eq!(repo.positions(0, &hidden).unwrap(), None);
    assert!(repo.positions(1, &hidden).unwrap().is_some());
    assert_eq!(repo.positions(7, &hidden).unwrap(), None);
}

#[test]
fn layers_of_different_models_are_refused() {
    let error = Repo::new(vec![None, Some(module(4, 2)), Some(module(4, 3))]).unwrap_err();
    assert!(
        matches!(error, Error::Layers { layer: 2, expected: (4, 2), found: (4, 3) }),
        "{error}"
    );
}

#[test]
fn shapes_that_disagree_are_refused_by_name() {
    let name = |error| match error {
        Error::Shape { name, .. } => name,
        other => panic!("{other}"),
    };
    let new = |hidden, heads, gate: usize, content: usize, last: usize| {
        let zeros = |len| vec![0.0; len];
        Module::new(hidden, heads, zeros(gate), zeros(content), zeros(last)).map_err(name)
    };
    assert_eq!(new(0, 1, 4, 4, 1), Err("gate map"));
    assert_eq!(new(4, 1, 0, 0, 0), Err("gate map"));
    assert_eq!(new(4, 1, 6, 6, 1), Err("gate map"));
    assert_eq!(new(4, 1, 8, 4, 2), Err("content map"));
    assert_eq!(new(4, 0, 8, 8, 0), Err("final map"));
    assert_eq!(new(4, 3, 8, 8, 4), Err("final map"));

    let hidden = Array::new(vec![0.0; 5], [1, 1, 5]).unwrap();
    assert_eq!(module(4, 1).positions(&hidden).map_err(name), Err("hidden"));
    assert_eq!(Array::new(vec![0.0; 5], [1, 2, 3]).map_err(name), Err("data"));
    assert_eq!(Array::new(vec![], [usize::MAX, 2, 2]).map_err(name), Err("data"));

    let frequencies = Frequencies::plain(1e4, 4).unwrap();
    let rotate = |x: usize, positions: usize, tokens| {
        frequencies.rotate(&mut vec![0.0; x], &vec![0.0; positions], tokens).map_err(name)
    };
    assert_eq!(rotate(8, 2, 0), Err("positions"));
    assert_eq!(rotate(8, 0, 2), Err("positions"));
    assert_eq!(rotate(8, 3, 2), Err("positions"));
    assert_eq!(rotate(12, 2, 2), Err("x"));
    assert_eq!(rotate(0, 0, 0), Ok(()));
}
