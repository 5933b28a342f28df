//! The surrogate with one hidden layer: gradient descent on several layers at once.

use super::samples::Rows;
use crate::baselines::random::mix;
use crate::torch::{dims, expect};
use crate::{Affine, Error, Result};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// How an MLP is fitted. The default is the paper's (arXiv 2601.07891, appendix A), but for the width, which it makes an
/// eighth of the hidden size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpSettings {
    /// Units of the hidden layer.
    pub width: usize,
    /// How often each row is seen.
    pub epochs: usize,
    /// Rows of a step.
    pub batch: usize,
    /// AdamW's learning rate at the start; it falls to zero along half a cosine.
    pub rate: f64,
    /// AdamW's weight decay.
    pub decay: f64,
    /// The longest gradient of a layer's module.
    pub clip: f64,
    /// Of the first weights and the order of rows.
    pub seed: u64,
}

impl Default for MlpSettings {
    fn default() -> Self {
        Self { width: 512, epochs: 15, batch: 512, rate: 5e-3, decay: 0.01, clip: 1.0, seed: 42 }
    }
}

/// A fit of the MLPs of a few layers: squared error, AdamW, clipping and a cosine.
///
/// The layers' modules do not know of one another; they share each step's launches, which is what takes the time of
/// small modules. All numbers of a module lie in one row, so that clipping and AdamW are a few operations on one tensor.
#[derive(Debug)]
pub struct MlpFit {
    settings: MlpSettings,
    hidden: Tensor, // [layers, rows, hidden]
    scores: Tensor, // [layers, rows, kv_heads] f32
    modules: Tensor,
    moments: [Tensor; 2], // AdamW's, [layers, numbers] like the modules
    epoch: usize,
}

impl MlpFit {
    /// A fit to `rows`, a pair for each layer, that begins at random weights and at each head's mean score.
    ///
    /// The rows stay where they are, on any device, in their own dtype.
    pub fn new(settings: MlpSettings, rows: &Rows) -> Result<Self> {
        let stacked = |pick: fn(&(Tensor, Tensor)) -> &Tensor| {
            Tensor::f_stack(&rows.iter().map(pick).collect::<Vec<_>>(), 0)
        };
        if rows.is_empty() {
            return Err(Error::NoRows { layer: 0 });
        }
        let (hidden, scores) = (stacked(|row| &row.0)?, stacked(|row| &row.1)?);
        let [layers, count, size] = dims(&hidden, "hidden", "[layers, rows, hidden]")?;
        let [.., heads] = dims::<3>(&scores, "scores", "[layers, rows, kv_heads]")?;
        expect(&scores, "scores", &[layers, count, heads])?;
        if count == 0 {
            return Err(Error::NoRows { layer: 0 });
        }
        let device = hidden.device();
        let parts = Parts { size, width: settings.width as i64, heads };
        let modules = parts.random(layers, settings.seed)?.f_to_device(device)?;
        let means = scores.f_mean_dim([1i64].as_slice(), false, None)?;
        modules.f_narrow(1, parts.numbers() - heads, heads)?.f_copy_(&means)?;
        let modules = modules.f_set_requires_grad(true)?;
        let zeros = || Tensor::f_zeros([layers, parts.numbers()], (Kind::Float, device));
        let moments = [zeros()?, zeros()?];
        Ok(Self { settings, hidden, scores, modules, moments, epoch: 0 })
    }

    fn parts(&self) -> Parts {
        let (hidden, scores) = (self.hidden.size(), self.scores.size());
        Parts { size: hidden[2], width: self.settings.width as i64, heads: scores[2] }
    }

    /// How many epochs are done.
    pub fn epochs(&self) -> usize {
        self.epoch
    }

    /// Sees each row once more; the mean squared error on the way, over rows, heads and layers.
    pub fn epoch(&mut self) -> Result<f64> {
        let MlpSettings { batch, epochs, seed, .. } = self.settings;
        let (layers, rows, device) =
            (self.hidden.size()[0], self.hidden.size()[1], self.hidden.device());
        let order = Tensor::f_from_slice(&shuffled(rows, seed ^ mix(self.epoch as u64)))?;
        let order = order.f_to_device(device)?;
        let batch = (batch as i64).clamp(1, rows);
        let steps = (rows + batch - 1) / batch;
        let mut total = Tensor::f_zeros([1], (Kind::Double, device))?;
        for step in 0..steps {
            let first = step * batch;
            let chosen = order.f_narrow(0, first, batch.min(rows - first))?;
            let done = (self.epoch as i64 * steps + step) as f64;
            let phase = done / (epochs.max(1) as i64 * steps) as f64 * std::f64::consts::PI;
            let error = self.step(&chosen, 0.5 * (1.0 + phase.cos()), done as i32 + 1)?;
            total = total.f_add(&error.f_to_kind(Kind::Double)?)?;
        }
        self.epoch += 1;
        Ok(total.f_double_value(&[0])? / (steps * layers) as f64)
    }

    /// One step of AdamW (Loshchilov and Hutter 2019), the `count`th, at `share` of the learning rate.
    fn step(&mut self, rows: &Tensor, share: f64, count: i32) -> Result<Tensor> {
        const DECAYS: [f64; 2] = [0.9, 0.999];
        const TINY: f64 = 1e-8;
        let MlpSettings { rate, decay, clip, .. } = self.settings;
        let hidden = self.hidden.f_index_select(1, rows)?.f_to_kind(Kind::Float)?;
        let scores = self.scores.f_index_select(1, rows)?;
        let found = self.parts().forward(&self.modules, &hidden)?;
        let error =
            found.f_sub(&scores)?.f_square()?.f_mean_dim([1i64, 2].as_slice(), false, None)?;
        let error = error.f_sum(Kind::Float)?; // each layer's mean pulls at its own module alone
        error.f_backward()?;
        tch::no_grad(|| {
            let mut gradient = self.modules.f_grad()?;
            let norm = gradient.f_norm_scalaropt_dim(2, [1i64].as_slice(), true)?;
            let shrink = norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_multiply_scalar(clip)?;
            let clipped = gradient.f_mul(&shrink.f_clamp_max(1.0)?)?;
            let _ = gradient.f_zero_()?;
            let [mean, square] = &mut self.moments;
            let _ = mean.f_lerp_(&clipped, 1.0 - DECAYS[0])?;
            let _ = square.f_lerp_(&clipped.f_square()?, 1.0 - DECAYS[1])?;
            let [mean_scale, square_scale] = DECAYS.map(|decay| 1.0 / (1.0 - decay.powi(count)));
            let spread = square.f_multiply_scalar(square_scale)?.f_sqrt()?.f_add_scalar(TINY)?;
            let change = mean.f_div(&spread)?.f_multiply_scalar(rate * share * mean_scale)?;
            let _ = self.modules.f_multiply_scalar_(1.0 - rate * share * decay)?.f_sub_(&change)?;
            Ok(error.f_detach()?)
        })
    }

    /// The fitted maps of each layer, for [`Surrogate::mlp`](crate::Surrogate::mlp).
    pub fn modules(&self) -> Result<Vec<[Affine; 2]>> {
        let parts = self.parts();
        let [weight, bias, out_weight, out_bias] = parts.split(&self.modules.f_detach()?)?;
        let numbers = |tensor: Tensor, layer: i64| -> Result<Vec<f32>> {
            let tensor = tensor.f_get(layer)?.f_transpose(0, 1)?.f_to_device(Device::Cpu)?;
            Ok(Vec::try_from(&tensor.f_contiguous()?.f_view([-1])?)?)
        };
        (0..weight.size()[0])
            .map(|layer| {
                Ok([
                    Affine::new(
                        numbers(weight.shallow_clone(), layer)?,
                        numbers(bias.shallow_clone(), layer)?,
                    )?,
                    Affine::new(
                        numbers(out_weight.shallow_clone(), layer)?,
                        numbers(out_bias.shallow_clone(), layer)?,
                    )?,
                ])
            })
            .collect()
    }

    fn state(&self) -> [(&'static str, &Tensor); 3] {
        [("modules", &self.modules), ("mean", &self.moments[0]), ("square", &self.moments[1])]
    }

    /// Writes all that a fit of the same rows and settings needs to go on from here.
    pub fn save(&self, path: &Path) -> Result<()> {
        let epoch = Tensor::f_from_slice(&[self.epoch as i64])?;
        let state = self
            .state()
            .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_to_device(Device::Cpu)?)));
        let mut tensors = state.into_iter().collect::<Result<Vec<_>>>()?;
        tensors.push(("epoch", epoch));
        let beside = path.with_extension("part");
        Tensor::write_safetensors(&tensors, &beside)?;
        std::fs::rename(&beside, path).map_err(|cause| Error::File { path: path.into(), cause })
    }

    /// Goes on where [`save`](Self::save) was called, with the same bits as without the interruption.
    pub fn restore(&mut self, path: &Path) -> Result<()> {
        let damaged = || Error::Damaged { path: path.into() };
        let tensors = Tensor::read_safetensors(path)?;
        let get = |wanted: &str| {
            let found = tensors.iter().find(|(name, _)| name == wanted);
            found.map(|(_, tensor)| tensor).ok_or_else(damaged)
        };
        let shape = self.modules.size();
        for (name, _) in self.state() {
            expect(get(name)?, "the checkpoint's tensor", &shape)?;
        }
        tch::no_grad(|| -> Result<()> {
            for (name, tensor) in self.state() {
                tensor.shallow_clone().f_copy_(get(name)?)?;
            }
            Ok(())
        })?;
        self.epoch = get("epoch")?.f_int64_value(&[0])? as usize;
        Ok(())
    }
}

/// The sizes of one module, and where its numbers lie in a row: the first map transposed, its bias, the second map
/// transposed, its bias.
#[derive(Clone, Copy)]
struct Parts {
    size: i64,
    width: i64,
    heads: i64,
}

impl Parts {
    fn shapes(self) -> [[i64; 2]; 4] {
        let Self { size, width, heads } = self;
        [[size, width], [1, width], [width, heads], [1, heads]]
    }

    fn numbers(self) -> i64 {
        self.shapes().iter().map(|[rows, columns]| rows * columns).sum()
    }

    /// Each `[layers, rows, columns]`, views of `modules`.
    fn split(self, modules: &Tensor) -> Result<[Tensor; 4]> {
        let layers = modules.size()[0];
        let mut first = 0;
        let mut parts = Vec::new();
        for [rows, columns] in self.shapes() {
            let part = modules.f_narrow(1, first, rows * columns)?;
            parts.push(part.f_reshape([layers, rows, columns])?);
            first += rows * columns;
        }
        Ok(parts.try_into().unwrap_or_else(|_| unreachable!("four shapes give four parts")))
    }

    /// `[layers, rows, kv_heads]` for `hidden` `[layers, rows, hidden]`.
    fn forward(self, modules: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let [weight, bias, out_weight, out_bias] = self.split(modules)?;
        let inner = bias.f_baddbmm(hidden, &weight, 1.0, 1.0)?.f_gelu("none")?;
        Ok(out_bias.f_baddbmm(&inner, &out_weight, 1.0, 1.0)?)
    }

    /// Uniform in ±1/√inputs, as PyTorch begins a linear map; the same on any device.
    fn random(self, layers: i64, seed: u64) -> Result<Tensor> {
        let bounds = [self.size, self.size, self.width, self.width].map(|n| (n as f64).powf(-0.5));
        let counts = self.shapes().map(|[rows, columns]| rows * columns);
        let spread: Vec<f64> = counts
            .iter()
            .zip(bounds)
            .flat_map(|(&count, bound)| std::iter::repeat_n(bound, count as usize))
            .collect();
        let numbers: Vec<f32> = (0..layers)
            .flat_map(|layer| {
                let seed = mix(seed ^ mix(layer as u64));
                spread.iter().enumerate().map(move |(index, bound)| {
                    let unit = (mix(seed ^ index as u64) >> 11) as f64 / (1u64 << 53) as f64;
                    ((2.0 * unit - 1.0) * bound) as f32
                })
            })
            .collect();
        Ok(Tensor::f_from_slice(&numbers)?.f_view([layers, self.numbers()])?)
    }
}

/// `0..rows` in an order that `seed` chooses.
fn shuffled(rows: i64, seed: u64) -> Vec<i64> {
    let mut order: Vec<i64> = (0..rows).collect();
    order.sort_by_cached_key(|&row| mix(mix(seed) ^ row as u64));
    order
}
