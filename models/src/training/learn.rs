//! The gradient of a batch.

use super::Trainable;
use crate::cache::causal;
use crate::causal_lm::{CausalLm, Pass, Whose};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use tch::{Reduction, Tensor};

impl Trainable {
    /// Adds to the gradient that of `Σ weight · −log p(token | those before it)`.
    ///
    /// `ids` are int64 `[rows, tokens + 1]`, `weights` f32 `[rows, tokens]`, one for each token but a row's first. Returns
    /// `−log p`, f32 `[rows, tokens]`. With `recompute`, what lies inside a layer is not kept for the way back but computed
    /// again: a third more arithmetic, and memory for one layer.
    ///
    /// # Errors
    /// Rows without a token to predict, or what libtorch refuses, as when memory runs out.
    pub fn learn(&mut self, ids: &Tensor, weights: &Tensor, recompute: bool) -> Result<Tensor> {
        let tokens = ids.size().get(1).map_or(0, |n| n - 1);
        if tokens < 1 {
            return Err(Error::EmptyPrompt);
        }
        let (input, target) = (ids.f_narrow(1, 0, tokens)?, ids.f_narrow(1, 1, tokens)?);
        let decoder = self.decoder()?;
        let indices: Vec<_> = (0..tokens as usize).collect();
        let mut pass = decoder.enter(&input, &indices, Whose::Context)?;
        if recompute {
            return self.learn_again(&decoder, pass, &target, weights);
        }
        for layer in 0..self.config.layers {
            through(&decoder, layer, &mut pass)?;
        }
        let nll = surprise(&decoder, pass, &target)?;
        let gradients = self.gradients(&nll.f_mul(weights)?.f_sum(nll.kind())?)?;
        self.add_all(&gradients)?;
        Ok(nll.f_detach()?)
    }

    /// A layer at a time: first forward without a graph, then backward with one of a single layer.
    fn learn_again(
        &mut self,
        decoder: &Decoder,
        mut pass: Pass,
        target: &Tensor,
        weights: &Tensor,
    ) -> Result<Tensor> {
        let embedded = pass.hidden.shallow_clone();
        pass.hidden = embedded.f_detach()?;
        let mut inputs = Vec::new();
        for layer in 0..self.config.layers {
            inputs.push(pass.hidden.shallow_clone());
            tch::no_grad(|| through(decoder, layer, &mut pass))?;
        }
        let again = |hidden: &Tensor| Pass {
            hidden: hidden.shallow_clone(),
            index: pass.index.shallow_clone(),
            angles: (pass.angles.0.shallow_clone(), pass.angles.1.shallow_clone()),
            whose: pass.whose,
        };
        let x = pass.hidden.f_set_requires_grad(true)?;
        let nll = surprise(decoder, again(&x), target)?;
        let mut back = self.back(&nll.f_mul(weights)?.f_sum(nll.kind())?, &x)?;
        for (layer, x) in inputs.into_iter().enumerate().rev() {
            let x = x.f_set_requires_grad(true)?;
            let mut pass = again(&x);
            through(decoder, layer, &mut pass)?;
            back = self.back(&pass.hidden.f_mul(&back)?.f_sum(back.kind())?, &x)?;
        }
        if embedded.requires_grad() {
            let _ = self.back(&embedded.f_mul(&back)?.f_sum(back.kind())?, &embedded)?;
        }
        Ok(nll.f_detach()?)
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

/// Takes a text's first pass through a layer. Nothing follows it, so that nothing is stored.
fn through(decoder: &Decoder, layer: usize, pass: &mut Pass) -> Result<()> {
    decoder.layer(layer, pass, &Hooks::default(), 0, &mut |queries, keys, values, _| {
        causal(queries, keys, values)
    })
}

/// `−log p` of each target, f32 `[rows, tokens]`.
fn surprise(decoder: &Decoder, pass: Pass, target: &Tensor) -> Result<Tensor> {
    let logits = decoder.logits(&decoder.leave(pass)?)?.f_flatten(0, 1)?;
    let (rows, target) = (target.size(), target.f_reshape([-1])?);
    let none = None::<&Tensor>;
    let nll = logits.f_cross_entropy_loss(&target, none, Reduction::None, -100, 0.0)?;
    Ok(nll.f_view(rows.as_slice())?)
}
