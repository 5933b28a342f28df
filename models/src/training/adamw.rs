//! AdamW (arXiv 1711.05101) over a flat vector.

use super::{Role, Trainable};
use crate::error::Result;
use tch::{Kind, Tensor};

const BETAS: (f64, f64) = (0.9, 0.95);
const EPSILON: f64 = 1e-8;

/// How far a step goes.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Learning rate of all but the position maps.
    pub weights: f64,
    /// That of the position maps.
    pub maps: f64,
    /// Decay of matrices; norms, biases, low-rank factors and maps have none.
    pub decay: f64,
    /// The largest norm of a gradient; a longer one is shortened to it.
    pub clip: f64,
}

/// The optimizer's memory.
#[derive(Debug)]
pub struct AdamW {
    pub(super) first: Tensor,  // f32 [numbers], as the vector itself
    pub(super) second: Tensor, // f32 [numbers]
    pub(super) steps: u64,
}

impl AdamW {
    /// One that has made no step.
    pub fn new(model: &Trainable) -> Result<Self> {
        let zeros = || model.master.f_zeros_like();
        Ok(Self { first: zeros()?, second: zeros()?, steps: 0 })
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Moves the weights by the gradient that was added up, which begins anew, and returns the norm it had, f32 `[]`.
    pub fn step(&mut self, model: &mut Trainable, rates: Rates) -> Result<Tensor> {
        tch::no_grad(|| {
            self.steps += 1;
            let [one, two] = [BETAS.0, BETAS.1].map(|beta| 1.0 - beta.powi(self.steps as i32));
            let gradient = &mut model.gradient;
            let norm = gradient.f_norm()?;
            let shorter = norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(rates.clip)?;
            let _ = gradient.f_mul_(&shorter.f_clamp_max(1.0)?)?;
            let _ = self.first.f_lerp_(gradient, 1.0 - BETAS.0)?;
            let _ = self.second.f_lerp_(&gradient.f_square()?, 1.0 - BETAS.1)?;
            let mut spread = self.second.f_sqrt()?.f_mul_scalar(two.powf(-0.5))?;
            let update = self.first.f_div(&spread.f_add_scalar_(EPSILON)?)?;
            let _ = gradient.f_zero_()?;
            for role in [Role::Matrix, Role::Vector, Role::Factor, Role::Map] {
                let span = model.span(role);
                let (start, length) = (span.start, span.end - span.start);
                if length == 0 {
                    continue;
                }
                let rate = if role == Role::Map { rates.maps } else { rates.weights };
                let mut weights = model.master.f_narrow(0, start, length)?;
                if role == Role::Matrix && rates.decay > 0.0 {
                    let _ = weights.f_mul_scalar_(1.0 - rate * rates.decay)?;
                }
                let moved = update.f_narrow(0, start, length)?.f_mul_scalar(-rate / one)?;
                let _ = weights.f_add_(&moved)?;
            }
            model.round()?;
            Ok(norm.f_to_kind(Kind::Float)?)
        })
    }
}

impl Trainable {
    /// Brings the rounded copy up to date.
    pub(super) fn round(&mut self) -> Result<()> {
        if let Some(rounded) = &mut self.rounded {
            rounded.f_copy_(&self.master.f_narrow(0, 0, rounded.size()[0])?)?;
        }
        Ok(())
    }
}
