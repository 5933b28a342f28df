//! A model whose weights are being trained.
//!
//! There is no second network: a [`Decoder`] is put together over the weights before each pass, and autograd goes through
//! it. What is trained lies in one flat f32 vector, so that an optimizer's step is a dozen launches however many tensors
//! there are; the network reads views of it, or of its bf16 copy. Position maps are f32 in any model, as [`RoundZ::None`]
//! has them.

mod adamw;
mod files;
mod learn;
mod start;
#[cfg(test)]
mod tests;

pub use adamw::{AdamW, Rates};
pub use learn::{Rows, Way};

use crate::config::Config;
use crate::decoder::{Decoder, EMBEDDING};
use crate::error::{Error, Result};
use crate::positions;
use crate::weights::{Tensors, Weights};
use repo_pos::{Precision, RoundZ};
use start::Start;
use std::collections::HashMap;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// What of a model is trained. Position maps always are, where it has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trained {
    /// Nothing else.
    Maps,
    /// The projections of queries and keys, and their norms.
    QueriesAndKeys,
    /// Updates of this rank to all projections (LoRA, arXiv 2106.09685, with a scale of one).
    LowRank(usize),
    /// Everything.
    Everything,
}

/// How much of a model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What of each layer.
    pub trained: Trained,
    /// The first layer of which anything is; the embedding is only from 0 on.
    pub from: usize,
}

impl Extent {
    /// Of the whole model.
    pub const fn whole(trained: Trained) -> Self {
        Self { trained, from: 0 }
    }
}

/// How a part is updated; in this order they lie in the vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    /// Matrices: they decay.
    Matrix,
    /// Norms and biases.
    Vector,
    /// Factors of a low-rank update: f32 in any model, as is all that follows.
    Factor,
    /// Position maps: they have a rate of their own.
    Map,
}

/// A trained tensor.
#[derive(Debug)]
struct Part {
    name: String,
    shape: Vec<i64>,
    role: Role,
    /// Its numbers in the vector.
    range: Range<i64>,
    /// What the network reads: a view of the vector or of its copy, of which the gradient is taken.
    leaf: Tensor,
}

/// A model with what is trained of it.
#[derive(Debug)]
pub struct Trainable {
    config: Config,
    kind: Kind,
    device: Device,
    parts: Vec<Part>,
    index: HashMap<String, usize>,
    /// All parts, f32 `[numbers]`.
    master: Tensor,
    /// The matrices and vectors of a bf16 model, rounded.
    rounded: Option<Tensor>,
    /// What was added up since the last step, f32 `[numbers]`.
    gradient: Tensor,
    fixed: HashMap<String, Tensor>,
    /// The first layer of which something is trained.
    first: usize,
    /// The network as it began, for the layers below: no graph is kept of them.
    below: Option<Decoder>,
}

impl Trainable {
    /// Goes on with a model: `config` is its own with other positions, if any; `weights` are f32 on the CPU. Maps that
    /// these lack begin as the published ones did, from a normal distribution of 0.02, cut at three deviations.
    ///
    /// The network computes in `kind`, [`Kind::Float`] or [`Kind::BFloat16`], on `device`.
    ///
    /// # Errors
    /// Nothing would be trained, as with [`Trained::Maps`] in a model without maps.
    pub fn continued(
        weights: &Weights,
        config: Config,
        extent: Extent,
        kind: Kind,
        device: Device,
        seed: u64,
    ) -> Result<Self> {
        Self::new(&Start::new(config, Some(weights), seed), extent, kind, device)
    }

    /// A new model: matrices from a normal distribution of 0.02, cut at three deviations, norms 1, biases 0. A tensor's
    /// numbers depend on `seed` and its name alone, so twins share what they both have.
    pub fn from_scratch(config: Config, kind: Kind, device: Device, seed: u64) -> Result<Self> {
        let everything = Extent::whole(Trained::Everything);
        Self::new(&Start::new(config, None, seed), everything, kind, device)
    }

    fn new(
        start: &Start,
        Extent { trained, from }: Extent,
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        if !matches!(kind, Kind::Float | Kind::BFloat16) {
            return Err(Error::WeightKind(format!("{kind:?}")));
        }
        let mut fixed = HashMap::new();
        let mut chosen: Vec<(Role, String, Tensor)> = Vec::new();
        for (name, tensor) in start.tensors()? {
            let layers = start.config().layers;
            let below = layer_of(&name, layers).is_some_and(|layer| layer < from);
            let role = if below { None } else { role(&name, &tensor, trained, layers) };
            match role {
                Some(Role::Factor) => {
                    let Trained::LowRank(rank) = trained else { continue };
                    let [a, b] = start.factors(&name, &tensor, rank as i64)?;
                    chosen.push((Role::Factor, factor(&name, 'a'), a));
                    chosen.push((Role::Factor, factor(&name, 'b'), b));
                    fixed.insert(name, tensor.f_to_device(device)?);
                }
                Some(role) => chosen.push((role, name, tensor)),
                None => {
                    let kind = if positions::is_map(&name, layers) { Kind::Float } else { kind };
                    fixed.insert(name, tensor.f_to_kind(kind)?.f_to_device(device)?);
                }
            }
        }
        if chosen.is_empty() {
            return Err(Error::NothingToTrain);
        }
        chosen.sort_by_key(|(role, ..)| *role);
        let flat: Vec<Tensor> = chosen
            .iter()
            .map(|(.., tensor)| tensor.f_reshape([-1]))
            .collect::<std::result::Result<_, _>>()?;
        let master = Tensor::f_cat(&flat, 0)?.f_to_device(device)?;
        let (mut at, mut parts) = (0, Vec::new());
        for (role, name, tensor) in chosen {
            let range = at..at + tensor.numel() as i64;
            at = range.end;
            let leaf = Tensor::new();
            parts.push(Part { name, shape: tensor.size(), role, range, leaf });
        }
        let index = parts.iter().enumerate().map(|(i, part)| (part.name.clone(), i)).collect();
        let mut this = Self {
            config: start.config().clone(),
            kind,
            device,
            parts,
            index,
            gradient: master.f_zeros_like()?,
            master,
            rounded: None,
            first: 0,
            below: None,
            fixed,
        };
        if kind != Kind::Float {
            let exact = this.exact();
            this.rounded = Some(this.master.f_narrow(0, 0, exact)?.f_to_kind(kind)?);
        }
        this.bind()?;
        let layers = this.config.layers;
        let of = |part: &Part| layer_of(&part.name, layers).unwrap_or(layers);
        this.first = this.parts.iter().map(of).min().unwrap_or(layers);
        if this.first > 0 {
            this.below = Some(tch::no_grad(|| this.decoder()?.turning())?);
        }
        Ok(this)
    }

    /// Makes each part's leaf.
    fn bind(&mut self) -> Result<()> {
        let exact = self.exact();
        for part in &mut self.parts {
            let vector = match &self.rounded {
                Some(rounded) if part.range.start < exact => rounded,
                _ => &self.master,
            };
            let view = vector.f_narrow(0, part.range.start, part.range.end - part.range.start)?;
            part.leaf =
                view.f_view(part.shape.as_slice())?.f_detach()?.f_set_requires_grad(true)?;
        }
        Ok(())
    }

    /// Where in the vector what stays f32 begins.
    fn exact(&self) -> i64 {
        let first = self.parts.iter().find(|part| part.role >= Role::Factor);
        first.map_or(self.master.numel() as i64, |part| part.range.start)
    }

    /// The numbers of all parts of a role, which lie side by side.
    fn span(&self, role: Role) -> Range<i64> {
        let of = |part: &&Part| part.role == role;
        match (self.parts.iter().find(of), self.parts.iter().rfind(of)) {
            (Some(first), Some(last)) => first.range.start..last.range.end,
            _ => 0..0,
        }
    }

    /// The model's shapes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How many numbers are trained.
    pub fn numbers(&self) -> usize {
        self.master.numel()
    }

    /// The network over the weights as they are now. What it computes can be differentiated; it is to be made anew after
    /// a step.
    pub fn decoder(&self) -> Result<Decoder> {
        Decoder::assemble(self, RoundZ::None, Precision::Parity)
    }
}

impl Tensors for Trainable {
    fn config(&self) -> &Config {
        &self.config
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn device(&self) -> Device {
        self.device
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let size = match self.index.get(name) {
            Some(&part) => self.parts[part].shape.clone(),
            None => self.fixed.get(name).map_or_else(Vec::new, Tensor::size),
        };
        Ok(size.iter().map(|&n| n as usize).collect())
    }

    fn tensor_as(&self, name: &str, _: &[i64], kind: Kind) -> Result<Tensor> {
        let leaf = |name: &str| Some(&self.parts[*self.index.get(name)?].leaf);
        if let Some(leaf) = leaf(name) {
            return Ok(leaf.f_to_kind(kind)?);
        }
        // `Start` has read every tensor that a decoder asks for, each of its shape.
        let fixed = self.fixed.get(name).ok_or(Error::NothingToTrain)?;
        match (leaf(&factor(name, 'a')), leaf(&factor(name, 'b'))) {
            (Some(a), Some(b)) => Ok(fixed.f_add(&b.f_matmul(a)?)?.f_to_kind(kind)?),
            _ => Ok(fixed.f_to_kind(kind)?),
        }
    }
}

fn factor(name: &str, which: char) -> String {
    format!("{name}.{which}")
}

/// The layer that a tensor belongs to: 0 for the embedding, which all layers stand on; `None` above them.
fn layer_of(name: &str, layers: usize) -> Option<usize> {
    let within = |layer: &usize| name.starts_with(&format!("model.layers.{layer}."));
    if name == EMBEDDING { Some(0) } else { (0..layers).find(within) }
}

/// How a tensor is updated; `None` if it is not.
fn role(name: &str, tensor: &Tensor, trained: Trained, layers: usize) -> Option<Role> {
    if positions::is_map(name, layers) {
        return Some(Role::Map);
    }
    let plain = if tensor.dim() > 1 { Role::Matrix } else { Role::Vector };
    let projects = |of: &[&str]| of.iter().any(|of| name.contains(&format!(".{of}_")));
    match trained {
        Trained::Maps => None,
        Trained::QueriesAndKeys => projects(&["q", "k"]).then_some(plain),
        Trained::LowRank(_) => (name.ends_with("_proj.weight")).then_some(Role::Factor),
        Trained::Everything => Some(plain),
    }
}
