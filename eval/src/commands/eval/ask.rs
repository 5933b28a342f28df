//! Every sample to every method that lacks its answer: a context is read once for all of them.

use super::{Args, Run, temperature, while_decoding};
use crate::commands::progress;
use crate::metrics::percent;
use crate::suite::{Group, Suite};
use crate::tasks::ruler::TooShort;
use crate::together::{IN_FLIGHT, MOST_TEXTS};
use crate::{Answer, Asked, Method, Sample, Together};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use kvzap::Surrogate;
use models::{Model, Sampling};

/// Answers all groups of the shard with every method; says which tasks do not fit their length.
pub fn ask(
    args: &Args,
    suite: &Suite<'_>,
    groups: &[Group],
    runs: &mut [Run],
    model: &Model,
    surrogate: Option<&Surrogate>,
) -> Result<Vec<(usize, TooShort)>> {
    let mine: Vec<&Group> = Suite::shard(groups, args.shard).collect();
    let lacks =
        |run: &Run| mine.iter().map(|group| suite.lacks(group, &run.journal).len()).sum::<usize>();
    let bar = progress(runs.iter().map(lacks).sum::<usize>() as u64, suite.dataset.clone());
    let mut scores: Vec<Vec<f64>> = vec![Vec::new(); runs.len()];
    let mut refused: Vec<(usize, TooShort)> = Vec::new();
    let asking = Asking { args, suite, model, surrogate, bar: &bar };
    for group in mine {
        if refused.iter().any(|(task, _)| *task == group.task) {
            continue;
        }
        let task = suite.tasks[group.task].name();
        if let Err(error) = asking.group(group, runs, &mut scores) {
            let short: TooShort = error.downcast()?;
            runs.iter_mut().try_for_each(|run| run.journal.refuse(task, short.needed))?;
            refused.push((group.task, short));
            bar.suspend(|| eprintln!("note: {task} is left out: it {short}"));
        }
        let score = |scores: &Vec<f64>| format!("{:.1}", percent(scores.iter().copied()));
        let running: Vec<String> = scores.iter().map(score).collect();
        bar.set_message(format!("{task} {}", running.join(" ")));
    }
    bar.finish_and_clear();
    Ok(refused)
}

struct Asking<'a> {
    args: &'a Args,
    suite: &'a Suite<'a>,
    model: &'a Model,
    surrogate: Option<&'a Surrogate>,
    bar: &'a ProgressBar,
}

impl Asking<'_> {
    /// Samples of one context: the answers to some are in the journals before the next are asked.
    fn group(&self, group: &Group, runs: &mut [Run], scores: &mut [Vec<f64>]) -> Result<()> {
        let Self { args, suite, model, .. } = *self;
        let task = &suite.tasks[group.task];
        let lacks: Vec<Vec<u64>> =
            runs.iter().map(|run| suite.lacks(group, &run.journal)).collect();
        let behind: Vec<usize> = (0..runs.len()).filter(|&run| !lacks[run].is_empty()).collect();
        let mut samples = Vec::new();
        for &index in &group.indices {
            let whose: Vec<usize> =
                (0..behind.len()).filter(|&at| lacks[behind[at]].contains(&index)).collect();
            if !whose.is_empty() {
                samples.push(Wanted { index, sample: task.sample(index)?, whose });
            }
        }
        let Some(Wanted { index, sample, .. }) = samples.first() else { return Ok(()) };
        let named = |index: u64| format!("{} sample {index}", task.name());
        let own = if sample.max_new_tokens > 0 { sample.max_new_tokens } else { 64 };
        let limit = args.max_tokens.unwrap_or(own);
        if let Some(cut) =
            args.data.cut(suite, sample, limit, model).with_context(|| named(*index))?
        {
            for Wanted { sample, .. } in &mut samples {
                sample.context.clone_from(&cut);
                sample.facts.insert("cut".into(), args.data.cut_name().into());
            }
        }
        let methods: Vec<Method> = behind.iter().map(|&run| runs[run].method).collect();
        let record = &mut |at: usize, wanted: &Wanted, answer: Answer| -> Result<()> {
            let (run, Wanted { index, sample, .. }) = (behind[at], wanted);
            let journal = &mut runs[run].journal;
            scores[run].push(suite.record(group, journal, *index, sample, answer)?);
            self.bar.inc(1);
            Ok(())
        };
        let asked = self.together(methods, &samples, limit, record);
        asked.with_context(|| named(samples[0].index))
    }

    fn together(
        &self,
        methods: Vec<Method>,
        samples: &[Wanted],
        limit: usize,
        record: &mut Record<'_>,
    ) -> Result<()> {
        let Self { args, suite, model, surrogate, .. } = *self;
        let while_decoding = while_decoding(args, suite);
        let window = args.window;
        let all = Together { model, surrogate, methods, window, while_decoding, limit };
        let mut shared = all.read(&samples[0].sample)?;
        if samples.len() > 1 {
            shared.mark()?;
        }
        for batch in samples.chunks(at_once(samples, limit)) {
            let (mut wanted, mut asked) = (Vec::new(), Vec::new());
            for one in batch {
                for &method in &one.whose {
                    let sampling = sampling(args, suite, one.index);
                    wanted.push(one);
                    asked.push(Asked { method, sample: &one.sample, sampling });
                }
            }
            let answers = shared.answer(&asked, limit)?;
            for ((wanted, asked), answer) in wanted.into_iter().zip(&asked).zip(answers) {
                record(asked.method, wanted, answer)?;
            }
        }
        Ok(())
    }
}

/// Of samples that share a context, how many are written side by side, by all methods: what is in flight when a run is killed
/// is written again, and is held until then.
fn at_once(samples: &[Wanted], limit: usize) -> usize {
    let methods = samples.iter().map(|wanted| wanted.whose.len()).max().unwrap_or(1);
    // Texts whose likelihood is asked for are read one at a time.
    let likely = samples.iter().any(|wanted| !wanted.sample.likelihood_of.is_empty());
    let texts = if likely { 1 } else { MOST_TEXTS.min(IN_FLIGHT / limit.max(1)) };
    (texts / methods).max(1)
}

/// Takes a method's place, and its answer to a sample.
type Record<'a> = dyn FnMut(usize, &Wanted, Answer) -> Result<()> + 'a;

/// A sample, and the methods that lack its answer.
struct Wanted {
    index: u64,
    sample: Sample,
    /// By their places among those that lack any of the group.
    whose: Vec<usize>,
}

fn sampling(args: &Args, suite: &Suite<'_>, index: u64) -> Sampling {
    let temperature = temperature(args, suite);
    let seed = args.data.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index);
    match suite.dataset.as_str() {
        // Qwen3's own settings, with which kvpress runs AIME.
        "aime25" => Sampling { temperature, top_k: 20, top_p: 0.95, seed },
        _ => Sampling { temperature, seed, ..Sampling::default() },
    }
}
