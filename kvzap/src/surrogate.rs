mod folder;

pub use folder::Dtype;

use crate::{Array, Error, LayerInput, Result, Scorer};
use std::ops::Range;

/// KVzap's surrogate (arXiv 2601.07891): for each layer a small module that reads a token's hidden
/// state and predicts the logarithm of its KVzip+ score for each kv head.
///
/// A module is linear, `W h + b`, or has one hidden layer, `W2 gelu(W1 h + b1) + b2`, with the
/// exact GELU. This is the plain-Rust one, f32, written for reading;
/// `TorchSurrogate` is its twin on libtorch.
#[derive(Clone, Debug, PartialEq)]
pub struct Surrogate {
    modules: Vec<Vec<Affine>>, // each of one map, or of two with GELU between
    dtype: Dtype,
}

/// An affine map, `weight x + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct Affine {
    weight: Vec<f32>, // [outputs, inputs]
    bias: Vec<f32>,   // [outputs]
}

impl Affine {
    /// `weight` is `[outputs, inputs]` row-major, `bias` `[outputs]`; an error unless both sizes
    /// are above zero and divide.
    pub fn new(weight: Vec<f32>, bias: Vec<f32>) -> Result<Self> {
        if weight.is_empty() || bias.is_empty() || !weight.len().is_multiple_of(bias.len()) {
            let expected = format!("as many rows as the bias, {}", bias.len());
            return Err(Error::shape("weight", expected, &[weight.len()]));
        }
        Ok(Self { weight, bias })
    }

    /// `[outputs, inputs]`, row-major.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// `[outputs]`
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// How many numbers it reads.
    pub fn inputs(&self) -> usize {
        self.weight.len() / self.bias.len()
    }

    /// How many numbers it writes.
    pub fn outputs(&self) -> usize {
        self.bias.len()
    }

    fn apply<'a>(&'a self, x: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        self.weight.chunks_exact(x.len()).zip(&self.bias).map(|(row, bias)| dot(row, x) + bias)
    }
}

impl Surrogate {
    /// A surrogate with one map from hidden states to scores for each layer.
    pub fn linear(layers: Vec<Affine>) -> Result<Self> {
        Self::new(layers.into_iter().map(|map| vec![map]).collect(), Dtype::F32)
    }

    /// A surrogate with two maps for each layer, GELU between them.
    pub fn mlp(layers: Vec<[Affine; 2]>) -> Result<Self> {
        Self::new(layers.into_iter().map(Vec::from).collect(), Dtype::F32)
    }

    fn new(modules: Vec<Vec<Affine>>, dtype: Dtype) -> Result<Self> {
        let sizes = |module: &[Affine]| -> Vec<_> {
            module.iter().map(|map| (map.inputs(), map.outputs())).collect()
        };
        let Some(first) = modules.first().map(|module| sizes(module)) else {
            return Err(Error::Build { layer: 0, problem: "is missing" });
        };
        for (layer, module) in modules.iter().enumerate() {
            let found = sizes(module);
            if found.windows(2).any(|pair| pair[0].1 != pair[1].0) {
                return Err(Error::Build {
                    layer,
                    problem: "has a second map that does not read what the first writes",
                });
            }
            if found != first {
                return Err(Error::Build { layer, problem: "has other sizes than layer 0" });
            }
        }
        Ok(Self { modules, dtype })
    }

    /// How many layers it scores.
    pub fn layers(&self) -> usize {
        self.modules.len()
    }

    /// The size of the hidden states it reads.
    pub fn hidden(&self) -> usize {
        self.modules[0][0].inputs()
    }

    /// The kv heads it scores.
    pub fn kv_heads(&self) -> usize {
        self.modules[0].last().map_or(0, Affine::outputs)
    }

    /// The maps of one layer: one, or two with GELU between. None past the last layer.
    pub fn maps(&self, layer: usize) -> Option<&[Affine]> {
        self.modules.get(layer).map(Vec::as_slice)
    }

    /// The dtype of its file, to which its numbers are rounded.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The same with its numbers rounded to `dtype`, in which it is then saved.
    pub fn rounded(mut self, dtype: Dtype) -> Self {
        for map in self.modules.iter_mut().flatten() {
            map.weight = dtype.rounded(&map.weight);
            map.bias = dtype.rounded(&map.bias);
        }
        self.dtype = dtype;
        self
    }

    /// An error that names the difference, unless it was made for a model of `layers`, `hidden` and
    /// `kv_heads`.
    pub fn check(&self, layers: usize, hidden: usize, kv_heads: usize) -> Result<()> {
        let pairs = [
            ("layers", layers, self.layers()),
            ("hidden size", hidden, self.hidden()),
            ("kv heads", kv_heads, self.kv_heads()),
        ];
        for (field, expected, found) in pairs {
            if expected != found {
                return Err(Error::OtherModel { field, expected, found });
            }
        }
        Ok(())
    }

    /// The same for some of the kv heads: their rows of each layer's last map.
    ///
    /// # Errors
    /// Heads that it does not score, or none.
    pub fn of_heads(&self, heads: Range<usize>) -> Result<Self> {
        if heads.is_empty() || heads.end > self.kv_heads() {
            let (field, expected, found) = ("kv heads", heads.end, self.kv_heads());
            return Err(Error::OtherModel { field, expected, found });
        }
        let mut modules = self.modules.clone();
        for map in modules.iter_mut().filter_map(|maps| maps.last_mut()) {
            let width = map.inputs();
            map.weight = map.weight[heads.start * width..heads.end * width].to_vec();
            map.bias = map.bias[heads.clone()].to_vec();
        }
        Ok(Self { modules, dtype: self.dtype })
    }

    /// The scores `[batch, kv_heads, tokens]` of `hidden`, `[batch, tokens, hidden]`, in one layer.
    pub fn forward(&self, layer: usize, hidden: &Array) -> Result<Array> {
        let maps = self.maps(layer).ok_or(Error::Layer { layer, layers: self.layers() })?;
        let [batch, tokens, size] = hidden.dims("hidden", "[batch, tokens, hidden]")?;
        if size != self.hidden() {
            let expected = format!("[batch, tokens, {}] as the surrogate has it", self.hidden());
            return Err(Error::shape("hidden", expected, hidden.shape()));
        }
        let heads = self.kv_heads();
        let mut scores = vec![0.0; batch * heads * tokens];
        for (row, x) in hidden.data().chunks_exact(size).enumerate() {
            let (sequence, token) = (row / tokens, row % tokens);
            let mut y: Vec<f32> = maps[0].apply(x).collect();
            for map in &maps[1..] {
                let x: Vec<f32> = y.into_iter().map(gelu).collect();
                y = map.apply(&x).collect();
            }
            for (head, score) in y.into_iter().enumerate() {
                scores[(sequence * heads + head) * tokens + token] = score;
            }
        }
        Array::new(scores, &[batch, heads, tokens])
    }
}

impl Scorer<Array> for Surrogate {
    fn score(&self, input: LayerInput<'_, Array>) -> Result<Array> {
        self.forward(input.layer, input.hidden)
    }
}

/// In eight partial sums, which the compiler keeps in one register.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 8];
    for (a, b) in a_chunks.zip(b_chunks) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// `x Φ(x)`; the tanh approximation is off by up to 4.7e-4.
fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))) as f32
}

/// `erf x = 2/√π exp(-x²) Σ 2ⁿ x²ⁿ⁺¹ / (2n+1)!!` (Abramowitz and Stegun 7.1.6): no cancellation, as
/// all terms have one sign.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum(); // to the last bit of f64
    }
    let (mut sum, mut term, mut n) = (x, x, 1.0);
    while (term / sum).abs() > f64::EPSILON {
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
        n += 1.0;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_is_exact_to_f64() {
        // Abramowitz and Stegun, table 7.1, and Python's math.erf.
        for (x, expected) in [
            (0.0, 0.0),
            (1e-300, 1.1283791670955126e-300),
            (0.5, 0.5204998778130465),
            (-1.0, -0.8427007929497149),
            (2.5, 0.999593047982555),
            (5.9, 1.0),
            (7.0, 1.0),
        ] {
            assert!((erf(x) - expected).abs() <= 1e-15 * expected.abs(), "erf({x}) = {}", erf(x));
        }
        assert!(erf(f64::NAN).is_nan());
    }
}
