use crate::{Affine, Error, Result, Surrogate};

/// Fits a linear surrogate by ridge regression, a batch of rows at a time.
///
/// For each layer it keeps the second moments of `z = [hidden state, 1, scores]` in f64, and no
/// rows: they hold all that the fit needs. `8 (hidden + kv_heads + 1)²` bytes a layer.
#[derive(Clone, Debug)]
pub struct Ridge {
    hidden: usize,
    kv_heads: usize,
    layers: Vec<Vec<f64>>, // each the sum of z zᵀ, [size, size], its upper triangle
}

impl Ridge {
    /// Empty, for a model of `layers`, `hidden` and `kv_heads`.
    pub fn new(layers: usize, hidden: usize, kv_heads: usize) -> Self {
        let size = hidden + 1 + kv_heads;
        Self { hidden, kv_heads, layers: vec![vec![0.0; size * size]; layers] }
    }

    fn size(&self) -> usize {
        self.hidden + 1 + self.kv_heads
    }

    /// How many rows a layer has.
    pub fn rows(&self, layer: usize) -> usize {
        self.layers
            .get(layer)
            .map_or(0, |moments| moments[self.hidden * (self.size() + 1)] as usize)
    }

    /// Adds rows of a layer: `hidden` is `[rows, hidden]`, `scores` `[rows, kv_heads]`, row-major.
    /// NaN and infinity are an error that adds nothing.
    pub fn add(&mut self, layer: usize, hidden: &[f32], scores: &[f32]) -> Result<()> {
        self.check(layer)?;
        let rows = hidden.len() / self.hidden;
        if hidden.len() != rows * self.hidden || scores.len() != rows * self.kv_heads {
            let expected =
                format!("[{rows} rows, {}] beside hidden states of {}", self.kv_heads, self.hidden);
            return Err(Error::shape("scores", expected, &[scores.len()]));
        }
        if hidden.iter().chain(scores).any(|number| !number.is_finite()) {
            return Err(Error::Rows { layer });
        }
        let size = self.size();
        let pairs = hidden.chunks_exact(self.hidden).zip(scores.chunks_exact(self.kv_heads));
        let rows: Vec<Vec<f64>> = pairs
            .map(|(x, y)| {
                x.iter().chain(&[1.0]).chain(y).map(|&number| f64::from(number)).collect()
            })
            .collect();
        // A block of rows stays in the cache while each row of the moments passes once.
        for block in rows.chunks(32) {
            for (i, moments) in self.layers[layer].chunks_exact_mut(size).enumerate() {
                for row in block {
                    for (moment, &z) in moments[i..].iter_mut().zip(&row[i..]) {
                        *moment += row[i] * z;
                    }
                }
            }
        }
        Ok(())
    }

    fn check(&self, layer: usize) -> Result<()> {
        if self.hidden == 0 || self.kv_heads == 0 {
            let expected = "[hidden, kv_heads] above zero".to_owned();
            return Err(Error::shape("the fit", expected, &[self.hidden, self.kv_heads]));
        }
        let layers = self.layers.len();
        if layer < layers { Ok(()) } else { Err(Error::Layer { layer, layers }) }
    }

    /// [`add`](Self::add) for tensors on any device: `hidden` is `[rows, hidden]`, `scores` `[rows,
    /// kv_heads]`.
    #[cfg(feature = "tch")]
    pub fn add_tensors(
        &mut self,
        layer: usize,
        hidden: &tch::Tensor,
        scores: &tch::Tensor,
    ) -> Result<()> {
        self.check(layer)?;
        let [rows, _] = crate::torch::dims(hidden, "hidden", "[rows, hidden]")?;
        crate::torch::expect(hidden, "hidden", &[rows, self.hidden as i64])?;
        crate::torch::expect(scores, "scores", &[rows, self.kv_heads as i64])?;
        let size = self.size();
        let (hidden, scores) =
            (hidden.f_to_kind(tch::Kind::Double)?, scores.f_to_kind(tch::Kind::Double)?);
        let ones = tch::Tensor::f_ones([rows, 1], (tch::Kind::Double, hidden.device()))?;
        let z = tch::Tensor::f_cat(&[hidden, ones, scores], 1)?; // [rows, size]
        let mut sum = vec![0f64; size * size];
        z.f_transpose(0, 1)?.f_matmul(&z)?.f_copy_data(&mut sum, size * size)?;
        if sum.iter().step_by(size + 1).any(|square| !square.is_finite()) {
            return Err(Error::Rows { layer });
        }
        for (moment, sum) in self.layers[layer].iter_mut().zip(sum) {
            *moment += sum;
        }
        Ok(())
    }

    /// The linear surrogate that minimises squared error plus `alpha` times squared weights, the
    /// bias free of penalty, as scikit-learn's `Ridge`; KVzap has alpha 1.
    pub fn solve(&self, alpha: f64) -> Result<Surrogate> {
        if !(alpha.is_finite() && alpha >= 0.0) {
            return Err(Error::Alpha(alpha));
        }
        let fit = |layer| -> Result<Affine> {
            let mut moments = self.centred(layer)?;
            let size = self.size();
            for i in 0..self.hidden {
                moments.covariance[i * size + i] += alpha;
            }
            let singular = || Error::Singular { layer, alpha };
            // [kv_heads, hidden]
            let weight = moments.regress(self.hidden, self.kv_heads).ok_or_else(singular)?;
            let bias = (weight.chunks_exact(self.hidden).zip(&moments.mean[self.hidden + 1..]))
                .map(|(weight, mean)| (mean - dot(weight, &moments.mean[..self.hidden])) as f32)
                .collect();
            Affine::new(weight.into_iter().map(|number| number as f32).collect(), bias)
        };
        Surrogate::linear((0..self.layers.len()).map(fit).collect::<Result<_>>()?)
    }

    /// Mean and covariance (not divided by the number of rows) of z.
    fn centred(&self, layer: usize) -> Result<Centred> {
        let (size, one) = (self.size(), self.hidden);
        let moments =
            self.layers.get(layer).ok_or(Error::Layer { layer, layers: self.layers.len() })?;
        let rows = moments[one * size + one];
        if rows == 0.0 {
            return Err(Error::NoRows { layer });
        }
        let sum = |i: usize| moments[i.min(one) * size + i.max(one)];
        let mean: Vec<f64> = (0..size).map(|i| sum(i) / rows).collect();
        let mut covariance = moments.clone();
        for (i, row) in covariance.chunks_exact_mut(size).enumerate() {
            for (entry, &other) in row[i..].iter_mut().zip(&mean[i..]) {
                *entry -= rows * mean[i] * other;
            }
        }
        Ok(Centred { rows, mean, covariance })
    }
}

struct Centred {
    rows: f64,
    mean: Vec<f64>,       // [size]
    covariance: Vec<f64>, // [size, size], the upper triangle
}

impl Centred {
    /// Solves for the weights `[outputs, inputs]` by Cholesky; None where the covariance is not
    /// positive definite.
    fn regress(&self, inputs: usize, outputs: usize) -> Option<Vec<f64>> {
        let size = inputs + 1 + outputs;
        let mut lower = vec![0.0; inputs * inputs];
        for i in 0..inputs {
            for j in 0..=i {
                lower[i * inputs + j] = self.covariance[j * size + i];
            }
        }
        // Rows times mean² was taken from each square, so rounding left errors of the square's
        // size: a pivot no larger says that the dimensions depend on one another.
        let square = |i: usize| self.covariance[i * size + i] + self.rows * self.mean[i].powi(2);
        let tiny: Vec<f64> =
            (0..inputs).map(|i| square(i) * inputs as f64 * f64::EPSILON).collect();
        cholesky(&mut lower, &tiny)?;
        let mut weights = Vec::with_capacity(outputs * inputs);
        for output in 0..outputs {
            let mut x: Vec<f64> =
                (0..inputs).map(|i| self.covariance[i * size + inputs + 1 + output]).collect();
            for i in 0..inputs {
                let row = &lower[i * inputs..][..=i];
                x[i] = (x[i] - dot(&row[..i], &x[..i])) / row[i];
            }
            for i in (0..inputs).rev() {
                let row = &lower[i * inputs..][..=i];
                x[i] /= row[i];
                let (before, here) = x.split_at_mut(i);
                for (x, l) in before.iter_mut().zip(row) {
                    *x -= here[0] * l;
                }
            }
            weights.extend(x);
        }
        Some(weights)
    }
}

/// Factors the lower triangle of a square matrix in place, a row for each of `tiny`; None where a
/// pivot is not above its `tiny`.
///
/// Sixteen rows at a time pass over the rows before them, so that those are fetched from memory
/// once for all.
fn cholesky(a: &mut [f64], tiny: &[f64]) -> Option<()> {
    let size = tiny.len();
    for first in (0..size).step_by(16) {
        let (done, block) = a.split_at_mut(first * size);
        for (j, pivot) in done.chunks_exact(size).enumerate() {
            for row in block.chunks_exact_mut(size).take(16) {
                row[j] = (row[j] - dot(&row[..j], &pivot[..j])) / pivot[j];
            }
        }
        for i in 0..16.min(size - first) {
            let (done, rest) = block.split_at_mut(i * size);
            let row = &mut rest[..size];
            for (j, pivot) in (first..).zip(done.chunks_exact(size)) {
                row[j] = (row[j] - dot(&row[..j], &pivot[..j])) / pivot[j];
            }
            let i = first + i;
            let pivot = row[i] - dot(&row[..i], &row[..i]);
            if pivot.is_nan() || pivot <= tiny[i] {
                return None;
            }
            row[i] = pivot.sqrt();
        }
    }
    Some(())
}

/// In eight partial sums, which the compiler keeps in registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 8];
    for (a, b) in a_chunks.zip(b_chunks) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + rest
}
