use super::{Pass, Rules};
use crate::attention::Attention;
use crate::oracle::projected_norms;
use crate::torch::{dims, expect};
use crate::{Error, LayerInput, Result, Scorer};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Kind, Tensor};

/// The oracle that KVzap imitates, as a press: KVzip (arXiv 2505.23416) and KVzip+ (arXiv
/// 2601.07891, section 3).
///
/// A token's score for a kv head is the largest attention that any query head of its group pays it
/// in any row of the pass that repeats its chunk; for KVzip+ each attention is first multiplied by
/// `|W_O v|` of its query head and divided by the norm of the row's hidden state. The softmax runs
/// over the first tokens, the chunk and the pass itself, not over the whole context.
///
/// It is a [`Scorer`] for the passes of [`Rules::passes`], which follow a pass over the context in
/// which nothing is scored. Clones share what they gather: give one to the model, and keep one to
/// say what comes.
///
/// ```text
/// the model reads the context
/// context(layer, keys, values)       for each layer
/// for each pass: begin(pass), and the model reads pass.ids; forget what it cached
/// scores()
/// ```
///
/// In f32, a block of rows at a time: beside the context's keys and values, which are the cache's
/// own, at most the softmax of a few rows is alive. kvpress holds that of a whole pass, in the
/// model's dtype.
#[derive(Clone, Debug)]
pub struct Kvzip(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    rules: Rules,
    prefix: usize,
    output_projections: Option<Vec<Tensor>>, // of KVzip+
    layers: Vec<Context>,
    chunk: Range<usize>,
}

/// One layer's part of the context.
#[derive(Debug)]
struct Context {
    keys: Tensor,   // [1, kv_heads, tokens, head_dim]
    values: Tensor, // [1, kv_heads, tokens, head_dim]
    scores: Tensor, // [1, kv_heads, tokens] f32
}

impl Kvzip {
    /// KVzip, for a context whose first `prefix` tokens are the chat template's.
    pub fn new(rules: Rules, prefix: usize) -> Self {
        let (output_projections, layers) = (None, Vec::new());
        Self(Arc::new(Mutex::new(Inner { rules, prefix, output_projections, layers, chunk: 0..0 })))
    }

    /// KVzip+, for a model with these `output_projections`, one `[hidden, query_heads * head_dim]`
    /// for each layer.
    pub fn plus(rules: Rules, prefix: usize, output_projections: Vec<Tensor>) -> Self {
        let kvzip = Self::new(rules, prefix);
        kvzip.inner().output_projections = Some(output_projections);
        kvzip
    }

    /// What the cache holds of the context in the next layer, the first first: `keys` and `values`
    /// `[1, kv_heads, tokens, head_dim]`. They are kept, not copied.
    pub fn context(&self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let [_, heads, tokens, dim] = dims(keys, "keys", "[1, kv_heads, tokens, head_dim]")?;
        expect(keys, "keys", &[1, heads, tokens, dim])?;
        expect(values, "values", &[1, heads, tokens, dim])?;
        let scores = Tensor::f_zeros([1, heads, tokens], (Kind::Float, keys.device()))?;
        let (keys, values) = (keys.shallow_clone(), values.shallow_clone());
        self.inner().layers.push(Context { keys, values, scores });
        Ok(())
    }

    /// Announces the next pass.
    pub fn begin(&self, pass: &Pass) {
        self.inner().chunk = pass.chunk.clone();
    }

    /// The scores, `[1, kv_heads, tokens]` f32 for each layer. What stays in any case has +inf: the
    /// prefix, or under [`Rules::kvpress`] the first four tokens of the text.
    pub fn scores(&self) -> Result<Vec<Tensor>> {
        let inner = self.inner();
        let stays = if inner.rules.keep_prefix { inner.prefix } else { 4 };
        let scores = |layer: &Context| -> Result<Tensor> {
            let scores = layer.scores.f_detach_copy()?;
            let stays = scores.size()[2].min(stays as i64);
            let _ = scores.f_narrow(2, 0, stays)?.f_fill_(f64::INFINITY)?;
            Ok(scores)
        };
        inner.layers.iter().map(scores).collect()
    }

    /// Nothing is half-done when a holder panics: a chunk's scores are written last.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scorer<Tensor> for Kvzip {
    /// Scores the chunk that this pass repeats; of the pass itself nothing goes, +inf.
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let inner = self.inner();
        let [batch, heads, rows, dim] =
            dims(input.keys, "keys", "[1, kv_heads, tokens, head_dim]")?;
        let (layer, layers) = (input.layer, inner.layers.len());
        let context = inner.layers.get(layer).ok_or(Error::Layer { layer, layers })?;
        let tokens = context.scores.size()[2];
        expect(&context.keys, "keys of the context", &[batch, heads, tokens, dim])?;
        let (first, last) = (inner.chunk.start as i64, inner.chunk.end as i64);
        if first >= last || last > tokens {
            let chunk = inner.chunk.clone();
            return Err(Error::Chunk { chunk, tokens: tokens as usize });
        }
        let sinks = inner.rules.sinks.map_or(inner.prefix as i64, |sinks| first.min(sinks as i64));
        let part = |first, end: i64| context.keys.f_narrow(2, first, end - first);
        let keys = [part(0, sinks)?, part(first, last)?, input.keys.shallow_clone()];
        let attention = Attention::new(input.queries, &Tensor::f_cat(&keys, 2)?)?;

        let hidden = match &inner.output_projections {
            None => None,
            Some(_) => {
                let [_, _, width] = dims(input.hidden, "hidden", "[1, tokens, hidden]")?;
                expect(input.hidden, "hidden", &[1, rows, width])?;
                let hidden = input.hidden.f_squeeze_dim(0)?.f_to_kind(Kind::Float)?;
                let norms = hidden.f_norm_scalaropt_dim(2, [-1].as_slice(), true)?; // [rows, 1]
                Some(norms.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)
            }
        };
        let mut best: Option<Tensor> = None; // [kv_heads, group, chunk]
        for rows in attention.blocks() {
            let (start, count) = (rows.start, rows.end - rows.start);
            let mut weights = attention.weights(rows)?.f_narrow(3, sinks, last - first)?;
            if let Some(hidden) = &hidden {
                weights = weights.f_div(&hidden.f_narrow(0, start, count)?)?;
            }
            let most = weights.f_amax([2], false)?;
            best = Some(match best {
                Some(best) => best.f_maximum(&most)?,
                None => most,
            });
        }
        if let (Some(projections), Some(most)) = (&inner.output_projections, &best) {
            let projection = projections.get(layer).ok_or(Error::Layer { layer, layers })?;
            let (width, group) = (input.hidden.size()[2], most.size()[1]);
            expect(projection, "output_projection", &[width, heads * group * dim])?;
            let values = context.values.f_squeeze_dim(0)?.f_narrow(1, first, last - first)?;
            best = Some(most.f_mul(&projected_norms(&values, projection, group)?.f_exp()?)?);
        }
        if let Some(best) = best {
            let scores = context.scores.f_narrow(2, first, last - first)?;
            scores.f_squeeze_dim(0)?.f_copy_(&best.f_amax([1], false)?)?;
        }
        Ok(Tensor::f_full([batch, heads, rows], f64::INFINITY, (Kind::Float, input.keys.device()))?)
    }
}
