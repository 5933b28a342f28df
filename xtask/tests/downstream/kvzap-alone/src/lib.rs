//! An engine that has a tensor type and a scorer of its own, and takes from us what to do with the scores.

use kvzap::{Array, LayerInput, Policy, Result, Scorer, Threshold, WINDOW, judged};

/// The engine's tensor: one sequence, `[heads, tokens, dim]`.
pub struct Tensor {
    pub data: Vec<f32>,
    pub shape: [usize; 3],
}

/// Keys of small norm draw attention, so they stay.
pub struct KeyNorm;

impl Scorer<Tensor> for KeyNorm {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let [heads, tokens, dim] = input.keys.shape;
        let norm = |key: &[f32]| -key.iter().map(|x| x * x).sum::<f32>().sqrt();
        Ok(Tensor {
            data: input.keys.data.chunks(dim).map(norm).collect(),
            shape: [1, heads, tokens],
        })
    }
}

/// Which tokens of each head are gone after a prefill, given its keys.
pub fn forgotten(keys: &Tensor, threshold: f32) -> Result<Vec<Vec<usize>>> {
    let layer = LayerInput { layer: 0, hidden: keys, queries: keys, keys, values: keys };
    let Tensor { data, shape } = KeyNorm.score(layer)?;
    let [_, heads, tokens] = shape;
    let drops = Threshold::new(threshold)?.drops(&Array::new(data, &shape)?)?;
    let of = |head| judged(tokens, WINDOW).filter(|token| drops[head * tokens + token]).collect();
    Ok((0..heads).map(of).collect())
}

#[test]
fn heads_forget_on_their_own_and_not_in_the_window() {
    let (heads, tokens) = (2, WINDOW + 3);
    let mut data = vec![1.0; heads * tokens];
    for (head, token) in [(0, 1), (0, tokens - 1), (1, 0), (1, 2)] {
        data[head * tokens + token] = 9.0;
    }
    let keys = Tensor { data, shape: [heads, tokens, 1] };
    assert_eq!(forgotten(&keys, -5.0).unwrap(), [vec![1], vec![0, 2]]);
    assert!(forgotten(&keys, f32::NAN).is_err());
}
