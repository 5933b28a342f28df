use super::samples::Rows;
use crate::baselines::random::mix;
use crate::oracle::kvzip_plus_of;
use crate::torch::dims;
use crate::{Error, LayerInput, Result, Scorer, Spans};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Device, Kind, Tensor};

/// Makes a plain forward pass a training pass: a [`Scorer`] that keeps hidden states and [`kvzip_plus`](crate::kvzip_plus) scores of each
/// layer, and returns +inf, so that nothing is forgotten.
///
/// Clones share what they gather: give one to the model, and keep one to call
/// [`begin`](Self::begin) before each text and [`take`](Self::take) after the last.
#[derive(Clone, Debug)]
pub struct Collector(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    output_projections: Vec<Tensor>,
    rows: usize,
    text: Option<(Spans, Tensor)>, // and which tokens of the original to learn from
    gathered: Vec<(Vec<Tensor>, Vec<Tensor>)>, // of each layer, text by text
    attended: Option<Tensor>,
}

impl Collector {
    /// For a model with these `output_projections`, one `[hidden, query_heads * head_dim]` for each
    /// layer. Of each text it learns from `rows` tokens, or from all if there are fewer.
    pub fn new(output_projections: Vec<Tensor>, rows: usize) -> Self {
        let gathered = output_projections.iter().map(|_| Default::default()).collect();
        let (text, attended) = (None, None);
        Self(Arc::new(Mutex::new(Inner { output_projections, rows, text, gathered, attended })))
    }

    /// Announces the next forward pass: sequences of one length, whole, with their texts at `spans`. `seed`
    /// chooses the tokens to learn from, the same in all layers and sequences.
    pub fn begin(&self, spans: Spans, seed: u64) -> Result<()> {
        let mut inner = self.inner();
        let device = inner.output_projections.first().map_or(Device::Cpu, Tensor::device);
        let tokens = choose(spans.original.len(), inner.rows, seed);
        let tokens = Tensor::f_from_slice(&tokens)?.f_to_device(device)?;
        inner.text = Some((spans, tokens));
        Ok(())
    }

    /// Causal attention over the tokens of the layer that was just scored, `[batch, query_heads, tokens, head_dim]`, where it was
    /// made for the scores: the model need not make it again.
    pub fn attended(&self) -> Option<Tensor> {
        self.inner().attended.take()
    }

    /// What was gathered since the last call, on the model's device.
    ///
    /// # Errors
    /// [`Error::NoRows`] for a layer that saw nothing.
    pub fn take(&self) -> Result<Rows> {
        let mut inner = self.inner();
        let gathered = inner.gathered.iter_mut().map(std::mem::take).enumerate();
        let rows = gathered.map(|(layer, (hidden, scores))| {
            if hidden.is_empty() {
                return Err(Error::NoRows { layer });
            }
            Ok((Tensor::f_cat(&hidden, 0)?, Tensor::f_cat(&scores, 0)?))
        });
        rows.collect()
    }

    /// Nothing is half-done when a holder panics: what a layer adds is added last.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scorer<Tensor> for Collector {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let inner = &mut *self.inner();
        let (spans, tokens) = inner.text.as_ref().ok_or(Error::NoText)?;
        let (layer, layers) = (input.layer, inner.output_projections.len());
        let projection =
            inner.output_projections.get(layer).ok_or(Error::Layer { layer, layers })?;
        let some = |original: Tensor| Ok(original.f_index_select(2, tokens)?);
        let (scores, attended) = kvzip_plus_of(input, projection, spans, &some)?; // [batch, kv_heads, some]
        let targets = scores.f_transpose(1, 2)?.f_flatten(0, 1)?;
        let rows = tokens.f_add_scalar(spans.original.start as i64)?;
        let hidden = input.hidden.f_index_select(1, &rows)?.f_flatten(0, 1)?;
        let (all_hidden, all_scores) = &mut inner.gathered[layer];
        all_hidden.push(hidden);
        all_scores.push(targets);
        inner.attended = attended;
        let [batch, heads, total, _] =
            dims(input.keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
        Ok(Tensor::f_full([batch, heads, total], f64::INFINITY, (Kind::Float, scores.device()))?)
    }
}

/// `rows` of `0..tokens` without repetition, in order.
fn choose(tokens: usize, rows: usize, seed: u64) -> Vec<i64> {
    let mut order: Vec<i64> = (0..tokens as i64).collect();
    order.sort_by_key(|&token| mix(mix(seed) ^ token as u64));
    order.truncate(rows);
    order.sort_unstable();
    order
}
