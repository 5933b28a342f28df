//! A decoder, top to bottom: Llama, Qwen3 and OLMo 2.
//!
//! They differ in where a block's two norms stand, and in whether queries and keys have norms of their own.

use crate::bridge;
#[cfg(feature = "cuda")]
use crate::card::Turning;
use crate::causal_lm::{Attend, CausalLm, Pass, Whose};
use crate::config::{Architecture, Config};
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use crate::layers::{self, GatedMlp, Linear, RmsNorm};
use crate::memory;
use crate::positions::{self, LayerPositions, PositionMaps};
use crate::ranks::{Part, Rank};
use crate::weights::{Tensors, Weights};
use kvzap::LayerInput;
use repo_pos::{Frequencies, Precision, Rotary, RoundZ, rotate};
use tch::{Device, Kind, Tensor};

/// A model of one of the families of [`Architecture`](crate::Architecture), its weights in one dtype on one device.
#[derive(Debug)]
pub struct Decoder {
    pub(crate) config: Config,
    pub(crate) frequencies: Frequencies,
    rotary: Rotary,
    /// Of each layer, the module that reads positions off hidden states, in its own dtype.
    pub(crate) repo: Vec<Option<PositionMaps>>,
    pub(crate) embedding: Tensor, // [vocabulary, hidden]
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: RmsNorm,
    pub(crate) head: Tensor, // [vocabulary, hidden]; the embedding itself where they are tied
    /// Turns heads on a card, where the model is not being trained.
    #[cfg(feature = "cuda")]
    pub(crate) turning: Option<Turning>,
    /// Where this is a part: what adds its branches to those of the others.
    pub(crate) rank: Option<Rank>,
}

#[derive(Debug)]
pub(crate) struct Block {
    pub attention_norm: RmsNorm,
    pub qkv: Linear,
    /// Of queries and of keys: over each head, or over all of them, as its weight is wide.
    pub qk_norms: Option<[RmsNorm; 2]>,
    pub output: Linear,
    pub mlp_norm: RmsNorm,
    pub mlp: GatedMlp,
}

/// What the embedding is called.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Cosines and sines, `[batch, 1 or kv_heads, tokens, head_dim / 2]`.
type Angles = (Tensor, Tensor);

impl Decoder {
    /// Reads the weights from `weights`, one tensor at a time, into its dtype and device.
    pub fn load(weights: &Weights) -> Result<Self> {
        Self::load_with(weights, RoundZ::None, Precision::Parity)
    }

    /// The same, with learned positions rounded as `round` says and angles as `precision`.
    pub fn load_with(weights: &Weights, round: RoundZ, precision: Precision) -> Result<Self> {
        fits("the model's weights", weights.bytes(), weights.device())?;
        Self::assemble(weights, round, precision)?.turning()
    }

    /// Reads what is `rank`'s of the weights, to its device: some kv heads with their query heads, and a share of the MLP. Embedding,
    /// norms and head are whole.
    ///
    /// # Errors
    /// [`Error::Uncut`] for what does not divide.
    pub fn load_part(weights: &Weights, rank: &Rank) -> Result<Self> {
        let part = Part::new(weights, rank)?;
        fits("a part of the model's weights", part.bytes(), rank.device())?;
        let part = Self::assemble(&part, RoundZ::None, Precision::Parity)?.turning()?;
        Ok(Self { rank: Some(rank.clone()), ..part })
    }

    /// With the card's own kernel for turning, where there is one for it.
    pub(crate) fn turning(self) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return Ok(Self { turning: Turning::new(&self.frequencies, &self.embedding)?, ..self });
        #[cfg(not(feature = "cuda"))]
        Ok(self)
    }

    /// The same of tensors from anywhere. Where these are being trained, what [`CausalLm::forward`] gives can be differentiated.
    pub(crate) fn assemble(
        weights: &dyn Tensors,
        round: RoundZ,
        precision: Precision,
    ) -> Result<Self> {
        let config = weights.config().clone();
        let (hidden, vocab) = (config.hidden_size as i64, config.vocab_size as i64);
        let embedding = weights.tensor(EMBEDDING, &[vocab, hidden])?;
        let blocks =
            (0..config.layers).map(|layer| Block::load(weights, layer)).collect::<Result<_>>()?;
        let head = if config.tied_embeddings {
            embedding.shallow_clone()
        } else {
            weights.tensor("lm_head.weight", &[vocab, hidden])?
        };
        let frequencies = config.frequencies()?.with_precision(precision);
        Ok(Self {
            rotary: Rotary::new(&frequencies, weights.device())?,
            frequencies,
            repo: positions::load(weights, round)?,
            norm: norm(weights, "model.norm.weight", hidden)?,
            embedding,
            blocks,
            head,
            #[cfg(feature = "cuda")]
            turning: None,
            rank: None,
            config,
        })
    }

    /// The same network over the same tensors, whose tokens all stand at their index: what learned positions are compared
    /// with.
    pub fn by_index(&self) -> Result<Self> {
        let blocks = self.blocks.iter().map(|block| Block {
            attention_norm: block.attention_norm.shallow_clone(),
            qkv: block.qkv.shallow_clone(),
            qk_norms: block
                .qk_norms
                .as_ref()
                .map(|norms| norms.each_ref().map(RmsNorm::shallow_clone)),
            output: block.output.shallow_clone(),
            mlp_norm: block.mlp_norm.shallow_clone(),
            mlp: block.mlp.shallow_clone(),
        });
        let layers = self.config.layers;
        Ok(Self {
            config: Config { positions: vec![LayerPositions::Rope; layers], ..self.config.clone() },
            rotary: Rotary::new(&self.frequencies, self.embedding.device())?,
            frequencies: self.frequencies.clone(),
            repo: (0..layers).map(|_| None).collect(),
            embedding: self.embedding.shallow_clone(),
            blocks: blocks.collect(),
            norm: self.norm.shallow_clone(),
            head: self.head.shallow_clone(),
            #[cfg(feature = "cuda")]
            turning: self.turning.as_ref().map(Turning::shallow_clone),
            rank: self.rank.clone(),
        })
    }

    /// Numbers of its position maps, and of all its matrices.
    pub fn position_numbers(&self) -> [usize; 2] {
        let maps = self
            .repo
            .iter()
            .flatten()
            .map(|PositionMaps(maps)| maps.gate_up.weight.numel() + maps.down.weight.numel());
        let (maps, head) = (maps.sum(), self.config.vocab_size * self.config.hidden_size);
        let embedding = if self.config.tied_embeddings { 0 } else { head };
        [maps, maps + self.config.matrix_elements() + embedding]
    }

    /// Cosines and sines for the heads of `layer`: one row for all, or one for each kv head, whose queries share it.
    /// `None` turns nothing.
    fn angles(
        &self,
        layer: usize,
        hidden: &Tensor,
        pass: &Pass,
        hooks: &Hooks,
    ) -> Result<Option<Angles>> {
        let plain = || Some((pass.angles.0.shallow_clone(), pass.angles.1.shallow_clone()));
        let positions = match (&hooks.repositioner, self.config.positions[layer]) {
            (Some(hook), _) => hook.positions(layer, hidden)?,
            (None, LayerPositions::Nope) => return Ok(None),
            (None, _) => self.learned(layer, hidden, &pass.index)?,
        };
        let Some(mut positions) = positions else { return Ok(plain()) };
        let (heads, kv_heads) = (positions.size()[1] as usize, self.config.kv_heads);
        if heads != 1 && heads != kv_heads {
            return Err(Error::PositionHeads { layer, heads, kv_heads });
        }
        let finite = match bridge::floats(&positions) {
            Some(positions) => positions.iter().all(|position| position.is_finite()),
            // A sum in f64 is finite where every f32 is; a card would have to be waited for.
            None if positions.device() == Device::Cpu => {
                positions.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite()
            }
            None => true,
        };
        if !finite && pass.whose != Whose::Several {
            return Err(Error::PositionNotFinite { layer });
        }
        if hooks.toward_index != 0.0 {
            let towards = pass.index.f_mul_scalar(hooks.toward_index)?;
            positions = positions.f_mul_scalar(1.0 - hooks.toward_index)?.f_add(&towards)?;
        }
        if let Some(sink) = &hooks.on_positions {
            sink(layer, &positions);
        }
        Ok(Some(self.turned(&positions)?))
    }

    /// The positions that a layer's own module reads off `hidden`, f32 `[batch, kv_heads, tokens]`.
    fn learned(&self, layer: usize, hidden: &Tensor, index: &Tensor) -> Result<Option<Tensor>> {
        let Some(maps) = &self.repo[layer] else { return Ok(None) };
        let read = maps.read(hidden)?;
        Ok(Some(match self.config.positions[layer].beside_index() {
            Some([of_read, of_index]) => {
                let index = index.f_mul_scalar(f64::from(of_index))?;
                read.f_mul_scalar(f64::from(of_read))?.f_add(&index)?
            }
            None => read,
        }))
    }

    /// Cosines and sines of positions, in the model's dtype; of few tokens' on the CPU without a dozen calls into libtorch.
    fn turned(&self, positions: &Tensor) -> Result<Angles> {
        let (batch, heads, tokens) = positions.size3()?;
        let few = batch * tokens <= layers::FEW as i64;
        let Some(row) = bridge::floats(positions).filter(|_| few) else {
            return Ok(self.rotary.angles_in(positions, self.embedding.kind())?);
        };
        let (cos, sin) = self.frequencies.angles(row);
        let tensor = |x: Vec<f32>| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(&x)?.f_view([
                -1,
                heads,
                tokens,
                self.config.head_dim as i64 / 2,
            ])?)
        };
        Ok((tensor(cos)?, tensor(sin)?))
    }

    /// Adds what `branch` makes of `x` to it, normed before, unless `normed` is that already, or after.
    fn add(
        &self,
        x: &Tensor,
        norm: &RmsNorm,
        normed: Option<Tensor>,
        branch: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let branch = |x: &Tensor| match &self.rank {
            None => branch(x),
            Some(rank) => rank.sum(branch(x)?),
        };
        let added = if self.config.architecture.norms_outputs() {
            norm.forward(&branch(x)?)?
        } else {
            branch(&normed.map_or_else(|| norm.forward(x), Ok)?)?
        };
        Ok(x.f_add(&added)?)
    }

    /// What attention reads of a context and its scores, where one launch makes both. Later tokens are scored in one way, be they
    /// of one text or of several.
    fn scored(
        &self,
        layer: usize,
        pass: &Pass,
        hooks: &Hooks,
        window: usize,
    ) -> Result<Option<(Tensor, Tensor)>> {
        #[cfg(feature = "cuda")]
        if pass.whose == Whose::Context
            && let Some((pruning, _)) = hooks.judging(pass.hidden.size()[1], pass.whose, window)
        {
            return self.scored_on_card(layer, &pass.hidden, pruning.scorer.as_ref());
        }
        let _ = (layer, pass, hooks, window);
        Ok(None)
    }

    #[expect(clippy::too_many_arguments, reason = "what a layer is asked with, and its scores")]
    fn attention(
        &self,
        layer: usize,
        hidden: &Tensor,
        scores: Option<Tensor>,
        pass: &Pass,
        hooks: &Hooks,
        window: usize,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor> {
        let (batch, tokens) = (hidden.size()[0], hidden.size()[1]);
        let [query_heads, kv_heads, head_dim] =
            [self.config.query_heads, self.config.kv_heads, self.config.head_dim].map(|n| n as i64);
        let mut projected = self.blocks[layer]
            .project(hidden, [query_heads, kv_heads].map(|heads| heads * head_dim))?;
        #[cfg(feature = "cuda")]
        let done = self.turn_on_card(layer, hidden, &projected, pass, hooks)?;
        #[cfg(not(feature = "cuda"))]
        let done = false;
        let angles = if done { None } else { self.angles(layer, hidden, pass, hooks)? };
        let spans = [0..query_heads, query_heads..query_heads + kv_heads];
        let mut turned = angles.is_none();
        if let Some(angles) = &angles {
            // All or none of them: what suits keys suits the queries that share their positions.
            turned = spans.clone().into_iter().all(|heads| {
                layers::rotate_few(&mut projected, heads, self.config.head_dim, angles)
            });
        }
        let heads = projected
            .f_view([batch, tokens, query_heads + 2 * kv_heads, head_dim])?
            .f_transpose(1, 2)?; // [batch, query_heads + 2 kv_heads, tokens, head_dim]
        let parts = heads.f_split_with_sizes([query_heads, kv_heads, kv_heads], 1)?;
        let rotated = |x: &Tensor| -> Result<Tensor> {
            match &angles {
                Some((cos, sin)) if !turned => Ok(rotate(x, cos, sin)?),
                _ => Ok(x.shallow_clone()),
            }
        };
        let (queries, keys, values) = (rotated(&parts[0])?, rotated(&parts[1])?, &parts[2]);

        let input = LayerInput { layer, hidden, queries: &queries, keys: &keys, values };
        let drops = hooks.drops(input, scores, pass.whose, window)?;
        let mixed = attend(&queries, &keys, values, drops.as_ref())?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([batch, tokens, -1])?;
        self.blocks[layer].output.forward(&mixed)
    }
}

/// Refuses what the memory of a device has no room for.
fn fits(what: &'static str, bytes: u64, device: Device) -> Result<()> {
    match device {
        Device::Cpu => memory::check(what, bytes),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => crate::card::check_memory(device, what, bytes),
        _ => Ok(()),
    }
}

impl CausalLm for Decoder {
    fn config(&self) -> &Config {
        &self.config
    }

    fn enter(&self, tokens: &Tensor, indices: &[usize], whose: Whose) -> Result<Pass> {
        let indices: Vec<_> = indices.iter().map(|&index| index as f32).collect();
        let index = Tensor::f_from_slice(&indices)?.f_to_device(tokens.device())?;
        let index = index.f_view([1, 1, -1])?;
        let hidden = Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?;
        Ok(Pass { hidden, angles: self.turned(&index)?, index, whose })
    }

    fn layer(
        &self,
        layer: usize,
        pass: &mut Pass,
        hooks: &Hooks,
        window: usize,
        attend: &mut Attend<'_>,
    ) -> Result<()> {
        let block = &self.blocks[layer];
        let (normed, scores) = self.scored(layer, pass, hooks, window)?.unzip();
        let x = self.add(&pass.hidden, &block.attention_norm, normed, |hidden| {
            self.attention(layer, hidden, scores, pass, hooks, window, attend)
        })?;
        pass.hidden = self.add(&x, &block.mlp_norm, None, |hidden| block.mlp.forward(hidden))?;
        Ok(())
    }

    fn leave(&self, pass: Pass) -> Result<Tensor> {
        self.norm.forward(&pass.hidden)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(layers::linear(hidden, &self.head, None)?.f_to_kind(Kind::Float)?)
    }

    fn output_projection(&self, layer: usize) -> &Tensor {
        &self.blocks[layer].output.weight
    }

    fn as_decoder(&self) -> Option<&Decoder> {
        Some(self)
    }
}

impl Block {
    fn load(weights: &dyn Tensors, layer: usize) -> Result<Self> {
        let config = weights.config();
        let [hidden, intermediate] =
            [config.hidden_size, config.intermediate_size].map(|n| n as i64);
        let [queries, kv] =
            [config.query_heads, config.kv_heads].map(|n| (n * config.head_dim) as i64);
        let prefix = format!("model.layers.{layer}");
        let attention = |name, out, input, bias| {
            linear(weights, &format!("{prefix}.self_attn.{name}_proj"), out, input, bias)
        };
        let mlp = |name, out, input| {
            linear(weights, &format!("{prefix}.mlp.{name}_proj"), out, input, config.mlp_bias)
        };
        let norm = |name, width| norm(weights, &format!("{prefix}.{name}.weight"), width);
        let [attention_norm, mlp_norm] = if config.architecture.norms_outputs() {
            ["post_attention_layernorm", "post_feedforward_layernorm"]
        } else {
            ["input_layernorm", "post_attention_layernorm"]
        };
        let qk_widths = match config.architecture {
            Architecture::Llama => None,
            Architecture::Qwen3 => Some([config.head_dim as i64; 2]),
            Architecture::Olmo2 => Some([queries, kv]),
        };
        Ok(Self {
            attention_norm: norm(attention_norm, hidden)?,
            qkv: Linear::joined(vec![
                attention("q", queries, hidden, config.attention_bias)?,
                attention("k", kv, hidden, config.attention_bias)?,
                attention("v", kv, hidden, config.attention_bias)?,
            ])?,
            qk_norms: match qk_widths {
                Some([q, k]) => Some([norm("self_attn.q_norm", q)?, norm("self_attn.k_norm", k)?]),
                None => None,
            },
            output: attention("o", hidden, queries, config.output_bias)?,
            mlp_norm: norm(mlp_norm, hidden)?,
            mlp: GatedMlp {
                gate_up: Linear::joined(vec![
                    mlp("gate", intermediate, hidden)?,
                    mlp("up", intermediate, hidden)?,
                ])?,
                down: mlp("down", hidden, intermediate)?,
            },
        })
    }

    /// Queries (`widths[0]` wide), keys (`widths[1]`) and values side by side, the first two normed.
    fn project(&self, hidden: &Tensor, widths: [i64; 2]) -> Result<Tensor> {
        let projected = self.qkv.forward(hidden)?; // [batch, tokens, queries + keys + values]
        let Some(norms) = &self.qk_norms else { return Ok(projected) };
        let (mut start, mut normed) = (0, Vec::new());
        for (norm, width) in norms.iter().zip(widths) {
            let mut part = projected.f_narrow(2, start, width)?;
            let runs = part.f_unflatten(2, [-1, norm.weight.size()[0]])?;
            let runs = norm.forward(&runs)?.f_flatten(2, 3)?;
            // In place saves a copy of all; a gradient needs what was there before.
            if projected.requires_grad() {
                normed.push(runs);
            } else {
                part.f_copy_(&runs)?;
            }
            start += width;
        }
        if normed.is_empty() {
            return Ok(projected);
        }
        normed.push(projected.f_narrow(2, start, projected.size()[2] - start)?);
        Ok(Tensor::f_cat(&normed, 2)?)
    }
}

fn linear(weights: &dyn Tensors, name: &str, out: i64, input: i64, bias: bool) -> Result<Linear> {
    let bias = bias.then(|| weights.tensor(&format!("{name}.bias"), &[out])).transpose()?;
    Ok(Linear { weight: weights.tensor(&format!("{name}.weight"), &[out, input])?, bias })
}

fn norm(weights: &dyn Tensors, name: &str, width: i64) -> Result<RmsNorm> {
    let weight = weights.tensor(name, &[width])?;
    Ok(RmsNorm { weight, epsilon: weights.config().norm_epsilon })
}
