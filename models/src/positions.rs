//! Where the tokens of each layer stand: what RePo's `pe_config` says, held to the tensors that there are.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::folder::Fields;
use crate::layers::{GatedMlp, Linear};
use crate::weights::Tensors;
use repo_pos::RoundZ;
use std::path::Path;
use tch::{Kind, Tensor};

/// By what a layer turns its queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerPositions {
    /// The token's index: plain rotary embedding.
    Rope,
    /// Nothing.
    Nope,
    /// Positions that the layer's own maps read off the hidden state (RePo, arXiv 2512.14391), one a kv head.
    Repo,
    /// The index, and so many tokens times what the maps read. Ours, not the paper's: a model that was trained by the index
    /// is still one when the maps begin.
    Offset(u32),
    /// What the maps read, and the index, slowed so many times. Ours too: order stays in sight, and a step of one among
    /// positions is worth so many tokens.
    Slowed(u32),
}

impl LayerPositions {
    /// Whether the layer has maps.
    pub fn learned(self) -> bool {
        matches!(self, Self::Repo | Self::Offset(_) | Self::Slowed(_))
    }

    /// What the maps' reading and the index are multiplied by, where both count.
    pub(crate) fn beside_index(self) -> Option<[f32; 2]> {
        match self {
            Self::Offset(tokens) => Some([tokens as f32, 1.0]),
            Self::Slowed(times) => Some([1.0, 1.0 / times as f32]),
            _ => None,
        }
    }
}

/// The maps of a layer, as checkpoints call them.
const MAPS: [&str; 3] = ["gate_map", "content_map", "final_map"];

/// In `pe_config`, what makes positions offsets to the index, or adds the index slowed: in no published checkpoint.
const OFFSET: &str = "dynamic_pe_offset_tokens";
const SLOWED: &str = "dynamic_pe_slowed_index";

/// Reads `pe_config` as the published checkpoints have it, for a model of `layers` layers; plain where there is none.
///
/// Their code reads `dynmaic_pe_start_layer` and `dynmaic_pe_layer_ids`, misspelt so, and writes both spellings; the
/// misspelt one counts here too.
pub(crate) fn planned(fields: &Fields, layers: usize) -> Result<Vec<LayerPositions>> {
    let mut plan = vec![LayerPositions::Rope; layers];
    let Some(pe) = fields.within("pe_config")? else { return Ok(plan) };
    let mode = match pe.text("dynamic_pe_mode")?.unwrap_or("none") {
        "none" => return Ok(plan),
        "nope" => LayerPositions::Nope,
        "swigluex_multihead" => {
            let number = |key| -> Result<Option<u32>> {
                let count = pe.count(key)?.filter(|&count| count > 0);
                Ok(count.map(|count| u32::try_from(count).unwrap_or(u32::MAX)))
            };
            match (number(OFFSET)?, number(SLOWED)?) {
                (None, None) => LayerPositions::Repo,
                (Some(tokens), None) => LayerPositions::Offset(tokens),
                (None, Some(times)) => LayerPositions::Slowed(times),
                (Some(_), Some(times)) => {
                    let wanted = format!("none beside {OFFSET}");
                    return Err(pe.wrong(&format!("pe_config.{SLOWED}"), &wanted, &times));
                }
            }
        }
        found => {
            return Err(Error::Unsupported {
                path: fields.path().to_owned(),
                field: "pe_config.dynamic_pe_mode".to_owned(),
                found: format!("{found:?}"),
                supported: "\"none\", \"nope\" and \"swigluex_multihead\"",
                advice: "choose a model without it; ignoring it would give wrong answers",
            });
        }
    };
    let start = pe.count("dynmaic_pe_start_layer")?.or(pe.count("dynamic_pe_start_layer")?);
    let key = match pe.value("dynmaic_pe_layer_ids") {
        Some(_) => "dynmaic_pe_layer_ids",
        None => "dynamic_pe_layer_ids",
    };
    let ids = pe.text(key)?.unwrap_or_default();
    let listed = ids.split(',').map(str::trim).filter(|id| !id.is_empty()).map(|id| {
        id.parse().ok().filter(|&id: &usize| id < layers).ok_or_else(|| {
            pe.wrong(&format!("pe_config.{key}"), &format!("layers from 0 to {}", layers - 1), &ids)
        })
    });
    let listed = listed.collect::<Result<Vec<_>>>()?;
    for (layer, positions) in plan.iter_mut().enumerate().skip(start.unwrap_or(0)) {
        if listed.is_empty() || listed.contains(&layer) {
            *positions = mode;
        }
    }
    Ok(plan)
}

/// Refuses maps that are missing from a layer of the plan, and maps in any other: which of the two is right, nobody can
/// tell. `path` is the file to blame for the latter, `missing` makes the error for the former.
pub(crate) fn reconcile(
    plan: &[LayerPositions],
    path: &Path,
    has: impl Fn(&str) -> bool,
    missing: impl Fn(&str) -> Error,
) -> Result<()> {
    for (layer, &positions) in plan.iter().enumerate() {
        for tensor in MAPS.map(|map| name(layer, map)) {
            match (positions.learned(), has(&tensor)) {
                (true, false) => return Err(missing(&tensor)),
                (false, true) => {
                    let layers = (0..plan.len()).filter(|&l| plan[l].learned());
                    let planned = layers.collect();
                    return Err(Error::StrayMap { path: path.to_owned(), tensor, planned });
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// A layer's position module: `final(silu(gate(h)) * content(h))`, as [`repo_pos::Module`] says, which is a gated MLP. As one
/// of ours it has a decode step's fast path. Its width is that of the tensors: `hidden / 8` in the published models.
#[derive(Debug)]
pub(crate) struct PositionMaps(pub GatedMlp);

impl PositionMaps {
    /// What is read off `hidden`, `[batch, tokens, hidden]`: f32 `[batch, kv_heads, tokens]`.
    pub fn read(&self, hidden: &Tensor) -> Result<Tensor> {
        let GatedMlp { gate_up, down } = &self.0;
        if gate_up.weight.kind() == down.weight.kind() {
            let read = self.0.forward(&hidden.f_to_kind(gate_up.weight.kind())?)?;
            return Ok(read.f_to_kind(Kind::Float)?.f_transpose(1, 2)?.f_contiguous()?);
        }
        let parts = self.sums(hidden)?.f_unflatten(0, [hidden.size()[0], -1])?.f_chunk(2, 2)?;
        let gated = parts[0].f_silu()?.f_mul_(&parts[1])?; // [batch, tokens, width]
        Ok(down.weight.f_matmul(&gated.f_transpose(1, 2)?)?.f_contiguous()?)
    }

    /// What the first maps make of `hidden`, f32 `[batch * tokens, 2 * width]`: gates, then contents. `None` where these maps
    /// are not narrower than the last.
    #[cfg(feature = "cuda")]
    pub fn units(&self, hidden: &Tensor) -> Result<Option<Tensor>> {
        let GatedMlp { gate_up, down } = &self.0;
        (gate_up.weight.kind() != down.weight.kind()).then(|| self.sums(hidden)).transpose()
    }

    fn sums(&self, hidden: &Tensor) -> Result<Tensor> {
        let rows = hidden.f_flatten(0, 1)?;
        Ok(rows.f_mm_dtype(&self.0.gate_up.weight.f_transpose(0, 1)?, Kind::Float)?)
    }
}

/// The position modules of the layers that have one. A bf16 model on a card has the first maps in bf16, if that holds them:
/// their products with its hidden states are summed in f32, which is all that f32 maps would do, at the speed of bf16.
pub(crate) fn load(weights: &dyn Tensors, round: RoundZ) -> Result<Vec<Option<PositionMaps>>> {
    let config = weights.config();
    let [hidden, heads] = [config.hidden_size, config.kv_heads].map(|n| n as i64);
    let kind = round.kind(weights.kind());
    let narrows = weights.device().is_cuda() && weights.kind() != kind;
    let module = |layer: usize| -> Result<PositionMaps> {
        let [gate, content, last] = MAPS.map(|map| name(layer, map));
        let width = weights.shape(&gate)?.first().map_or(0, |&rows| rows as i64).max(1);
        let map = |name: &str, shape: [i64; 2]| -> Result<Linear> {
            Ok(Linear { weight: weights.tensor_as(name, &shape, kind)?, bias: None })
        };
        let mut gate_up =
            Linear::joined(vec![map(&gate, [width, hidden])?, map(&content, [width, hidden])?])?;
        if narrows && !gate_up.weight.requires_grad() {
            let narrow = gate_up.weight.f_to_kind(weights.kind())?;
            if narrow.f_to_kind(kind)? == gate_up.weight {
                gate_up.weight = narrow;
            }
        }
        Ok(PositionMaps(GatedMlp { gate_up, down: map(&last, [heads, width])? }))
    };
    let layers = config.positions.iter().enumerate();
    layers
        .map(|(layer, &positions)| positions.learned().then(|| module(layer)).transpose())
        .collect()
}

/// The shape of a gate map that is in no file: as wide as the published ones.
pub(crate) fn published_map(config: &Config) -> Vec<usize> {
    vec![(config.hidden_size / 8).max(1), config.hidden_size]
}

/// Whether some layer's map is called so.
pub(crate) fn is_map(tensor: &str, layers: usize) -> bool {
    (0..layers).any(|layer| MAPS.iter().any(|map| name(layer, map) == tensor))
}

fn name(layer: usize, map: &str) -> String {
    format!("model.layers.{layer}.self_attn.{map}.weight")
}
