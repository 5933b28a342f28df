//! `longctx bench --positions`: what learned positions cost. A model is measured beside itself with tokens at their index, over
//! the same weights and in turns, so that what else a machine does meets both.

use super::super::{spinner, table};
use super::{Args, ids, median, merge, read_and_write};
use anyhow::{Result, ensure};
use models::{CausalLm, Decoder, Hooks, Random, Source, Weights, open};
use serde::{Deserialize, Serialize};
use tch::Kind;

/// Seed of random weights.
const SEED: i64 = 1;

/// One comparison, as repo-pos/benches/results/cost.json has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    what: String,
    model: String,
    machine: String,
    case: String,
    /// Milliseconds by the index and by learned positions, medians; for parameters, numbers.
    index: f64,
    learned: f64,
    /// What learned positions add, in percent: the median of the turns' ratios.
    adds: f64,
    /// The same of the best turns.
    adds_to_best: f64,
    turns: usize,
    date: String,
}

/// Times by the index and by learned positions, a pair a turn.
type Turns = Vec<[f64; 2]>;

/// Runs it.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.cards == 1, "--positions is measured on one card; leave --cards out");
    let (kind, device) = args.model.machine()?;
    let source = match args.random_weights {
        true => Source::Random(Random::open(args.model.path(), SEED)?),
        false => open(args.model.path())?,
    };
    let bar = spinner("loading the model");
    let model = Decoder::load(&Weights::new(source, kind, device)?)?;
    let [maps, all] = model.position_numbers();
    ensure!(
        maps > 0,
        "{}: no learned positions to measure; give a model whose config.json has pe_config",
        args.model.name()
    );
    let both = [model.by_index()?, model];
    let (machine, found) = if device.is_cuda() {
        #[cfg(feature = "cuda")]
        {
            on_card(args, both, &bar)?
        }
        #[cfg(not(feature = "cuda"))]
        anyhow::bail!("this longctx was built without the feature cuda; build it with it");
    } else {
        on_cpu(args, &both, kind, &bar)?
    };
    bar.finish_and_clear();
    let row = |what: &str, case: String, turns: &Turns| {
        let of = |side: usize| turns.iter().map(|turn| turn[side]).collect::<Vec<_>>();
        let best = |side: usize| of(side).into_iter().fold(f64::INFINITY, f64::min);
        let percent = |ratio: f64| round(100.0 * (ratio - 1.0), 2);
        Row {
            what: what.to_owned(),
            model: args.model.name(),
            machine: machine.clone(),
            case,
            index: round(median(of(0)), 4),
            learned: round(median(of(1)), 4),
            adds: percent(median(turns.iter().map(|[index, learned]| learned / index).collect())),
            adds_to_best: percent(best(1) / best(0)),
            turns: turns.len(),
            date: args.date.clone().unwrap_or_default(),
        }
    };
    let numbers = vec![[(all - maps) as f64, all as f64]];
    let mut rows = vec![row("numbers", "all".to_owned(), &numbers)];
    rows.extend(found.iter().map(|(what, case, turns)| row(what, case.clone(), turns)));
    if let Some(path) = &args.results {
        merge(path, &rows, |a, b| {
            [&a.what, &a.model, &a.machine, &a.case] == [&b.what, &b.model, &b.machine, &b.case]
        })?;
    }
    if args.json {
        println!("{:#}", serde_json::to_value(&rows)?);
    } else {
        print(&rows);
    }
    Ok(())
}

type Found = (String, Vec<(&'static str, String, Turns)>);

/// A measurement of each side in every turn, who begins changing.
fn in_turns(turns: usize, mut of: impl FnMut(usize) -> Result<f64>) -> Result<Turns> {
    (0..turns)
        .map(|turn| {
            let mut pair = [0.0; 2];
            for side in [turn % 2, 1 - turn % 2] {
                pair[side] = of(side)?;
            }
            Ok(pair)
        })
        .collect()
}

fn on_cpu(
    args: &Args,
    both: &[Decoder; 2],
    kind: Kind,
    bar: &indicatif::ProgressBar,
) -> Result<Found> {
    let mut found = Vec::new();
    for &tokens in &args.context {
        bar.set_message(format!("reading {tokens} tokens in turns"));
        let ids = ids(tokens, both[0].config());
        let (mut reading, mut writing) = (Vec::new(), Vec::new());
        // A first time is slower.
        read_and_write(&both[0], kind, Hooks::default(), &ids[..tokens.min(64)], 2)?;
        in_turns(args.repeat, |side| {
            let (read, write, _) =
                read_and_write(&both[side], kind, Hooks::default(), &ids, args.decode)?;
            reading.push((side, read));
            writing.push((side, write));
            Ok(read)
        })?;
        let pairs = |times: Vec<(usize, f64)>| -> Turns {
            let pair = |two: &[(usize, f64)]| {
                let mut pair = [0.0; 2];
                two.iter().for_each(|&(side, seconds)| pair[side] = 1e3 * seconds);
                pair
            };
            times.chunks(2).map(pair).collect()
        };
        found.push(("prefill", format!("1x{tokens}"), pairs(reading)));
        found.push(("decode step", format!("1x{tokens}"), pairs(writing)));
    }
    Ok((format!("CPU, {} threads", tch::get_num_threads()), found))
}

#[cfg(feature = "cuda")]
fn on_card(args: &Args, both: [Decoder; 2], bar: &indicatif::ProgressBar) -> Result<Found> {
    use super::Part;
    use models::{Bench, Mode};
    let both = both.map(Bench::new);
    let [index, learned] = both;
    let both = [index?, learned?];
    let mut found = Vec::new();
    for &tokens in &args.context {
        if args.parts.contains(&Part::Prefill) {
            bar.set_message(format!("reading {tokens} tokens in turns"));
            let turns = in_turns(args.repeat, |side| {
                Ok(1e3 * both[side].prefill(tokens, 1.0, 3)?.seconds[0])
            })?;
            found.push(("prefill", format!("1x{tokens}"), turns));
        }
        for &batch in args.batch.iter().filter(|_| args.parts.contains(&Part::Decode)) {
            bar.set_message(format!("writing {batch} times after {tokens} tokens in turns"));
            let turns = in_turns(args.repeat, |side| {
                let step = both[side].decode(batch, tokens, 1.0, Mode::Fast, args.decode)?;
                Ok(1e3 * median(step.seconds))
            })?;
            found.push(("decode step", format!("{batch}x{tokens}"), turns));
        }
    }
    Ok((both[0].card()?, found))
}

fn round(x: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (x * scale).round() / scale
}

fn print(rows: &[Row]) {
    let mut table =
        table(&["", "case", "by the index", "learned", "adds", "to the best"], &[2, 3, 4, 5]);
    for row in rows {
        let shown = |x: f64| match row.what.as_str() {
            "numbers" => format!("{:.2} M", x / 1e6),
            _ => format!("{x:.3} ms"),
        };
        table.add_row([
            row.what.clone(),
            row.case.clone(),
            shown(row.index),
            shown(row.learned),
            format!("{:+.2} %", row.adds),
            format!("{:+.2} %", row.adds_to_best),
        ]);
    }
    println!("{table}");
    if let Some(row) = rows.first() {
        println!("{}; medians of the turns, {}", row.model, row.machine);
    }
}
