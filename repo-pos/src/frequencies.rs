use std::f32::consts::TAU;
use std::f64::consts::PI;

use crate::{Error, Result};

/// How fast each pair of dimensions turns: radians for one step of position, f32 `[head_dim / 2]`.
///
/// Every constructor repeats the f32 arithmetic of transformers step by step, because an error of
/// one unit in the last place is 0.008 radians at position 131,072.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    inverse: Vec<f32>,
    scale: f32,
    precision: Precision,
}

/// How the product of a position and a frequency is taken, whose sine and cosine turn a head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// In f32, as transformers and the published code do: sine and cosine are exact for that product, which itself may be
    /// off by 0.004 radians at position 131,072 and by 0.03 at a million.
    #[default]
    Parity,
    /// Without rounding: sine and cosine are right to 1e-6 for positions up to a million of either sign. Two f32 multiply
    /// exactly in f64.
    Wide,
}

/// The settings of YaRN (arXiv 2309.00071, section 3), by their names in a config.json.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer than `original` contexts may be.
    pub factor: f64,
    /// `original_max_position_embeddings`: the context of the pretraining, in tokens.
    pub original: usize,
    /// Pairs that turn at least this often within `original` stay: 32 in the paper.
    pub beta_fast: f64,
    /// Pairs that turn at most this often become `factor` times slower: 1 in the paper.
    pub beta_slow: f64,
    /// What cosines and sines are multiplied by, so that scores grow by its square.
    pub attention_factor: f64,
    /// Whether the bounds of the blended pairs are widened to whole pairs, as in the paper's code.
    pub truncate: bool,
}

impl Yarn {
    /// The paper's settings for a context of `factor * original` tokens.
    pub fn new(factor: f64, original: usize) -> Self {
        Self {
            factor,
            original,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Self::attention(factor, 1.0),
            truncate: true,
        }
    }

    /// `0.1 * mscale * ln(factor) + 1`, 1 for contexts that are not longer: the paper's has an `mscale` of 1.
    pub fn attention(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }
}

impl Frequencies {
    /// `theta ^ (-2i / head_dim)`, i = 0 .. head_dim / 2 (RoFormer, arXiv 2104.09864, section 3.2.2).
    ///
    /// # Errors
    /// `head_dim` odd or zero; `theta` not a finite number above zero.
    pub fn plain(theta: f64, head_dim: usize) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::HeadDim(head_dim));
        }
        positive("theta", theta)?;
        let inverse = (0..head_dim / 2).map(|pair| 1.0 / wavelength(theta, head_dim, pair));
        Ok(Self { inverse: inverse.collect(), scale: 1.0, precision: Precision::Parity })
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
        Ok(Self::plain(theta, head_dim)?.map(scale))
    }

    /// Every pair `factor` times slower: position interpolation (arXiv 2306.15595).
    ///
    /// # Errors
    /// Those of [`plain`](Self::plain); `factor` not a finite number above zero.
    pub fn linear(theta: f64, head_dim: usize, factor: f64) -> Result<Self> {
        let factor = positive("factor", factor)?;
        Ok(Self::plain(theta, head_dim)?.map(|inverse| inverse / factor))
    }

    /// Each pair slowed by its own divisor: the tensor `rope_freqs.weight` of a GGUF file, which
    /// is how such files carry Llama 3.1's scaling.
    ///
    /// # Errors
    /// Those of [`plain`](Self::plain); not `head_dim / 2` divisors; a divisor that is not a finite
    /// number above zero.
    pub fn divided(theta: f64, head_dim: usize, divisors: &[f32]) -> Result<Self> {
        let mut plain = Self::plain(theta, head_dim)?;
        if divisors.len() != plain.inverse.len() {
            return Err(Error::DivisorCount {
                expected: plain.inverse.len(),
                found: divisors.len(),
            });
        }
        for (index, (inverse, &value)) in plain.inverse.iter_mut().zip(divisors).enumerate() {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::Divisor { index, value });
            }
            *inverse /= value;
        }
        Ok(plain)
    }

    /// YaRN: fast pairs stay, slow ones become `factor` times slower, those between are blended.
    ///
    /// # Errors
    /// Those of [`plain`](Self::plain), `theta` 1 among them; a setting that is not a finite number above zero;
    /// `beta_fast` not above `beta_slow`.
    pub fn yarn(theta: f64, head_dim: usize, yarn: Yarn) -> Result<Self> {
        let plain = Self::plain(theta, head_dim)?;
        let factor = positive("factor", yarn.factor)?;
        positive("original_max_position_embeddings", yarn.original as f64)?;
        positive("beta_fast", yarn.beta_fast)?;
        positive("beta_slow", yarn.beta_slow)?;
        let scale = positive("attention_factor", yarn.attention_factor)?;
        let refuse = |name, value, wanted| Err(Error::Setting { name, value, wanted });
        if yarn.beta_fast <= yarn.beta_slow {
            return refuse("beta_fast", yarn.beta_fast, "above beta_slow");
        }
        if theta <= 1.0 {
            return refuse("theta", theta, "above 1 for YaRN");
        }
        // The pair that turns so often within the original context; f64, as in transformers.
        let pair = |turns: f64| {
            let wavelengths = yarn.original as f64 / (turns * 2.0 * PI);
            head_dim as f64 * wavelengths.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(yarn.beta_fast), pair(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let inverse = plain.inverse.iter().enumerate().map(|(i, &kept)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let slowed = 1.0 / (factor * wavelength(theta, head_dim, i));
            slowed * (1.0 - (1.0 - ramp)) + kept * (1.0 - ramp)
        });
        Ok(Self { inverse: inverse.collect(), scale, ..plain.clone() })
    }

    fn map(mut self, change: impl Fn(f32) -> f32) -> Self {
        self.inverse.iter_mut().for_each(|inverse| *inverse = change(*inverse));
        self
    }

    /// The same, with angles taken as `precision` says.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Radians a step, `[head_dim / 2]`, fastest first.
    pub fn inverse(&self) -> &[f32] {
        &self.inverse
    }

    /// What cosines and sines are multiplied by: YaRN's attention factor, else 1.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// How angles are taken.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Width of the heads these frequencies turn: twice the number of pairs.
    pub fn head_dim(&self) -> usize {
        2 * self.inverse.len()
    }
}

/// Steps of position for a radian: `theta ^ (2 pair / head_dim)`, its power taken in f64 of the f32 arguments.
fn wavelength(theta: f64, head_dim: usize, pair: usize) -> f32 {
    let exponent = (2 * pair) as f32 / head_dim as f32;
    f64::from(theta as f32).powf(f64::from(exponent)) as f32
}

fn positive(name: &'static str, value: f64) -> Result<f32> {
    // Checked as the f32 it becomes, so that 1e300 is refused rather than turned into infinity.
    let single = value as f32;
    if single.is_finite() && single > 0.0 {
        return Ok(single);
    }
    Err(Error::Setting { name, value, wanted: "a finite f32 above zero" })
}
