//! A matrix times one vector: what a decode step does with every weight.
//!
//! It is bound by reading the matrix. libtorch's own runs on one thread where it has no MKL kernel for the CPU, and
//! rayon's iterators wait for a sleeping thread before they begin, 40 µs for each of a hundred products a token; so here
//! the caller begins at once, and whoever wakes takes the next rows.

use pulp::{Arch, Simd, WithSimd};
use rayon::in_place_scope;
use std::array::from_fn;
use std::sync::{Mutex, PoisonError};

/// Elements of the matrix that make a task: 256 KB, large beside the cost of taking it.
const TASK: usize = 1 << 16;
/// Tasks are whole groups of rows, whatever the CPU's group.
const MOST_ROWS: usize = 8;

/// `y = weight · x + bias`; `weight` is `[y, x]`, row-major.
pub(crate) fn gemv(weight: &[f32], x: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let arch = Arch::new();
    let rows = (TASK / x.len().max(1)).next_multiple_of(MOST_ROWS).max(MOST_ROWS);
    let helpers = y.len().div_ceil(rows).min(rayon::current_num_threads()).saturating_sub(1);
    let tasks = Mutex::new(y.chunks_mut(rows).zip(weight.chunks(rows * x.len())));
    let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((y, weight)) = next() {
            arch.dispatch(Products { weight, x, y });
        }
    };
    in_place_scope(|scope| {
        (0..helpers).for_each(|_| scope.spawn(|_| work()));
        work();
    });
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

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Rows side by side do not wait for each other's sums; more of them than fit the registers would wait for memory.
        if S::REGISTER_COUNT >= 32 {
            self.by_rows::<S, MOST_ROWS>(simd);
        } else {
            self.by_rows::<S, 4>(simd);
        }
    }
}

impl Products<'_> {
    #[inline(always)]
    fn by_rows<S: Simd, const R: usize>(self, simd: S) {
        let Self { weight, x, y } = self;
        let (groups, rest) = y.as_chunks_mut::<R>();
        let (grouped, single) = weight.split_at(groups.len() * R * x.len());
        for (rows, y) in grouped.chunks_exact(R * x.len()).zip(groups) {
            *y = dots(simd, rows, x);
        }
        for (row, y) in single.chunks_exact(x.len()).zip(rest) {
            [*y] = dots(simd, row, x);
        }
    }
}

/// `x` times each of `R` rows.
#[inline(always)]
fn dots<S: Simd, const R: usize>(simd: S, rows: &[f32], x: &[f32]) -> [f32; R] {
    let (blocks, tail) = S::as_simd_f32s(x);
    let rows: [_; R] = from_fn(|r| S::as_simd_f32s(&rows[r * x.len()..][..x.len()]));
    let row_blocks: [_; R] = from_fn(|r| &rows[r].0[..blocks.len()]);
    let mut sums = [simd.splat_f32s(0.0); R];
    for (i, &x) in blocks.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(row_blocks) {
            *sum = simd.mul_add_f32s(row[i], x, *sum);
        }
    }
    from_fn(|r| {
        let rest: f32 = rows[r].1.iter().zip(tail).map(|(w, x)| w * x).sum();
        rest + simd.reduce_sum_f32s(sums[r])
    })
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
