//! A step of one token for each text of a batch, as a graph.

use super::driver::{
    self, Draw, Draws, Embed, End, Input, Kernels, MOST_COLUMNS, Norm, PARTS, Product, ROWS, Stream,
};
use super::memory::{self, Mailbox};
use super::ranks::Across;
use crate::config::{Architecture, Config};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::layers::Linear;
use crate::positions::LayerPositions;
use crate::sampling::Sampling;
use cudarc::driver::CudaGraph;
use kvzap::TorchSurrogate;
use paged_kernels::{
    DeviceView, Gate, HeadNorms, Projected, Resident, ScorePrecision, ScoreRule, Sequence,
};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// What judges the tokens of a step: a surrogate whose first layer runs with the projections.
#[derive(Debug)]
pub struct Gates {
    /// Of each layer, the two maps, bf16 on the card.
    pub maps: Vec<[(Tensor, Tensor); 2]>,
    /// Of each layer: tokens that score less go.
    pub thresholds: Vec<f32>,
}

impl Gates {
    /// The maps of `surrogate`, which must be an MLP in bf16 on the card, with a threshold for each layer.
    ///
    /// # Errors
    /// [`Error::Step`] for a linear surrogate.
    pub fn new(surrogate: &TorchSurrogate, thresholds: Vec<f32>) -> Result<Self> {
        let two = |maps: &Vec<(Tensor, Tensor)>| match &maps[..] {
            [first, second] => {
                Ok([first, second].map(|(w, b)| (w.shallow_clone(), b.shallow_clone())))
            }
            _ => Err(Error::Step { what: "a linear surrogate", advice: "take an MLP" }),
        };
        let maps = surrogate.modules().iter().map(two).collect::<Result<Vec<_>>>()?;
        Ok(Self { maps, thresholds })
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
    gate: Option<LayerGate>,
    output: Linear,
    mlp_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

struct LayerGate {
    first: Linear,
    second: Tensor,
    bias: Tensor,
    rule: ScoreRule,
}

/// What the kernels hand to each other; addresses never change.
struct Buffers {
    tokens: Tensor,
    positions: Tensor,
    residual: Tensor,
    normed: Tensor,
    squares: Tensor,
    projected: Tensor,
    queries: Tensor,
    attended: Tensor,
    hidden: Tensor,
    scores: Tensor,
    best: Tensor,
    draws: Draws,
    from: Tensor,
    fresh: Tensor,
}

impl Buffers {
    fn new(config: &Config, columns: usize, projected: usize, device: tch::Device) -> Result<Self> {
        let room = |width: usize, kind| Tensor::f_zeros([(columns * width) as i64], (kind, device));
        let (width, queries) = (config.hidden_size, config.query_heads * config.head_dim);
        let bf16 = Kind::BFloat16;
        Ok(Self {
            tokens: room(1, Kind::Int)?,
            positions: room(1, Kind::Float)?,
            residual: room(width, Kind::Float)?,
            normed: room(width, bf16)?,
            squares: room(width.div_ceil(ROWS) * PARTS, Kind::Float)?,
            projected: room(projected, bf16)?,
            queries: room(queries, bf16)?,
            attended: room(queries, bf16)?,
            hidden: room(config.intermediate_size, bf16)?,
            scores: room(config.vocab_size, Kind::Float)?,
            best: room(1, Kind::Int64)?,
            draws: Draws {
                temperatures: room(1, Kind::Float)?,
                tops: room(1, Kind::Int)?,
                nuclei: room(1, Kind::Float)?,
                randoms: room(1, Kind::Double)?,
            },
            from: room(1, Kind::Int)?,
            fresh: room(1, Kind::Int)?,
        })
    }

    fn stream(&self) -> Stream<'_> {
        let Self { residual, normed, squares, .. } = self;
        Stream { residual, normed, squares }
    }
}

impl Step {
    /// The step of `model`, which lies on the card of `cache` in bf16. Tokens from `vocabulary` on are never chosen.
    ///
    /// # Errors
    /// [`Error::Step`] for what the graph doesn't have: another dtype, norms over what is written (OLMo 2), learned
    /// positions, YaRN's factor, biases in the MLP.
    pub fn new(
        model: &Decoder,
        gates: Option<&Gates>,
        cache: &Resident,
        vocabulary: usize,
    ) -> Result<Self> {
        let config = model.config.clone();
        check(model)?;
        let columns = cache.seats().texts.min(MOST_COLUMNS);
        let layers = model.blocks.iter().enumerate();
        let layers = layers.map(|(i, block)| {
            let gate = gates.map(|gates| {
                let [(weight, bias), (second, second_bias)] = &gates.maps[i];
                let (weight, bias) = (weight.shallow_clone(), Some(bias.shallow_clone()));
                let precision = ScorePrecision::MatchTorchBf16;
                LayerGate {
                    first: Linear { weight, bias },
                    second: second.shallow_clone(),
                    bias: second_bias.shallow_clone(),
                    rule: ScoreRule { threshold: gates.thresholds[i], precision },
                }
            });
            Layer {
                attention_norm: block.attention_norm.weight.shallow_clone(),
                qkv: block.qkv.shallow_clone(),
                qk_norms: block
                    .qk_norms
                    .as_ref()
                    .map(|norms| norms.each_ref().map(|norm| norm.weight.shallow_clone())),
                gate,
                output: block.output.shallow_clone(),
                mlp_norm: block.mlp_norm.weight.shallow_clone(),
                gate_up: block.mlp.gate_up.shallow_clone(),
                down: block.mlp.down.shallow_clone(),
            }
        });
        let layers = layers.collect::<Vec<_>>();
        let rows = |linear: &Linear| linear.weight.size()[0] as usize;
        let projected = layers.iter().map(|layer| {
            rows(&layer.qkv) + layer.gate.as_ref().map_or(0, |gate| rows(&gate.first))
        });
        let device = model.embedding.device();
        let buffers = Buffers::new(&config, columns, projected.max().unwrap_or(0), device)?;
        let inverse = Tensor::f_from_slice(model.frequencies.inverse())?.f_to_device(device)?;
        let step = Self {
            kernels: Kernels::load(cache.stream().clone())?,
            layers,
            embedding: model.embedding.shallow_clone(),
            norm: model.norm.weight.shallow_clone(),
            head: Linear { weight: model.head.shallow_clone(), bias: None },
            inverse,
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
            norm: &self.layers[0].attention_norm,
            stream: self.buffers.stream(),
            columns,
        })?;
        let mut parts = PARTS;
        for (i, layer) in self.layers.iter().enumerate() {
            self.attention(cache, i, parts, columns)?;
            parts = self.across.as_ref().map_or(hidden_size.div_ceil(ROWS), |_| 1) * PARTS;
            let next = self.layers.get(i + 1).map_or(&self.norm, |next| &next.attention_norm);
            self.mlp(layer, next, parts, columns)?;
        }
        let vocabulary = self.vocabulary;
        self.kernels.product(Product {
            weight: &self.head,
            more: None,
            input: plain(&self.buffers.normed, hidden_size),
            norm: Some(self.factor(squares, parts)),
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
        let first = layer.gate.as_ref().map(|gate| &gate.first);
        self.kernels.product(Product {
            weight: &layer.qkv,
            more: first,
            input: plain(normed, hidden_size),
            norm: Some(self.factor(squares, parts)),
            columns,
            end: End::Store(projected),
        })?;
        let width = (query_heads + 2 * kv_heads) * head_dim;
        let units = first.map_or(0, |first| first.weight.size()[0] as usize);
        let stride = width + units;
        let part = |from, width| memory::view(projected, from, [1, columns, width], [0, stride]);
        let norms = match &layer.qk_norms {
            Some([query, key]) => Some(HeadNorms {
                query: row(query)?,
                key: row(key)?,
                epsilon: self.config.norm_epsilon as f32,
            }),
            None => None,
        };
        let gate = match &layer.gate {
            Some(gate) => Some(Gate {
                units: part(width, units)?,
                second: memory::view(&gate.second, 0, [1, kv_heads, units], [0, units])?,
                bias: row(&gate.bias)?,
                rule: gate.rule,
            }),
            None => None,
        };
        let projected = Projected {
            qkv: part(0, width)?,
            norms,
            positions: memory::view(positions, 0, [1, columns, 1], [columns, 1])?,
            inverse: row(&self.inverse)?,
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
        self.add(&layer.output, &layer.mlp_norm, input, columns)
    }

    fn mlp(&self, layer: &Layer, norm: &Tensor, parts: usize, columns: usize) -> Result<()> {
        let Buffers { normed, squares, hidden, .. } = &self.buffers;
        self.kernels.product(Product {
            weight: &layer.gate_up,
            more: None,
            input: plain(normed, self.config.hidden_size),
            norm: Some(self.factor(squares, parts)),
            columns,
            end: End::Gated(hidden),
        })?;
        let input = plain(hidden, self.config.intermediate_size);
        self.add(&layer.down, norm, input, columns)
    }

    /// Adds `weight` times `input` to the residual stream, and readies that for `norm`.
    fn add(&self, weight: &Linear, norm: &Tensor, input: Input<'_>, columns: usize) -> Result<()> {
        if let Some(across) = &self.across {
            // Scores, of which none is the best.
            let end = End::Score { scores: &across.part, best: &self.buffers.best, vocabulary: 0 };
            let product = Product { weight, more: None, input, norm: None, columns, end };
            self.kernels.product(product)?;
            return across.add(self.buffers.stream(), norm, columns);
        }
        let Stream { residual, normed, squares } = self.buffers.stream();
        let end = End::Add { residual, norm, normed, squares };
        self.kernels.product(Product { weight, more: None, input, norm: None, columns, end })
    }

    fn factor<'a>(&self, squares: &'a Tensor, parts: usize) -> Norm<'a> {
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

/// Says what of a model the graph doesn't have.
fn check(model: &Decoder) -> Result<()> {
    let Config {
        architecture, positions, mlp_bias, hidden_size, intermediate_size, head_dim, ..
    } = &model.config;
    let advice = "decode it through libtorch: CardCache and Session";
    let wrong = |what| Err(Error::Step { what, advice });
    if model.embedding.kind() != Kind::BFloat16 {
        return wrong("weights that are not bf16");
    }
    if *architecture == Architecture::Olmo2 {
        return wrong("norms of what attention and MLP write");
    }
    if positions.iter().any(|position| !matches!(position, LayerPositions::Rope)) {
        return wrong("learned positions, or layers without any");
    }
    if model.frequencies.scale() != 1.0 {
        return wrong("rotations that scale, as YaRN's do");
    }
    if *mlp_bias {
        return wrong("biases in the MLP");
    }
    if [hidden_size, intermediate_size, head_dim].iter().any(|&&width| width % 8 != 0) {
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
