//! A decoder, top to bottom: Llama, Qwen3 and OLMo 2.
//!
//! They differ in where a block's two norms stand, and in whether queries and keys have norms of their own.

use crate::cache::KvCache;
use crate::causal_lm::CausalLm;
use crate::config::{Architecture, Config, RopeScaling};
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use crate::layers::{self, GatedMlp, Linear, RmsNorm};
use crate::weights::Weights;
use kvzap::LayerInput;
use repo_pos::{Frequencies, Rotary, rotate};
use tch::{Kind, Tensor};

/// A model of one of the families of [`Architecture`](crate::Architecture), its weights in one dtype on one device.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    rotary: Rotary,
    embedding: Tensor, // [vocabulary, hidden]
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Tensor, // [vocabulary, hidden]; the embedding itself where they are tied
}

#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    qkv: Linear,
    /// Of queries and of keys: over each head, or over all of them, as its weight is wide.
    qk_norms: Option<[RmsNorm; 2]>,
    output: Linear,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl Decoder {
    /// Reads the weights from `weights`, one tensor at a time, into its dtype and device.
    pub fn load(weights: &Weights) -> Result<Self> {
        let config = weights.config().clone();
        let (hidden, vocab) = (config.hidden_size as i64, config.vocab_size as i64);
        let embedding = weights.tensor("model.embed_tokens.weight", &[vocab, hidden])?;
        let blocks =
            (0..config.layers).map(|layer| Block::load(weights, layer)).collect::<Result<_>>()?;
        let head = if config.tied_embeddings {
            embedding.shallow_clone()
        } else {
            weights.tensor("lm_head.weight", &[vocab, hidden])?
        };
        Ok(Self {
            rotary: Rotary::new(&frequencies(&config)?, weights.device())?,
            norm: norm(weights, "model.norm.weight", hidden)?,
            embedding,
            blocks,
            head,
            config,
        })
    }

    /// Cosines and sines for the queries and keys of `layer`, broadcastable to
    /// `[batch, query_heads + kv_heads, tokens, head_dim / 2]`; `None` leaves the token's index.
    fn repositioned(
        &self,
        layer: usize,
        hidden: &Tensor,
        hooks: &Hooks,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let Some(repositioner) = &hooks.repositioner else { return Ok(None) };
        let Some(positions) = repositioner.positions(layer, hidden)? else { return Ok(None) };
        let (kv_heads, group) = (self.config.kv_heads as i64, self.config.group() as i64);
        let heads = positions.size()[1];
        let positions = if heads == 1 {
            positions
        } else if heads == kv_heads {
            let queries = positions.f_repeat_interleave_self_int(group, 1, None)?;
            Tensor::f_cat(&[queries, positions], 1)?
        } else {
            return Err(Error::PositionHeads {
                layer,
                heads: heads as usize,
                kv_heads: self.config.kv_heads,
            });
        };
        Ok(Some(self.rotary.angles(&positions)?))
    }

    /// Adds what `branch` makes of `x` to it, normed before or after.
    fn add(
        &self,
        x: Tensor,
        norm: &RmsNorm,
        branch: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let added = if self.config.architecture.norms_outputs() {
            norm.forward(&branch(&x)?)?
        } else {
            branch(&norm.forward(&x)?)?
        };
        Ok(x.f_add(&added)?)
    }

    fn attention(
        &self,
        layer: usize,
        hidden: &Tensor,
        index_angles: &(Tensor, Tensor),
        cache: &mut dyn KvCache,
        hooks: &Hooks,
        prefill: bool,
    ) -> Result<Tensor> {
        let (batch, tokens) = (hidden.size()[0], hidden.size()[1]);
        let [query_heads, kv_heads, head_dim] =
            [self.config.query_heads, self.config.kv_heads, self.config.head_dim].map(|n| n as i64);
        let mut projected = self.blocks[layer]
            .project(hidden, [query_heads, kv_heads].map(|heads| heads * head_dim))?;
        let repositioned = self.repositioned(layer, hidden, hooks)?;
        let (cos, sin) = repositioned.as_ref().unwrap_or(index_angles);
        let turned = query_heads + kv_heads;
        let sizes = [turned as usize, self.config.head_dim];
        let in_place = layers::rotate_token(&mut projected, sizes, cos, sin);
        let heads = projected
            .f_view([batch, tokens, query_heads + 2 * kv_heads, head_dim])?
            .f_transpose(1, 2)?; // [batch, query_heads + 2 kv_heads, tokens, head_dim]
        let rotated = heads.f_narrow(1, 0, turned)?;
        let rotated = if in_place { rotated } else { rotate(&rotated, cos, sin)? };
        let queries = rotated.f_narrow(1, 0, query_heads)?;
        let keys = rotated.f_narrow(1, query_heads, kv_heads)?;
        let values = heads.f_narrow(1, query_heads + kv_heads, kv_heads)?;

        let input = LayerInput { layer, hidden, queries: &queries, keys: &keys, values: &values };
        let drops = hooks.drops(input, prefill, cache.window())?;
        let mixed = cache.attend(layer, &queries, &keys, &values, drops.as_ref())?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([batch, tokens, -1])?;
        self.blocks[layer].output.forward(&mixed)
    }
}

impl CausalLm for Decoder {
    fn config(&self) -> &Config {
        &self.config
    }

    fn forward(&self, tokens: &Tensor, cache: &mut dyn KvCache, hooks: &Hooks) -> Result<Tensor> {
        let (first, count) = (cache.tokens(), tokens.size()[1]);
        cache.begin(count as usize)?;
        let index = Tensor::f_arange_start(
            first as i64,
            first as i64 + count,
            (Kind::Float, tokens.device()),
        )?;
        let angles = self.rotary.angles(&index.f_view([1, 1, count])?)?;

        let mut x = Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = self.add(x, &block.attention_norm, |hidden| {
                self.attention(layer, hidden, &angles, cache, hooks, first == 0)
            })?;
            x = self.add(x, &block.mlp_norm, |hidden| block.mlp.forward(hidden))?;
        }
        self.norm.forward(&x)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(layers::linear(hidden, &self.head, None)?.f_to_kind(Kind::Float)?)
    }

    fn output_projection(&self, layer: usize) -> &Tensor {
        &self.blocks[layer].output.weight
    }
}

impl Block {
    fn load(weights: &Weights, layer: usize) -> Result<Self> {
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
        let mut start = 0;
        for (norm, width) in self.qk_norms.iter().flatten().zip(widths) {
            let mut part = projected.f_narrow(2, start, width)?;
            let runs = part.f_unflatten(2, [-1, norm.weight.size()[0]])?;
            part.f_copy_(&norm.forward(&runs)?.f_flatten(2, 3)?)?;
            start += width;
        }
        Ok(projected)
    }
}

fn linear(weights: &Weights, name: &str, out: i64, input: i64, bias: bool) -> Result<Linear> {
    let bias = bias.then(|| weights.tensor(&format!("{name}.bias"), &[out])).transpose()?;
    Ok(Linear { weight: weights.tensor(&format!("{name}.weight"), &[out, input])?, bias })
}

fn norm(weights: &Weights, name: &str, width: i64) -> Result<RmsNorm> {
    let weight = weights.tensor(name, &[width])?;
    Ok(RmsNorm { weight, epsilon: weights.config().norm_epsilon })
}

fn frequencies(config: &Config) -> Result<Frequencies> {
    let (theta, head_dim) = (config.rope_theta, config.head_dim);
    Ok(match &config.rope_scaling {
        RopeScaling::None => Frequencies::plain(theta, head_dim)?,
        RopeScaling::Linear { factor } => Frequencies::linear(theta, head_dim, *factor)?,
        RopeScaling::Llama3 { factor, low, high, original } => {
            Frequencies::llama3(theta, head_dim, *factor, *low, *high, *original)?
        }
        RopeScaling::Yarn(yarn) => Frequencies::yarn(theta, head_dim, *yarn)?,
        RopeScaling::Divisors(divisors) => Frequencies::divided(theta, head_dim, divisors)?,
    })
}
