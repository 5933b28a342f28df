//! From scores to the next token.

use crate::error::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the scores; 0 takes the highest.
    pub temperature: f32,
    /// Only the `top_k` highest are candidates; 0 is no limit.
    pub top_k: usize,
    /// Only the most probable tokens whose probabilities reach `top_p` are candidates; 1 is no limit.
    pub top_p: f32,
    /// The same seed on the same scores draws the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Draws tokens; its random state belongs to one request.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// A sampler, or what is wrong with the settings.
    pub fn new(sampling: Sampling) -> Result<Self> {
        let wrong = |what, found: f32| Err(Error::Sampling { what, found: found.to_string() });
        if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
            return wrong("temperature must be 0 or more", sampling.temperature);
        }
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return wrong("top_p must lie in (0, 1]", sampling.top_p);
        }
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        Ok(Self { sampling, random })
    }

    /// Its settings.
    #[cfg(feature = "cuda")]
    pub(crate) fn sampling(&self) -> Sampling {
        self.sampling.clone()
    }

    /// The random number that the next [`sample`](Self::sample) would use, where the drawing is done elsewhere; 0 where it
    /// would use none.
    #[cfg(feature = "cuda")]
    pub(crate) fn chance(&mut self) -> f64 {
        let greedy = self.sampling.temperature == 0.0 || self.sampling.top_k == 1;
        if greedy { 0.0 } else { self.random.random() }
    }

    /// The next token by its scores, `[vocabulary]`. The lowest id wins a tie.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let best = argmax(logits).ok_or(Error::NoLogits)?;
        if self.sampling.temperature == 0.0 || self.sampling.top_k == 1 {
            return Ok(best as u32);
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_unstable_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.sampling.top_k > 0 {
            order.truncate(self.sampling.top_k);
        }
        let weight =
            |i: usize| f64::from((logits[i] - logits[best]) / self.sampling.temperature).exp();
        let mut weights: Vec<f64> = order.iter().map(|&i| weight(i)).collect();
        let wanted = f64::from(self.sampling.top_p) * weights.iter().sum::<f64>();
        let mut reached = 0.0;
        let nucleus = weights.iter().position(|w| {
            reached += w;
            reached >= wanted
        });
        weights.truncate(nucleus.map_or(weights.len(), |last| last + 1));

        let mut left = self.random.random::<f64>() * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        Ok(order[drawn.unwrap_or(weights.len() - 1)] as u32)
    }
}

/// The index of the largest score; `None` for no scores and for scores that hold NaN.
fn argmax(logits: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, &value) in logits.iter().enumerate() {
        if value.is_nan() {
            return None;
        }
        if best.is_none_or(|b| value > logits[b]) {
            best = Some(i);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling).unwrap();
        (0..n).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    const LOGITS: [f32; 5] = [0.1, 2.0, 2.0, -1.0, 1.5];

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(draws(Sampling::default(), &LOGITS, 1), [1]);
    }

    #[test]
    fn top_k_of_one_is_greedy_at_any_temperature() {
        let sampling = Sampling { temperature: 1.5, top_k: 1, ..Sampling::default() };
        assert_eq!(draws(sampling, &LOGITS, 20), vec![1; 20]);
    }

    #[test]
    fn a_seed_repeats_its_draws_and_another_differs() {
        let at = |seed| Sampling { temperature: 1.0, seed, ..Sampling::default() };
        assert_eq!(draws(at(7), &LOGITS, 50), draws(at(7), &LOGITS, 50));
        assert_ne!(draws(at(7), &LOGITS, 50), draws(at(8), &LOGITS, 50));
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        let n = 20_000;
        let drawn = draws(sampling, &LOGITS, n);
        let sum: f32 = LOGITS.iter().map(|l| l.exp()).sum();
        for (id, logit) in LOGITS.iter().enumerate() {
            let share = drawn.iter().filter(|&&d| d == id as u32).count() as f32 / n as f32;
            assert!((share - logit.exp() / sum).abs() < 0.015, "token {id}: {share}");
        }
    }

    #[test]
    fn the_nucleus_is_the_smallest_that_reaches_top_p() {
        // Probabilities, from the largest: .36 .36 .22 .05 .02. So 0.5 needs two tokens, 0.8 three.
        let at = |top_p| Sampling { temperature: 1.0, top_p, ..Sampling::default() };
        assert!(draws(at(0.5), &LOGITS, 500).iter().all(|t| [1, 2].contains(t)));
        let three = draws(at(0.8), &LOGITS, 500);
        assert!(three.contains(&4) && three.iter().all(|t| [1, 2, 4].contains(t)));
    }

    #[test]
    fn nan_scores_and_senseless_settings_are_errors() {
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        assert!(matches!(sampler.sample(&[0.0, f32::NAN]), Err(Error::NoLogits)));
        assert!(matches!(sampler.sample(&[]), Err(Error::NoLogits)));
        for (temperature, top_p) in [(-1.0, 1.0), (f32::NAN, 1.0), (1.0, 0.0), (1.0, f32::NAN)] {
            let sampling = Sampling { temperature, top_p, ..Sampling::default() };
            assert!(matches!(Sampler::new(sampling), Err(Error::Sampling { .. })));
        }
    }
}
