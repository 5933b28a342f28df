//! Plain attention over pages: what the other backends are held to.

use crate::book::StepHead;
use crate::error::Result;
use crate::host::{Call, Host, Kernel};
use crate::page::Slot;
use crate::shape::CacheShape;
use crate::view::ViewMut;

/// A cache in host memory with plain, exact attention: row by row, in f64. Written for reading.
pub type Reference = Host<Plain>;

/// The arithmetic of [`Reference`].
#[derive(Debug)]
pub struct Plain;

impl Reference {
    /// An empty cache. Memory grows with the pages in use.
    ///
    /// # Errors
    /// [`CacheShape`](crate::Error::CacheShape) for a shape that no cache can have.
    pub fn new(shape: CacheShape) -> Result<Self> {
        Self::build(shape, 1, Plain)
    }
}

impl Kernel for Plain {
    fn attend(&mut self, call: Call<'_>, out: &mut ViewMut<'_>, mut lse: Option<&mut [f32]>) {
        let [_, tokens, dim] = call.queries.shape();
        let group = call.shape.group();
        let mut query = vec![0.0; dim];
        for StepHead { head, tokens: range, slots, table } in call.heads {
            let (keys, values) = rows(&call, table.len(), |slot| table.place(slot));
            for (i, token) in range.clone().enumerate() {
                let later = &slots[i + 1..];
                let visible = (0..table.len())
                    .filter(|&slot| !later.contains(&Slot(slot as u32)))
                    .collect::<Vec<_>>();
                for query_head in head * group..(head + 1) * group {
                    call.queries.read(query_head, token, &mut query);
                    let scores = visible
                        .iter()
                        .map(|&slot| f64::from(call.scale) * dot(&query, &keys[slot]))
                        .collect::<Vec<_>>();
                    let values = visible.iter().map(|&slot| &values[slot]);
                    let (row, log_sum) = softmax(&scores, values, dim);
                    out.write(query_head, token, row.into_iter().map(|x| x as f32));
                    if let Some(lse) = &mut lse {
                        lse[query_head * tokens + token] = log_sum as f32;
                    }
                }
            }
        }
    }
}

/// The live keys and values of a head, in the order of their slots.
fn rows(
    call: &Call<'_>,
    len: usize,
    place: impl Fn(Slot) -> crate::page::Place,
) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let row = |slot: usize| {
        let (mut key, mut value) = (vec![0.0; call.shape.head_dim], vec![0.0; call.shape.head_dim]);
        call.memory.read(place(Slot(slot as u32)), &mut key, &mut value);
        (key, value)
    };
    (0..len).map(row).unzip()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The mean of `values` weighted by exp(score), and the logarithm of the sum of the weights.
fn softmax<'a>(
    scores: &[f64],
    values: impl Iterator<Item = &'a Vec<f32>>,
    dim: usize,
) -> (Vec<f64>, f64) {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut row, mut sum) = (vec![0.0; dim], 0.0);
    for (&score, value) in scores.iter().zip(values) {
        // Where every score is -inf, `score - max` would be NaN.
        let weight = if score == f64::NEG_INFINITY { 0.0 } else { (score - max).exp() };
        sum += weight;
        row.iter_mut().zip(value).for_each(|(x, &v)| *x += weight * f64::from(v));
    }
    if sum == 0.0 {
        return (vec![0.0; dim], f64::NEG_INFINITY);
    }
    row.iter_mut().for_each(|x| *x /= sum);
    (row, max + sum.ln())
}
