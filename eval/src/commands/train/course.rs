//! What a training loses, batch by batch.

use super::curve::Point;
use super::rows::Batch;
use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

/// A batch on the device.
pub struct Weighed {
    pub ids: Tensor,
    text: Tensor,
    answers: Tensor,
    /// What each token weighs in all.
    pub both: Tensor,
    /// Whether some text has a weight, and some answer.
    has: [bool; 2],
}

impl Weighed {
    /// `rows` rows of `length` tokens, text and answers weighing so many times what they do in the batch.
    pub fn new(
        batch: &Batch,
        [rows, length]: [usize; 2],
        [of_text, of_answers]: [f64; 2],
        device: Device,
    ) -> Result<Self> {
        let (rows, length) = (rows as i64, length as i64);
        let ids = Tensor::f_from_slice(&batch.ids)?.f_view([rows, length + 1])?;
        let weights = |weights: &[f32]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(weights)?.f_view([rows, length])?.f_to_device(device)?)
        };
        let (text, answers) = (weights(&batch.text)?, weights(&batch.answers)?);
        let both = text.f_mul_scalar(of_text)?.f_add(&answers.f_mul_scalar(of_answers)?)?;
        let has = [&batch.text, &batch.answers].map(|w| w.iter().any(|&weight| weight > 0.0));
        Ok(Self { ids: ids.f_to_device(device)?, text, answers, both, has })
    }
}

/// What was lost since the last point, on the device, so that a step waits for nothing.
pub struct Course {
    lost: [Tensor; 2],
    batches: [usize; 2],
}

impl Course {
    pub fn new(device: Device) -> Result<Self> {
        let zero = || Tensor::f_zeros([], (Kind::Float, device));
        Ok(Self { lost: [zero()?, zero()?], batches: [0; 2] })
    }

    pub fn add(&mut self, nll: &Tensor, batch: &Weighed) -> Result<()> {
        for (i, weights) in [&batch.text, &batch.answers].into_iter().enumerate() {
            let _ = self.lost[i].f_add_(&nll.f_mul(weights)?.f_sum(Kind::Float)?)?;
            self.batches[i] += usize::from(batch.has[i]);
        }
        Ok(())
    }

    pub fn point(&mut self, step: u64, tokens: u64, norm: &Tensor, rate: f64) -> Result<Point> {
        let mut lost = [0.0; 2];
        for (i, lost) in lost.iter_mut().enumerate() {
            *lost = self.lost[i].f_double_value(&[])? / self.batches[i].max(1) as f64;
            self.batches[i] = 0;
            let _ = self.lost[i].f_zero_()?;
        }
        let norm = norm.f_double_value(&[])?;
        if !(norm + lost[0] + lost[1]).is_finite() {
            bail!(
                "step {step}: loss or gradient is NaN or infinite; give a smaller --rate or --map-rate"
            );
        }
        Ok(Point { step, tokens, text: lost[0], answers: lost[1], norm, rate })
    }
}
