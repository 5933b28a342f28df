//! The KVzip+ target through a whole model, against tests/golden/kvzap/target.py.

mod common;

use anyhow::Result;
use common::{assert_close, get, golden, tensors};
use kvzap::{LayerInput, Scorer, Spans, Threshold, kvzip_plus};
use models::{CausalLm, Decoder, Dense, Hooks, Pruning, WINDOW, Weights, open};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

/// Keeps each layer's target and forgets nothing.
struct Oracle {
    projections: Vec<Tensor>,
    spans: Spans,
    targets: Arc<Mutex<Vec<Tensor>>>,
}

impl Scorer<Tensor> for Oracle {
    fn score(&self, input: LayerInput<'_, Tensor>) -> kvzap::Result<Tensor> {
        let target = kvzip_plus(input, &self.projections[input.layer], &self.spans)?;
        self.targets.lock().expect("no test panicked").push(target.squeeze_dim(0));
        let (_, heads, tokens, _) = input.keys.size4()?;
        Ok(Tensor::full([1, heads, tokens], f64::INFINITY, (Kind::Float, Device::Cpu)))
    }
}

#[test]
fn the_training_target_is_that_of_the_paper_in_every_layer() -> Result<()> {
    let wanted = tensors("kvzap/target.safetensors")?;
    let span = |name| -> Result<Range<usize>> {
        let ends = Vec::<i64>::try_from(get(&wanted, name)?)?;
        Ok(ends[0] as usize..ends[1] as usize)
    };
    let weights = Weights::new(open(&golden("kvzap/model"))?, Kind::Float, Device::Cpu)?;
    let lm = Decoder::load(&weights)?;
    let targets = Arc::new(Mutex::new(Vec::new()));
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(Oracle {
            projections: (0..lm.config().layers)
                .map(|layer| lm.output_projection(layer).shallow_clone())
                .collect(),
            spans: Spans { original: span("original")?, repeat: span("repeat")? },
            targets: targets.clone(),
        }),
        policy: Box::new(Threshold::new(f32::NEG_INFINITY)?),
        while_decoding: true,
    });
    let mut cache = Dense::new(lm.config().layers, WINDOW);
    let _ = lm.forward(&get(&wanted, "ids")?.unsqueeze(0), &mut cache, &hooks)?;
    let targets = Tensor::stack(&targets.lock().expect("no test panicked"), 0);
    assert_close(&targets, get(&wanted, "log_target")?, 1e-4, "log targets");
    Ok(())
}
