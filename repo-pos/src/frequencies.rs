use std::f32::consts::TAU;

use crate::{Error, Result};

/// How fast each pair of dimensions turns: radians for one step of position, f32 `[head_dim / 2]`.
///
/// Every constructor repeats the f32 arithmetic of transformers step by step, because an error of
/// one unit in the last place is 0.008 radians at position 131,072.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies(Vec<f32>);

impl Frequencies {
    /// `theta ^ (-2i / head_dim)`, i = 0 .. head_dim / 2 (RoFormer, arXiv 2104.09864, section 3.2.2).
    ///
    /// # Errors
    /// `head_dim` odd or zero; `theta` not a finite number above zero.
    pub fn plain(theta: f64, head_dim: usize) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::HeadDim(head_dim));
        }
        let theta = f64::from(positive("theta", theta)?);
        let inverse = (0..head_dim).step_by(2).map(|dim| {
            let exponent = dim as f32 / head_dim as f32;
            1.0 / theta.powf(f64::from(exponent)) as f32
        });
        Ok(Self(inverse.collect()))
    }

    /// Llama 3.1's scaling: pairs that turn more than `high` times within `original` tokens stay,
    /// those that turn less than `low` times become `factor` times slower, those between are
    /// interpolated. The arguments are `rope_theta` and `head_dim`, then `factor`,
    /// `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings` of a
    /// config.json's block of type `llama3`.
    ///
    /// # Errors
    /// Those of [`plain`](Self::plain); a factor that is not a finite number above zero; `high` not
    /// above `low`; `original` zero.
    pub fn llama3(
        theta: f64,
        head_dim: usize,
        factor: f64,
        low: f64,
        high: f64,
        original: usize,
    ) -> Result<Self> {
        let factor = positive("factor", factor)?;
        let low = positive("low_freq_factor", low)?;
        let high = positive("high_freq_factor", high)?;
        let original = positive("original_max_position_embeddings", original as f64)?;
        if high <= low {
            return Err(Error::Setting {
                name: "high_freq_factor",
                value: f64::from(high),
                wanted: "above low_freq_factor",
            });
        }
        let scale = |inverse: f32| {
            let wavelength = (1.0 / inverse) * TAU;
            if wavelength < original / high {
                inverse
            } else if wavelength > original / low {
                inverse / factor
            } else {
                let smooth = ((1.0 / wavelength) * original - low) / (high - low);
                (1.0 - smooth) * inverse / factor + smooth * inverse
            }
        };
        Ok(Self(Self::plain(theta, head_dim)?.0.into_iter().map(scale).collect()))
    }

    /// Every pair `factor` times slower: position interpolation (arXiv 2306.15595).
    ///
    /// # Errors
    /// Those of [`plain`](Self::plain); `factor` not a finite number above zero.
    pub fn linear(theta: f64, head_dim: usize, factor: f64) -> Result<Self> {
        let factor = positive("factor", factor)?;
        let plain = Self::plain(theta, head_dim)?;
        Ok(Self(plain.0.into_iter().map(|inverse| inverse / factor).collect()))
    }

    /// Each pair slowed by its own divisor: the tensor `rope_freqs.weight` of a GGUF file, which
    /// is how such files carry Llama 3.1's scaling.
    ///
    /// # Errors
    /// Those of [`plain`](Self::plain); not `head_dim / 2` divisors; a divisor that is not a finite
    /// number above zero.
    pub fn divided(theta: f64, head_dim: usize, divisors: &[f32]) -> Result<Self> {
        let mut inverse = Self::plain(theta, head_dim)?.0;
        if divisors.len() != inverse.len() {
            return Err(Error::DivisorCount { expected: inverse.len(), found: divisors.len() });
        }
        for (index, (inverse, &value)) in inverse.iter_mut().zip(divisors).enumerate() {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::Divisor { index, value });
            }
            *inverse /= value;
        }
        Ok(Self(inverse))
    }

    /// Radians a step, `[head_dim / 2]`, fastest first.
    pub fn inverse(&self) -> &[f32] {
        &self.0
    }

    /// Width of the heads these frequencies turn: twice the number of pairs.
    pub fn head_dim(&self) -> usize {
        2 * self.0.len()
    }
}

fn positive(name: &'static str, value: f64) -> Result<f32> {
    // Checked as the f32 it becomes, so that 1e300 is refused rather than turned into infinity.
    let single = value as f32;
    if single.is_finite() && single > 0.0 {
        return Ok(single);
    }
    Err(Error::Setting { name, value, wanted: "a finite f32 above zero" })
}
