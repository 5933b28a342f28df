//! The gradient of a batch.

use super::Trainable;
use crate::cache::causal;
use crate::causal_lm::{CausalLm, Pass, Whose};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use tch::{Reduction, Tensor};

/// Rows of tokens, as far as nothing is trained.
#[derive(Debug)]
pub struct Rows {
    pass: Pass,
    target: Tensor, // int64 [rows, tokens]
}

/// How rows are learned from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    /// What lies inside a layer is not kept for the way back but computed again: a third more arithmetic, and memory for
    /// one layer.
    pub recompute: bool,
    /// How far learned positions are moved to the index, as in [`Hooks::toward_index`].
    pub toward_index: f64,
}

impl Trainable {
    /// Takes `ids`, int64 `[rows, tokens + 1]`, through the layers below the first of which something is trained. Models that
    /// [share them](Self::shares_rows) can learn from the same rows.
    ///
    /// # Errors
    /// Rows without a token to predict, or what libtorch refuses, as when memory runs out.
    pub fn rows(&self, ids: &Tensor) -> Result<Rows> {
        let tokens = ids.size().get(1).map_or(0, |n| n - 1);
        if tokens < 1 {
            return Err(Error::EmptyPrompt);
        }
        let (input, target) = (ids.f_narrow(1, 0, tokens)?, ids.f_narrow(1, 1, tokens)?);
        let indices: Vec<_> = (0..tokens as usize).collect();
        let pass = match &self.below {
            None => self.decoder()?.enter(&input, &indices, Whose::Context)?,
            Some(below) => tch::no_grad(|| -> Result<Pass> {
                let mut pass = below.enter(&input, &indices, Whose::Context)?;
                for layer in 0..self.first {
                    through(below, layer, &mut pass, &Hooks::default())?;
                }
                Ok(pass)
            })?,
        };
        Ok(Rows { pass, target })
    }

    /// Whether another model, which came from the same weights, makes the same of rows.
    pub fn shares_rows(&self, other: &Self) -> bool {
        let plan = |model: &Self| model.config.positions[..self.first].to_vec();
        self.first > 0 && self.first == other.first && plan(self) == plan(other)
    }

    /// Adds to the gradient that of `Σ weight · −log p(token | those before it)`.
    ///
    /// `weights` are f32 `[rows, tokens]`, one for each token but a row's first. Returns `−log p`, of the same shape; 0 where
    /// the weight is, of whose tokens no logits are made.
    ///
    /// # Errors
    /// What libtorch refuses, as when memory runs out.
    pub fn learn(&mut self, rows: &Rows, weights: &Tensor, way: Way) -> Result<Tensor> {
        let decoder = self.decoder()?;
        let hooks = Hooks { toward_index: way.toward_index, ..Hooks::default() };
        let mut pass = again(&rows.pass, &rows.pass.hidden);
        if way.recompute {
            return self.learn_again(&decoder, pass, &hooks, &rows.target, weights);
        }
        for layer in self.first..self.config.layers {
            through(&decoder, layer, &mut pass, &hooks)?;
        }
        let (nll, loss) = surprise(&decoder, pass, &rows.target, weights)?;
        let gradients = self.gradients(&loss)?;
        self.add_all(&gradients)?;
        Ok(nll)
    }

    /// A layer at a time: first forward without a graph, then backward with one of a single layer.
    fn learn_again(
        &mut self,
        decoder: &Decoder,
        mut pass: Pass,
        hooks: &Hooks,
        target: &Tensor,
        weights: &Tensor,
    ) -> Result<Tensor> {
        let embedded = pass.hidden.shallow_clone();
        pass.hidden = embedded.f_detach()?;
        let mut inputs = Vec::new();
        for layer in self.first..self.config.layers {
            inputs.push(pass.hidden.shallow_clone());
            tch::no_grad(|| through(decoder, layer, &mut pass, hooks))?;
        }
        let x = pass.hidden.f_set_requires_grad(true)?;
        let (nll, loss) = surprise(decoder, again(&pass, &x), target, weights)?;
        let mut back = self.back(&loss, &x)?;
        for (i, x) in inputs.into_iter().enumerate().rev() {
            let x = x.f_set_requires_grad(true)?;
            let mut pass = again(&pass, &x);
            through(decoder, self.first + i, &mut pass, hooks)?;
            back = self.back(&pass.hidden.f_mul(&back)?.f_sum(back.kind())?, &x)?;
        }
        if embedded.requires_grad() {
            let _ = self.back(&embedded.f_mul(&back)?.f_sum(back.kind())?, &embedded)?;
        }
        Ok(nll)
    }

    /// The parts' gradients of a number; undefined for those that it does not depend on.
    fn gradients(&self, loss: &Tensor) -> Result<Vec<Tensor>> {
        let leaves: Vec<&Tensor> = self.parts.iter().map(|part| &part.leaf).collect();
        Ok(Tensor::f_run_backward(&[loss], &leaves, false, false)?)
    }

    /// Adds the parts' gradients of a number, and returns that of `x`.
    fn back(&mut self, loss: &Tensor, x: &Tensor) -> Result<Tensor> {
        let leaves: Vec<&Tensor> =
            [x].into_iter().chain(self.parts.iter().map(|part| &part.leaf)).collect();
        let mut gradients = Tensor::f_run_backward(&[loss], &leaves, false, false)?;
        let back = gradients.remove(0);
        for (part, gradient) in self.parts.iter().zip(&gradients).filter(|(_, g)| g.defined()) {
            let (start, length) = (part.range.start, part.range.end - part.range.start);
            let _ = self.gradient.f_narrow(0, start, length)?.f_add_(&gradient.f_reshape([-1])?)?;
        }
        Ok(back)
    }

    /// Adds all parts' gradients in a launch or two.
    fn add_all(&mut self, gradients: &[Tensor]) -> Result<()> {
        let flat = |(part, gradient): (&super::Part, &Tensor)| -> Result<Tensor> {
            let gradient = if gradient.defined() { gradient } else { &part.leaf.f_zeros_like()? };
            Ok(gradient.f_reshape([-1])?)
        };
        let flat = self.parts.iter().zip(gradients).map(flat).collect::<Result<Vec<_>>>()?;
        let mut at = 0;
        for run in flat.chunk_by(|a, b| a.kind() == b.kind()) {
            let joined = Tensor::f_cat(run, 0)?;
            let length = joined.size()[0];
            let _ = self.gradient.f_narrow(0, at, length)?.f_add_(&joined)?;
            at += length;
        }
        Ok(())
    }
}

/// The same pass, with other hidden states.
fn again(pass: &Pass, hidden: &Tensor) -> Pass {
    Pass {
        hidden: hidden.shallow_clone(),
        index: pass.index.shallow_clone(),
        angles: (pass.angles.0.shallow_clone(), pass.angles.1.shallow_clone()),
        whose: pass.whose,
    }
}

/// Takes a text's first pass through a layer. Nothing follows it, so that nothing is stored.
fn through(decoder: &Decoder, layer: usize, pass: &mut Pass, hooks: &Hooks) -> Result<()> {
    decoder
        .layer(layer, pass, hooks, 0, &mut |queries, keys, values, _| causal(queries, keys, values))
}

/// `−log p` of each target that has a weight, f32 `[rows, tokens]`, without a graph; and their weighed sum, with one.
fn surprise(
    decoder: &Decoder,
    pass: Pass,
    target: &Tensor,
    weights: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let weighed = weights.f_reshape([-1])?;
    let due = weighed.f_nonzero()?.f_reshape([-1])?;
    let hidden = decoder.leave(pass)?.f_flatten(0, 1)?.f_index_select(0, &due)?;
    let target = target.f_reshape([-1])?.f_index_select(0, &due)?;
    let logits = decoder.logits(&hidden)?;
    let none = None::<&Tensor>;
    let nll = logits.f_cross_entropy_loss(&target, none, Reduction::None, -100, 0.0)?;
    let loss = nll.f_mul(&weighed.f_index_select(0, &due)?)?.f_sum(nll.kind())?;
    let all = weighed.f_zeros_like()?.f_index_copy(0, &due, &nll.f_detach()?)?;
    Ok((all.f_view(weights.size().as_slice())?, loss))
}
