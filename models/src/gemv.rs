//! A matrix times a vector, or a few: what a decode step does with every weight.
//!
//! For one vector it is bound by reading the matrix. libtorch's own runs on one thread where it has no MKL kernel for the
//! CPU, and rayon's iterators wait for a sleeping thread before they begin, 40 µs for each of a hundred products a token;
//! so here the caller begins at once, and whoever wakes takes the next rows.

use pulp::{Arch, Simd, WithSimd};
use rayon::in_place_scope;
use std::array::from_fn;
use std::sync::{Mutex, PoisonError};

/// Elements of the matrix that make a task: 256 KB, large beside the cost of taking it.
const TASK: usize = 1 << 16;
/// Tasks are whole groups of rows, whatever the CPU's group.
const MOST_ROWS: usize = 8;

/// `y = weight · x + bias` for each of `vectors` vectors: `weight` is `[outputs, inputs]`, `x` `[vectors, inputs]`, `y`
/// `[vectors, outputs]`, row-major. What one vector gives does not depend on the others, not in a bit.
pub(crate) fn gemv(weight: &[f32], x: &[f32], vectors: usize, bias: Option<&[f32]>, y: &mut [f32]) {
    if vectors == 1 {
        products(weight, x, 1, y);
    } else {
        let mut columns = vec![0.0; y.len()]; // [outputs, vectors]
        products(weight, x, vectors, &mut columns);
        for (vector, y) in y.chunks_exact_mut(columns.len() / vectors).enumerate() {
            let column = columns[vector..].iter().step_by(vectors);
            y.iter_mut().zip(column).for_each(|(y, column)| *y = *column);
        }
    }
    if let Some(bias) = bias {
        for y in y.chunks_exact_mut(bias.len()) {
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    }
}

/// `y`, `[outputs, vectors]`, without the bias.
fn products(weight: &[f32], x: &[f32], vectors: usize, y: &mut [f32]) {
    let arch = Arch::new();
    let inputs = x.len() / vectors;
    let rows = (TASK / inputs.max(1)).next_multiple_of(MOST_ROWS).max(MOST_ROWS);
    let outputs = y.len() / vectors;
    let helpers = outputs.div_ceil(rows).min(rayon::current_num_threads()).saturating_sub(1);
    let tasks = Mutex::new(y.chunks_mut(rows * vectors).zip(weight.chunks(rows * inputs)));
    let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((y, weight)) = next() {
            arch.dispatch(Products { weight, x, vectors, y });
        }
    };
    in_place_scope(|scope| {
        (0..helpers).for_each(|_| scope.spawn(|_| work()));
        work();
    });
}

/// Some rows of the product. A type of its own and not a closure: only what is inlined into [`Arch::dispatch`] is
/// compiled for the CPU's SIMD.
struct Products<'a> {
    weight: &'a [f32],
    x: &'a [f32],
    vectors: usize,
    y: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Sums side by side do not wait for each other; more of them than fit the registers would wait for memory.
        match (self.vectors, S::REGISTER_COUNT >= 32) {
            (1, true) => self.tiles::<S, MOST_ROWS, 1>(simd),
            (1, false) => self.tiles::<S, 4, 1>(simd),
            (_, true) => self.tiles::<S, 4, 4>(simd),
            (_, false) => self.tiles::<S, 4, 3>(simd),
        }
    }
}

impl Products<'_> {
    /// `R` rows of the matrix times `C` vectors at a time.
    #[inline(always)]
    fn tiles<S: Simd, const R: usize, const C: usize>(self, simd: S) {
        let Self { weight, x, vectors, y } = self;
        let inputs = x.len() / vectors;
        let whole = y.len() / (R * vectors) * R;
        let (grouped, single) = weight.split_at(whole * inputs);
        let (grouped_y, single_y) = y.split_at_mut(whole * vectors);
        for (rows, y) in
            grouped.chunks_exact(R * inputs).zip(grouped_y.chunks_exact_mut(R * vectors))
        {
            group::<S, R, C>(simd, rows, x, y);
        }
        for (row, y) in single.chunks_exact(inputs).zip(single_y.chunks_exact_mut(vectors)) {
            group::<S, 1, C>(simd, row, x, y);
        }
    }
}

/// `R` rows times all vectors; `y` is `[R, vectors]`.
#[inline(always)]
fn group<S: Simd, const R: usize, const C: usize>(simd: S, rows: &[f32], x: &[f32], y: &mut [f32]) {
    let (inputs, vectors) = (rows.len() / R, y.len() / R);
    let mut vector = 0;
    while vector + C <= vectors {
        let found = dots::<S, R, C>(simd, rows, &x[vector * inputs..]);
        for (y, found) in y.chunks_exact_mut(vectors).zip(found) {
            y[vector..vector + C].copy_from_slice(&found);
        }
        vector += C;
    }
    for vector in vector..vectors {
        let found = dots::<S, R, 1>(simd, rows, &x[vector * inputs..]);
        for (y, [found]) in y.chunks_exact_mut(vectors).zip(found) {
            y[vector] = found;
        }
    }
}

/// Each of `R` rows times each of the first `C` vectors of `x`.
#[inline(always)]
fn dots<S: Simd, const R: usize, const C: usize>(
    simd: S,
    rows: &[f32],
    x: &[f32],
) -> [[f32; C]; R] {
    let inputs = rows.len() / R;
    let rows: [_; R] = from_fn(|r| S::as_simd_f32s(&rows[r * inputs..][..inputs]));
    let x: [_; C] = from_fn(|c| S::as_simd_f32s(&x[c * inputs..][..inputs]));
    let blocks = inputs / S::F32_LANES;
    let row_blocks: [_; R] = from_fn(|r| &rows[r].0[..blocks]);
    let x_blocks: [_; C] = from_fn(|c| &x[c].0[..blocks]);
    let mut sums = [[simd.splat_f32s(0.0); C]; R];
    for i in 0..blocks {
        for (sums, row) in sums.iter_mut().zip(row_blocks) {
            for (sum, x) in sums.iter_mut().zip(x_blocks) {
                *sum = simd.mul_add_f32s(row[i], x[i], *sum);
            }
        }
    }
    // Taken by value: a loop over borrowed sums would have them in memory, and each turn above would write them all.
    let mut found = [[0.0; C]; R];
    for ((found, sums), row) in found.iter_mut().zip(sums).zip(rows) {
        for ((found, sum), x) in found.iter_mut().zip(sums).zip(x) {
            let rest: f32 = row.1.iter().zip(x.1).map(|(w, x)| w * x).sum();
            *found = rest + simd.reduce_sum_f32s(sum);
        }
    }
    found
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
                gemv(&weight, &x, 1, bias, &mut y);
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

    #[test]
    fn a_vector_gives_the_same_bits_whatever_its_neighbours() {
        for (rows, columns) in [(1, 1), (3, 31), (130, 33), (2000, 97), (113, 576)] {
            let value = |i: usize| ((i * 7919 % 1013) as f32 - 500.0) / 511.0;
            let weight: Vec<f32> = (0..rows * columns).map(value).collect();
            let x: Vec<f32> = (0..19 * columns).map(|i| value(i + 17)).collect();
            let bias: Vec<f32> = (0..rows).map(|i| value(i + 5)).collect();
            let alone = |vector: usize| {
                let mut y = vec![f32::NAN; rows];
                gemv(&weight, &x[vector * columns..][..columns], 1, Some(&bias), &mut y);
                y
            };
            for vectors in [2, 3, 4, 7, 19] {
                let mut y = vec![f32::NAN; vectors * rows];
                gemv(&weight, &x[..vectors * columns], vectors, Some(&bias), &mut y);
                let expected: Vec<f32> = (0..vectors).flat_map(alone).collect();
                assert_eq!(y, expected, "{vectors} vectors, {rows}x{columns}");
            }
        }
    }
}
