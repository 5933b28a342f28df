use crate::{Array, Error, Policy, Result};

/// KVzap's rule: a token goes if its score is below the threshold, strictly; an equal score and NaN
/// are kept.
///
/// The share that goes follows from the text. Published thresholds are -6 to -3 for Qwen3 and -9 to
/// -6 for Llama-3.1 (arXiv 2601.07891). Against bf16 scores libtorch rounds the threshold to bf16
/// first, as kvpress has it: -4.1 means -4.09375 there, whole numbers are exact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold(f32);

impl Threshold {
    /// Scores below `threshold` go: -inf forgets nothing, +inf all but the window. NaN is an error.
    pub fn new(threshold: f32) -> Result<Self> {
        if threshold.is_nan() { Err(Error::Threshold) } else { Ok(Self(threshold)) }
    }

    /// The threshold.
    pub fn get(self) -> f32 {
        self.0
    }
}

impl Policy<Array> for Threshold {
    type Drops = Vec<bool>;

    fn drops(&self, scores: &Array) -> Result<Vec<bool>> {
        Ok(scores.data().iter().map(|&score| score < self.0).collect())
    }
}

#[cfg(feature = "tch")]
impl Policy<tch::Tensor> for Threshold {
    type Drops = tch::Tensor;

    fn drops(&self, scores: &tch::Tensor) -> Result<tch::Tensor> {
        Ok(scores.f_lt(f64::from(self.0))?)
    }
}
