//! Who is compared: each scores a context, and each score is cut at each share.

use super::{Args, probes::Probe};
use anyhow::{Context, Result, bail};
use kvzap::{
    Allocation, ExpectedAttention, KeyDiff, Knorm, LayerInput, ObservedAttention, Policy, Random,
    Rule, Rules, Scorer, SnapKv, StreamingLlm, Surrogate, Threshold, TorchSurrogate, Tova, judged,
};
use models::{Dense, Hooks, Model, Pruning, kvzip};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Kind, Tensor};

type TorchScorer = Box<dyn Scorer<Tensor> + Send>;

/// A point to measure.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Its method's name in tables.
    pub method: String,
    /// The share to remove, 0 for the full cache, or a threshold below 0.
    pub asked: f64,
    /// Whose scores, and what cuts them.
    cut: Cut,
}

#[derive(Clone, Debug)]
enum Cut {
    Nothing,
    Share(Source, Allocation),
    Below(Source, Threshold),
}

/// Whose scores a cut looks at.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// One that scores in the pass which reads the context.
    Pass(usize),
    /// KVzip, or KVzip+ with 1.
    Oracle(usize),
}

/// All methods of a run.
pub struct Methods {
    recorder: Recorder,
    oracles: [bool; 2],
    variants: Vec<Variant>,
    r2: BTreeMap<String, f64>,
    window: usize,
    protect: usize,
}

impl Methods {
    /// Surrogates, oracles and baselines, those that `args` names or all.
    pub fn load(args: &Args, model: &Model) -> Result<Self> {
        let mut methods = Self {
            recorder: Recorder::default(),
            oracles: [false; 2],
            variants: vec![Variant { method: "full".to_owned(), asked: 0.0, cut: Cut::Nothing }],
            r2: BTreeMap::new(),
            window: args.window,
            protect: args.protect,
        };
        let mut known = Vec::new();
        let mut wanted = |name: &str| {
            known.push(name.to_owned());
            args.method.is_empty() || args.method.iter().any(|method| method == name)
        };
        for folder in &args.surrogate {
            let name = folder
                .file_name()
                .and_then(|name| name.to_str())
                .context("a surrogate is a folder")?;
            let surrogate = Surrogate::load(folder)?;
            let config = model.lm.config();
            surrogate.check(config.layers, config.hidden_size, config.kv_heads)?;
            if let Ok(text) = std::fs::read_to_string(folder.join("training.json")) {
                let training: serde_json::Value = serde_json::from_str(&text)?;
                methods.r2.extend(training["unseen_r2"].as_f64().map(|r2| (name.to_owned(), r2)));
            }
            if wanted(name) {
                let scorer = TorchSurrogate::new(&surrogate, model.kind, model.device)?;
                let source = methods.recorder.add(Box::new(scorer));
                methods.shares(args, name, source, Rule::Model, args.protect)?;
                if args.protect > 0 {
                    methods.shares(args, &format!("{name}, first free"), source, Rule::Model, 0)?;
                }
                for &threshold in &args.threshold {
                    let cut = Cut::Below(source, Threshold::new(threshold as f32)?);
                    methods.variants.push(Variant {
                        method: name.to_owned(),
                        asked: threshold,
                        cut,
                    });
                }
            }
        }
        for (plus, name) in ["KVzip", "KVzip+"].into_iter().enumerate() {
            if wanted(name) {
                methods.oracles[plus] = true;
                methods.shares(args, name, Source::Oracle(plus), Rule::Model, args.protect)?;
            }
        }
        let frequencies = model.lm.config().frequencies()?;
        let scorers: Vec<(&[(&str, Rule)], TorchScorer)> = vec![
            (&[("random", Rule::Head)], Box::new(Random::new(args.seed))),
            (&[("StreamingLLM", Rule::Head)], Box::new(StreamingLlm::new(args.protect))),
            (&[("Knorm", Rule::Head)], Box::new(Knorm)),
            (&[("KeyDiff", Rule::Head)], Box::new(KeyDiff)),
            (&[("TOVA", Rule::Head)], Box::new(Tova)),
            (&[("H2O", Rule::Head)], Box::new(ObservedAttention::sum())),
            (
                &[
                    ("SnapKV", Rule::Head),
                    ("PyramidKV", Rule::PyramidKv { beta: 20.0 }),
                    ("AdaKV SnapKV", Rule::AdaKv { safe: 0.2 }),
                ],
                Box::new(SnapKv::new()),
            ),
            (
                &[("AdaKV ExpectedAttention", Rule::AdaKv { safe: 0.2 })],
                Box::new(ExpectedAttention::new(frequencies.inverse(), model.device)?),
            ),
        ];
        for (rules, scorer) in scorers {
            let rules: Vec<_> = rules.iter().filter(|(name, _)| wanted(name)).collect();
            if !rules.is_empty() {
                let source = methods.recorder.add(scorer);
                for (name, rule) in rules {
                    methods.shares(args, name, source, *rule, args.protect)?;
                }
            }
        }
        match args.method.iter().find(|method| !known.contains(method)) {
            Some(method) => bail!("no method is called {method}; there are {}", known.join(", ")),
            None => Ok(methods),
        }
    }

    fn shares(
        &mut self,
        args: &Args,
        name: &str,
        source: Source,
        rule: Rule,
        protect: usize,
    ) -> Result<()> {
        for &share in &args.remove {
            let cut = Cut::Share(source, Allocation::new(share, args.window, protect, rule)?);
            self.variants.push(Variant { method: name.to_owned(), asked: share, cut });
        }
        Ok(())
    }

    /// The points to measure, the full cache first.
    pub fn variants(&self) -> &[Variant] {
        &self.variants
    }

    /// What the surrogates say of themselves: R² on text of unseen sources.
    pub fn r2(&self) -> BTreeMap<String, f64> {
        self.r2.clone()
    }

    /// Reads the context into `dense`, and says what each variant forgets of it: of each layer `[V, kv_heads, tokens]`.
    pub fn drops(&self, model: &Model, probe: &Probe, dense: &mut Dense) -> Result<Vec<Tensor>> {
        let ids: Vec<i64> = probe.context.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(model.device)?.f_unsqueeze(0)?;
        let hooks = Hooks::pruning(Pruning {
            scorer: Box::new(self.recorder.clone()),
            policy: Box::new(Threshold::new(f32::NEG_INFINITY)?),
            while_decoding: true,
        });
        let _ = model.lm.forward(&ids, dense, &hooks)?;
        let recorded = self.recorder.take();
        let oracle = |plus: usize| -> Result<Vec<Tensor>> {
            if !self.oracles[plus] {
                return Ok(Vec::new());
            }
            let rules = Rules::default();
            Ok(kvzip(model, &probe.context, probe.prefix, plus == 1, rules, &mut |_, _| {})?)
        };
        let oracles = [oracle(0)?, oracle(1)?];
        let scores = |source: &Source| match *source {
            Source::Pass(index) => &recorded[index],
            Source::Oracle(plus) => &oracles[plus],
        };
        let layers = model.lm.config().layers;
        let mut drops: Vec<Vec<Tensor>> = (0..layers).map(|_| Vec::new()).collect();
        for variant in &self.variants {
            let cut = match &variant.cut {
                Cut::Nothing => {
                    dense.rows()?.iter().map(|(keys, _)| none(keys)).collect::<Result<Vec<_>>>()?
                }
                Cut::Share(source, allocation) => allocation.drops(scores(source))?,
                Cut::Below(source, threshold) => scores(source)
                    .iter()
                    .map(|scores| self.below(threshold, scores))
                    .collect::<Result<_>>()?,
            };
            for (drops, cut) in drops.iter_mut().zip(cut) {
                drops.push(cut);
            }
        }
        drops.iter().map(|drops| Ok(Tensor::f_cat(drops, 0)?)).collect()
    }

    fn below(&self, threshold: &Threshold, scores: &Tensor) -> Result<Tensor> {
        let drops = threshold.drops(scores)?;
        let tokens = scores.size()[2];
        let old = judged(tokens as usize, self.window).end as i64;
        let _ = drops.f_narrow(2, old, tokens - old)?.f_zero_()?;
        let _ = drops.f_narrow(2, 0, tokens.min(self.protect as i64))?.f_zero_()?;
        Ok(drops)
    }
}

/// No drop bits, for keys `[1, kv_heads, tokens, head_dim]`.
fn none(keys: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_zeros(&keys.size()[..3], (Kind::Bool, keys.device()))?)
}

/// Lets several scorers look at one pass, and keeps what each says. Clones share it.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Recorded>>>);

/// A scorer, and its scores layer by layer.
struct Recorded {
    scorer: TorchScorer,
    scores: Vec<Tensor>,
}

impl Recorder {
    fn add(&self, scorer: TorchScorer) -> Source {
        let mut recorded = self.recorded();
        recorded.push(Recorded { scorer, scores: Vec::new() });
        Source::Pass(recorded.len() - 1)
    }

    /// The scores of each scorer since the last call.
    fn take(&self) -> Vec<Vec<Tensor>> {
        self.recorded().iter_mut().map(|one| std::mem::take(&mut one.scores)).collect()
    }

    fn recorded(&self) -> MutexGuard<'_, Vec<Recorded>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scorer<Tensor> for Recorder {
    fn score(&self, input: LayerInput<'_, Tensor>) -> kvzap::Result<Tensor> {
        for one in self.recorded().iter_mut() {
            one.scores.push(one.scorer.score(input)?);
        }
        let (batch, heads, tokens, _) = input.keys.size4()?;
        let float = (Kind::Float, input.keys.device());
        Ok(Tensor::f_full([batch, heads, tokens], f64::INFINITY, float)?)
    }
}
