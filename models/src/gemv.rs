//! A matrix times one vector: what a decode step does with every weight.
//!
//! It is bound by reading the matrix. libtorch's own runs on one thread (9 GB/s where two read 26), so this one
//! shares the rows out.

use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

/// Elements of the matrix that make a task: 256 KB, large beside the cost of waking a thread.
const TASK: usize = 1 << 16;
/// Sums that are kept apart, so that the compiler can use whole registers.
const LANES: usize = 32;

/// `y = weight · x + bias`; `weight` is `[y, x]`, row-major.
pub(crate) fn gemv(weight: &[f32], x: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let arch = Arch::new();
    let rows = (TASK / x.len().max(1)).max(1);
    y.par_chunks_mut(rows)
        .zip(weight.par_chunks(rows * x.len()))
        .for_each(|(y, weight)| arch.dispatch(Products { weight, x, y }));
    if let Some(bias) = bias {
        y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
    }
}

/// Some rows of the product. A type of its own and not a closure: only what is inlined into [`Arch::dispatch`] is
/// compiled for the CPU's SIMD.
struct Products<'a> {
    weight: &'a [f32],
    x: &'a [f32],
    y: &'a mut [f32],
}

impl NullaryFnOnce for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (row, y) in self.weight.chunks_exact(self.x.len()).zip(self.y) {
            *y = dot(row, self.x);
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a, b) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.0.iter().zip(b.0) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a.1.iter().zip(b.1).map(|(a, b)| a * b).sum();
    rest + sums.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_product_at_sizes_beside_the_task_and_the_lanes() {
        for (rows, columns) in [(1, 1), (3, 31), (130, 33), (7, 64), (2000, 97), (113, 576)] {
            let value = |i: usize| ((i * 7919 % 1013) as f32 - 500.0) / 500.0;
            let weight: Vec<f32> = (0..rows * columns).map(value).collect();
            let x: Vec<f32> = (0..columns).map(|i| value(i + 17)).collect();
            let bias: Vec<f32> = (0..rows).map(|i| value(i + 5)).collect();
            for bias in [None, Some(&bias[..])] {
                let mut y = vec![f32::NAN; rows];
                gemv(&weight, &x, bias, &mut y);
                for (r, &found) in y.iter().enumerate() {
                    let row = &weight[r * columns..(r + 1) * columns];
                    let exact: f64 =
                        row.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                    let exact = exact + bias.map_or(0.0, |bias| f64::from(bias[r]));
                    assert!((f64::from(found) - exact).abs() < 1e-4, "{rows}x{columns}, row {r}");
                }
            }
        }
    }
}
