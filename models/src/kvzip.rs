//! The passes of KVzip: a context, then each of its chunks repeated.

use crate::cache::{KvCache, Usage, causal};
use crate::causal_lm::CausalLm;
use crate::error::{Error, Result};
use crate::hooks::{Hooks, Pruning};
use crate::model::Model;
use crate::tokenizer::Specials;
use kvzap::{Kvzip, Pass, Rules, Threshold};
use tch::{Device, Kind, Tensor};

/// The KVzip scores of `context`, `[1, kv_heads, context]` f32 for each layer, on the model's device; KVzip+ with `plus`.
///
/// `context` is what a run would prefill, its first `prefix` ids what the chat template puts before the user's text. It
/// is read once, then repeated chunk by chunk: some two to three times the work of a prefill. `each` is told how many
/// passes are done, and of how many.
pub fn kvzip(
    model: &Model,
    context: &[u32],
    prefix: usize,
    plus: bool,
    rules: Rules,
    each: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Tensor>> {
    let after = match &model.template {
        Some(template) => template.around("")?.1,
        None => "\n".to_owned(),
    };
    let encode = |text: &str| model.tokenizer.encode(text, Specials::Parse);
    let [first, next] = rules.instructions;
    let passes = rules.passes(context, prefix, [&encode(first)?, &encode(next)?], &encode(&after)?);
    let lm = model.lm.as_ref();
    let kvzip = if plus {
        let layers = 0..lm.config().layers;
        let projections = layers.map(|layer| lm.output_projection(layer).shallow_clone());
        Kvzip::plus(rules, prefix, projections.collect())
    } else {
        Kvzip::new(rules, prefix)
    };
    kvzip_passes(lm, model.device, context, &passes, &kvzip, each)?;
    Ok(kvzip.scores()?)
}

/// Reads `context` and then each of `passes` after it, as `kvzip` asks for: [`kvzip`](fn@kvzip) on token ids alone.
pub fn kvzip_passes(
    lm: &dyn CausalLm,
    device: Device,
    context: &[u32],
    passes: &[Pass],
    kvzip: &Kvzip,
    each: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    let config = lm.config();
    let longest = passes.iter().map(|pass| pass.ids.len()).max().unwrap_or(0);
    if context.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let wanted = context.len() + longest;
    if wanted > config.max_positions {
        return Err(Error::ContextTooLong { wanted, limit: config.max_positions });
    }
    let input = |ids: &[u32]| -> Result<Tensor> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(Error::UnknownToken { id, vocabulary: config.vocab_size });
        }
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        Ok(Tensor::f_from_slice(&ids)?.f_to_device(device)?.f_unsqueeze(0)?)
    };
    let mut cache = Context::default();
    let _ = lm.forward(&input(context)?, &mut cache, &Hooks::default())?;
    for (keys, values) in &cache.layers {
        kvzip.context(keys, values)?;
    }
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(kvzip.clone()),
        policy: Box::new(Threshold::new(f32::NEG_INFINITY)?),
        while_decoding: true,
    });
    for (done, pass) in passes.iter().enumerate() {
        each(done, passes.len());
        kvzip.begin(pass);
        let _ = lm.forward(&input(&pass.ids)?, &mut cache, &hooks)?;
    }
    each(passes.len(), passes.len());
    Ok(())
}

/// The cache of a context that several passes follow, each right after it: the first pass stays, of later ones a layer
/// is forgotten as soon as it has attended.
#[derive(Debug, Default)]
struct Context {
    tokens: usize,
    layers: Vec<(Tensor, Tensor)>, // keys and values, [1, kv_heads, tokens, head_dim]
}

impl KvCache for Context {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn window(&self) -> usize {
        0
    }

    fn begin(&mut self, tokens: usize) -> Result<()> {
        if self.tokens == 0 {
            self.tokens = tokens;
        }
        Ok(())
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        _drops: Option<&Tensor>,
    ) -> Result<Tensor> {
        const LOGITS: i64 = 1 << 26; // at a time, where libtorch has no kernel that streams
        let Some((before, values_before)) = self.layers.get(layer) else {
            self.layers.push((keys.f_contiguous()?, values.f_contiguous()?));
            return causal(queries, keys, values);
        };
        let keys = Tensor::f_cat(&[before, keys], 2)?;
        let values = Tensor::f_cat(&[values_before, values], 2)?;
        let (_, heads, rows, _) = queries.size4()?;
        let past = self.tokens as i64;
        let block = (LOGITS / (heads * (past + rows))).max(1);
        let mut mixed = Vec::new();
        for start in (0..rows).step_by(block as usize) {
            let count = block.min(rows - start);
            let seen = past + start + count;
            let up_to_itself =
                Tensor::f_ones([count, seen], (Kind::Bool, keys.device()))?.f_tril(past + start)?;
            mixed.push(Tensor::f_scaled_dot_product_attention(
                &queries.f_narrow(2, start, count)?,
                &keys.f_narrow(2, 0, seen)?,
                &values.f_narrow(2, 0, seen)?,
                Some(&up_to_itself),
                0.0,
                false,
                None,
                true,
            )?);
        }
        Ok(Tensor::f_cat(&mixed, 2)?)
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }

    fn mark(&mut self) -> Result<()> {
        Ok(())
    }

    fn rewind(&mut self) -> Result<()> {
        Ok(())
    }
}
