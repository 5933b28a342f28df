//! A step of one token for each text of a batch, as a graph.

use super::buffers::Buffers;
use super::driver::{
    self, AddNormed, Draw, Embed, End, Input, Kernels, MOST_COLUMNS, Norm, NormWhole, PARTS,
    Product, ROWS, Stream,
};
use super::memory::{self, Mailbox};
use super::ranks::Across;
use crate::causal_lm::CausalLm;
use crate::config::Config;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::layers::Linear;
use crate::positions::{LayerPositions, PositionMaps};
use crate::sampling::Sampling;
use cudarc::driver::CudaGraph;
use kvzap::TorchSurrogate;
use paged_kernels::{
    Beside, DeviceView, Gate, HeadNorms, Positions, Projected, Resident, ScorePrecision, ScoreRule,
    Sequence,
};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// What judges the tokens of a step: a surrogate whose first layer runs with the projections.
#[derive(Debug)]
pub struct Gates {
    /// Of each layer, the map of a linear surrogate or the two of an MLP, weights and biases, bf16 on the card.
    pub maps: Vec<Vec<(Tensor, Tensor)>>,
    /// Of each layer: tokens that score less go.
    pub thresholds: Vec<f32>,
}

impl Gates {
    /// The maps of `surrogate`, in bf16 on the card, with a threshold for each layer.
    pub fn new(surrogate: &TorchSurrogate, thresholds: Vec<f32>) -> Self {
        let copy = |maps: &Vec<(Tensor, Tensor)>| {
            maps.iter().map(|(w, b)| (w.shallow_clone(), b.shallow_clone())).collect()
        };
        Self { maps: surrogate.modules().iter().map(copy).collect(), thresholds }
    }
}

/// A text's place in the batch.
#[derive(Debug, Clone)]
pub struct Place {
    /// The text in the cache.
    pub sequence: Sequence,
    /// The token that the next step reads.
    pub token: Token,
    /// Its index in the text.
    pub position: usize,
    /// How its tokens are drawn; the seed is the caller's, who gives each step its random numbers.
    pub sampling: Sampling,
}

/// A token that a step reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// A known one.
    Known(u32),
    /// What the last step drew for this place of the batch before, known to the card alone as yet.
    Of(usize),
}

/// What a step drew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepTokens {
    /// Of each place; `None` where the scores were NaN, and of no meaning where nobody sits.
    pub tokens: Vec<Option<u32>>,
    /// Pages that were free after the step.
    pub free_pages: usize,
    /// Pages that were wanted and not there, ever.
    pub missing: usize,
}

/// The decode step of a model over a [`Resident`] cache, for batches of up to 64 texts.
pub struct Step {
    kernels: Kernels,
    config: Config,
    layers: Vec<Layer>,
    embedding: Tensor, // [vocabulary, hidden]
    norm: Tensor,
    head: Linear,
    inverse: Tensor, // f32 [head_dim / 2]
    /// The inverse frequencies of layers that turn nothing.
    still: Tensor,
    /// What cosines and sines are multiplied by.
    turned: f32,
    /// Where blocks norm what they write: the weights of a norm that changes nothing.
    ones: Option<Tensor>,
    buffers: Buffers,
    vocabulary: usize,
    mailbox: Mailbox,
    /// By places.
    graphs: BTreeMap<usize, CudaGraph>,
    /// Places of the batch, padded.
    places: usize,
    /// Where the model is a part. Dropped after the graphs, which hold its sums.
    across: Option<Across>,
}

struct Layer {
    attention_norm: Tensor,
    qkv: Linear,
    qk_norms: Option<[Tensor; 2]>,
    positions: LayerPositions,
    /// What runs with the projections: the first maps of what reads positions, then of the surrogate.
    more: Option<Linear>,
    /// Of what reads positions: its last map, `[kv_heads, width]`.
    repo: Option<Tensor>,
    gate: Option<LayerGate>,
    output: Linear,
    mlp_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

struct LayerGate {
    units: usize,
    /// Of an MLP: weight and bias.
    second: Option<[Tensor; 2]>,
    rule: ScoreRule,
}

impl Step {
    /// The step of `model`, which lies on the card of `cache` in bf16. Tokens from `vocabulary` on are never chosen.
    ///
    /// # Errors
    /// [`Error::Step`] for what the graph doesn't have: another dtype than bf16, biases in the MLP, odd widths.
    pub fn new(
        model: &dyn CausalLm,
        gates: Option<&Gates>,
        cache: &Resident,
        vocabulary: usize,
    ) -> Result<Self> {
        let model = decoder(model)?;
        let config = model.config.clone();
        check(model)?;
        let columns = cache.seats().texts.min(MOST_COLUMNS);
        let maps = model.repo.iter().map(|module| module.as_ref().map(position_maps).transpose());
        let mut maps = maps.collect::<Result<Vec<_>>>()?.into_iter();
        let layers = model.blocks.iter().enumerate();
        let layers = layers.map(|(i, block)| {
            let [first, last] = match maps.next().flatten() {
                Some(maps) => maps.map(Some),
                None => [None, None],
            };
            let mut more = first.map(|weight| Linear { weight, bias: None });
            let mut gate = None;
            if let Some(gates) = gates {
                let mut maps = gates.maps[i]
                    .iter()
                    .map(|(weight, bias)| [weight.shallow_clone(), bias.shallow_clone()]);
                let [weight, bias] = maps.next().expect("a surrogate has a map a layer");
                gate = Some(LayerGate {
                    units: weight.size()[0] as usize,
                    second: maps.next(),
                    rule: ScoreRule {
                        threshold: gates.thresholds[i],
                        precision: ScorePrecision::MatchTorchBf16,
                    },
                });
                more = Some(follow(more, Linear { weight, bias: Some(bias) })?);
            }
            Ok(Layer {
                attention_norm: block.attention_norm.weight.shallow_clone(),
                qkv: block.qkv.shallow_clone(),
                qk_norms: block
                    .qk_norms
                    .as_ref()
                    .map(|norms| norms.each_ref().map(|norm| norm.weight.shallow_clone())),
                positions: config.positions[i],
                more,
                repo: last,
                gate,
                output: block.output.shallow_clone(),
                mlp_norm: block.mlp_norm.weight.shallow_clone(),
                gate_up: block.mlp.gate_up.shallow_clone(),
                down: block.mlp.down.shallow_clone(),
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let rows = |linear: &Linear| linear.weight.size()[0] as usize;
        let projected =
            layers.iter().map(|layer| rows(&layer.qkv) + layer.more.as_ref().map_or(0, rows));
        let (projected, device) = (projected.max().unwrap_or(0), model.embedding.device());
        let buffers = Buffers::new(&config, columns, projected, device)?;
        let ones = config
            .architecture
            .norms_outputs()
            .then(|| Tensor::f_ones([config.hidden_size as i64], (Kind::BFloat16, device)));
        let inverse = Tensor::f_from_slice(model.frequencies.inverse())?.f_to_device(device)?;
        let step = Self {
            kernels: Kernels::load(cache.stream().clone())?,
            layers,
            embedding: model.embedding.shallow_clone(),
            norm: model.norm.weight.shallow_clone(),
            head: Linear { weight: model.head.shallow_clone(), bias: None },
            still: inverse.f_zeros_like()?,
            inverse,
            turned: model.frequencies.scale(),
            ones: ones.transpose()?,
            buffers,
            vocabulary,
            mailbox: Mailbox::new(cache.stream())?,
            graphs: BTreeMap::new(),
            places: 0,
            across: Across::new(model, cache, columns)?,
            config,
        };
        // Weights and buffers come from libtorch's stream.
        memory::after_torch(step.kernels.stream())?;
        Ok(step)
    }

    /// Says who takes the steps that follow. The batch is padded to the next size that has a graph, which is captured
    /// where it is new.
    ///
    /// # Errors
    /// Those of [`Resident::batch`].
    pub fn batch(&mut self, cache: &mut Resident, texts: &[Option<Place>]) -> Result<()> {
        let most = cache.seats().texts.min(MOST_COLUMNS);
        if texts.len() > most {
            return Err(Error::Cache(paged_kernels::Error::NoSeat { seats: most }));
        }
        let places = texts.len().next_power_of_two().min(most);
        let taken = || texts.iter().map(Some).chain(std::iter::repeat(None)).take(places);
        let taken = || taken().map(|place| place.and_then(Option::as_ref));
        let sequences = taken().map(|place| place.map(|place| place.sequence));
        cache.batch(&sequences.collect::<Vec<_>>())?;
        cache.leave_room(true);

        let Buffers { tokens, positions, draws, from, fresh, .. } = &self.buffers;
        let floats = |of: &dyn Fn(&Place) -> f32| -> Vec<f32> {
            taken().map(|place| place.map_or(0.0, of)).collect()
        };
        let words = |of: &dyn Fn(&Place) -> i32| -> Vec<i32> {
            taken().map(|place| place.map_or(-1, of)).collect()
        };
        let kernels = &self.kernels;
        kernels.upload(&floats(&|place| place.position as f32), positions)?;
        kernels.upload(&floats(&|place| place.sampling.temperature), &draws.temperatures)?;
        kernels.upload(&floats(&|place| place.sampling.top_p), &draws.nuclei)?;
        kernels.upload(&words(&|place| place.sampling.top_k as i32), &draws.tops)?;
        let token = |place: &Place| match place.token {
            Token::Known(token) => token as i32,
            Token::Of(_) => 0,
        };
        let before = |place: &Place| match place.token {
            Token::Known(_) => -1,
            Token::Of(place) => place as i32,
        };
        kernels.upload(&words(&token), fresh)?;
        kernels.upload(&words(&before), from)?;
        kernels.seat(tokens, from, fresh, places)?;
        self.places = places;
        if !self.graphs.contains_key(&places) {
            // Once outside a graph: NCCL connects cards when they first meet.
            self.across.as_ref().map_or(Ok(()), |across| across.sum(places))?;
            let graph = kernels.capture(|| self.queue(cache, places))?;
            self.graphs.insert(places, graph);
        }
        Ok(())
    }

    /// Queues a step of the batch and gives it a number, under which its tokens are [`drawn`](Self::drawn). `randoms`, from 0
    /// up to 1, are those of places that draw by chance; none where all take the likeliest. Waits for nothing. At most
    /// eight steps may not have been asked for.
    pub fn run(&mut self, cache: &Resident, randoms: &[f64]) -> Result<usize> {
        self.kernels.upload(randoms, &self.buffers.draws.randoms)?;
        self.graphs.get(&self.places).map_or(Ok(()), driver::replay)?;
        let stream = self.kernels.stream().clone();
        self.mailbox.post(&stream, &self.buffers.tokens, self.places, cache.counters())
    }

    /// What a step has drawn; `None` while it is under way, unless `wait`.
    pub fn drawn(&self, number: usize, wait: bool) -> Result<Option<StepTokens>> {
        let Some(words) = self.mailbox.read(number, wait)? else { return Ok(None) };
        let tokens = words[2..].iter().map(|&token| (token != u32::MAX).then_some(token)).collect();
        let free_pages = (words[0] as i32).max(0) as usize;
        Ok(Some(StepTokens { tokens, free_pages, missing: words[1] as usize }))
    }

    /// The last step's scores of each place of the batch, f32 `[places, vocabulary]`. Waits for the card.
    pub fn scores(&self) -> Result<Tensor> {
        memory::before_torch(self.kernels.stream())?;
        let [places, vocabulary] = [self.places, self.config.vocab_size].map(|n| n as i64);
        let all = self.buffers.scores.f_narrow(0, 0, places * vocabulary)?;
        let scores = all.f_view([places, vocabulary])?.f_to_device(tch::Device::Cpu)?;
        memory::after_torch(self.kernels.stream())?;
        Ok(scores)
    }

    /// Launches a step of `columns` texts.
    fn queue(&self, cache: &mut Resident, columns: usize) -> Result<()> {
        let Buffers { tokens, positions, squares, scores, best, draws, .. } = &self.buffers;
        let Config { hidden_size, vocab_size: rows, .. } = self.config;
        cache.begin_step()?;
        self.kernels.embed(Embed {
            embedding: &self.embedding,
            tokens,
            norm: self.ones.as_ref().unwrap_or(&self.layers[0].attention_norm),
            stream: self.buffers.stream(),
            columns,
        })?;
        let mut parts = PARTS;
        for (i, layer) in self.layers.iter().enumerate() {
            self.attention(cache, i, parts, columns)?;
            if self.across.is_some() {
                parts = PARTS;
            } else if self.ones.is_none() {
                parts = hidden_size.div_ceil(ROWS) * PARTS;
            }
            let next = match (self.layers.get(i + 1), &self.ones) {
                (Some(_), Some(ones)) => ones,
                (Some(next), None) => &next.attention_norm,
                (None, _) => &self.norm,
            };
            self.mlp(layer, next, parts, columns)?;
        }
        let vocabulary = self.vocabulary;
        self.kernels.product(Product {
            weight: &self.head,
            more: None,
            input: plain(&self.buffers.normed, hidden_size),
            norm: Some(self.norm_of(squares, parts)),
            columns,
            end: End::Score { scores, best, vocabulary },
        })?;
        self.kernels.draw(Draw {
            scores,
            best,
            draws,
            tokens,
            positions,
            columns,
            rows,
            vocabulary,
        })
    }

    fn attention(
        &self,
        cache: &mut Resident,
        i: usize,
        parts: usize,
        columns: usize,
    ) -> Result<()> {
        let layer = &self.layers[i];
        let Config { query_heads, kv_heads, head_dim, hidden_size, .. } = self.config;
        let Buffers { positions, normed, squares, projected, queries, attended, .. } =
            &self.buffers;
        self.kernels.product(Product {
            weight: &layer.qkv,
            more: layer.more.as_ref(),
            input: plain(normed, hidden_size),
            norm: self.factor(squares, parts),
            columns,
            end: End::Store(projected),
        })?;
        let width = (query_heads + 2 * kv_heads) * head_dim;
        let inner = layer.repo.as_ref().map_or(0, |last| last.size()[1] as usize);
        let (maps, units) = (2 * inner, layer.gate.as_ref().map_or(0, |gate| gate.units));
        let stride = width + maps + units;
        let part = |from, width| memory::view(projected, from, [1, columns, width], [0, stride]);
        let epsilon = self.config.norm_epsilon as f32;
        let norms = match &layer.qk_norms {
            Some(norms @ [query, _]) if query.numel() != head_dim => {
                self.kernels.norm_whole(NormWhole {
                    projected,
                    norms,
                    columns,
                    stride,
                    epsilon,
                })?;
                None
            }
            Some([query, key]) => Some(HeadNorms { query: row(query)?, key: row(key)?, epsilon }),
            None => None,
        };
        let gate = match &layer.gate {
            Some(LayerGate { second, rule, .. }) => Some(Gate {
                units: part(width + maps, units)?,
                second: match second {
                    Some([weight, bias]) => Some([
                        memory::view(weight, 0, [1, kv_heads, units], [0, units])?,
                        row(bias)?,
                    ]),
                    None => None,
                },
                rule: *rule,
            }),
            None => None,
        };
        let index = memory::view(positions, 0, [1, columns, 1], [columns, 1])?;
        let positions = match &layer.repo {
            Some(last) => Positions::Read {
                units: part(width, maps)?,
                last: memory::view(last, 0, [1, kv_heads, inner], [0, inner])?,
                beside: layer.positions.beside_index().map(|[of_read, of_index]| Beside {
                    index,
                    of_index,
                    of_read,
                }),
            },
            None => Positions::Given(index),
        };
        let projected = Projected {
            qkv: part(0, width)?,
            norms,
            positions,
            inverse: match layer.positions {
                LayerPositions::Nope => row(&self.still)?,
                _ => row(&self.inverse)?,
            },
            turned: match layer.positions {
                LayerPositions::Nope => 1.0,
                _ => self.turned,
            },
            gate,
        };
        let shape = [query_heads, columns, head_dim];
        cache.append_fused(i, projected, &mut memory::view_mut(queries, shape)?)?;
        let seen = memory::view(queries, 0, shape, [columns * head_dim, head_dim])?;
        let scale = (head_dim as f32).powf(-0.5);
        cache.attend(i, seen, scale, memory::view_mut(attended, shape)?, None)?;
        let input = Input {
            tensor: attended,
            run: head_dim,
            run_stride: columns * head_dim,
            column_stride: head_dim,
        };
        let next = self.ones.as_ref().unwrap_or(&layer.mlp_norm);
        self.add(&layer.output, [&layer.attention_norm, next], input, columns)
    }

    fn mlp(&self, layer: &Layer, norm: &Tensor, parts: usize, columns: usize) -> Result<()> {
        let Buffers { normed, squares, hidden, .. } = &self.buffers;
        self.kernels.product(Product {
            weight: &layer.gate_up,
            more: None,
            input: plain(normed, self.config.hidden_size),
            norm: self.factor(squares, parts),
            columns,
            end: End::Gated(hidden),
        })?;
        let input = plain(hidden, self.config.intermediate_size);
        self.add(&layer.down, [&layer.mlp_norm, norm], input, columns)
    }

    /// Adds `weight` times `input` to the residual stream, by the norm `own` where blocks norm what they write, and readies
    /// that for the norm `next`.
    fn add(
        &self,
        weight: &Linear,
        [own, next]: [&Tensor; 2],
        input: Input<'_>,
        columns: usize,
    ) -> Result<()> {
        let stream @ Stream { residual, normed, squares } = self.buffers.stream();
        let Buffers { written, best, .. } = &self.buffers;
        // Where it is not added at once: scores, of which none is the best.
        let apart = |scores| End::Score { scores, best, vocabulary: 0 };
        let end = match (&self.across, &self.ones) {
            (Some(across), _) => apart(&across.part),
            (None, Some(_)) => apart(written),
            (None, None) => End::Add { residual, norm: next, normed, squares },
        };
        self.kernels.product(Product { weight, more: None, input, norm: None, columns, end })?;
        if let Some(across) = &self.across {
            return across.add(stream, next, columns);
        }
        if self.ones.is_none() {
            return Ok(());
        }
        let (bias, epsilon) = (weight.bias.as_ref(), self.config.norm_epsilon as f32);
        self.kernels.add_normed(AddNormed { written, bias, own, next, stream, columns, epsilon })
    }

    /// The norm of what a block reads, if it norms that.
    fn factor<'a>(&self, squares: &'a Tensor, parts: usize) -> Option<Norm<'a>> {
        self.ones.is_none().then(|| self.norm_of(squares, parts))
    }

    fn norm_of<'a>(&self, squares: &'a Tensor, parts: usize) -> Norm<'a> {
        Norm { squares, parts, epsilon: self.config.norm_epsilon as f32 }
    }
}

/// Columns of `width` elements, one after the other.
fn plain(tensor: &Tensor, width: usize) -> Input<'_> {
    Input { tensor, run: width, run_stride: 0, column_stride: width }
}

/// A vector.
fn row(tensor: &Tensor) -> Result<DeviceView<'_>> {
    let width = tensor.numel();
    memory::view(tensor, 0, [1, 1, width], [width, width])
}

/// The maps that read positions, in bf16: as they came, and not rounded, for positions may be large.
fn position_maps(PositionMaps(module): &PositionMaps) -> Result<[Tensor; 2]> {
    let narrow = |map: &Linear| {
        let weight = map.weight.f_to_kind(Kind::BFloat16)?;
        if weight.f_to_kind(map.weight.kind())? != map.weight {
            return Err(Error::Step {
                what: "position maps that bf16 does not hold",
                advice: ADVICE,
            });
        }
        Ok(weight)
    };
    Ok([narrow(&module.gate_up)?, narrow(&module.down)?])
}

/// `gate` after the maps that read positions, if there are any; these have no bias.
fn follow(maps: Option<Linear>, gate: Linear) -> Result<Linear> {
    let Some(Linear { weight, .. }) = maps else { return Ok(gate) };
    let bias = Tensor::f_zeros([weight.size()[0]], (weight.kind(), weight.device()))?;
    Linear::joined(vec![Linear { weight, bias: Some(bias) }, gate])
}

/// The network whose step there is.
pub(super) fn decoder(model: &dyn CausalLm) -> Result<&Decoder> {
    let what = "network but the decoder";
    model.as_decoder().ok_or(Error::Step { what, advice: ADVICE })
}

const ADVICE: &str = "decode it through libtorch: CardCache and Session";

/// Says what of a model the graph doesn't have.
fn check(model: &Decoder) -> Result<()> {
    let Config { mlp_bias, hidden_size, intermediate_size, head_dim, .. } = &model.config;
    let wrong = |what| Err(Error::Step { what, advice: ADVICE });
    if model.embedding.kind() != Kind::BFloat16 {
        return wrong("weights that are not bf16");
    }
    if *mlp_bias {
        return wrong("biases in the MLP");
    }
    let maps = model.repo.iter().flatten().map(|maps| maps.0.down.weight.size()[1] as usize);
    let mut widths = maps.chain([*hidden_size, *intermediate_size, *head_dim]);
    if widths.any(|width| width % 8 != 0) {
        return wrong("widths that are not multiples of 8");
    }
    Ok(())
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Step")
            .field("places", &self.places)
            .field("graphs", &self.graphs.keys())
            .finish_non_exhaustive()
    }
}
