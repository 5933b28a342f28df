//! `longctx bench --device cuda`: decode, prefill, memory and capacity on a card, for models that may lie in no file.

use super::super::{spinner, table};
use super::{Args, Part, merge};
use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use models::ranks::{Rank, on_each};
use models::{Bench, Decoder, Mode, Random, Source, Weights, open};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use tch::Kind;

/// Seed of random weights.
const SEED: i64 = 1;
/// What the capacity is asked of.
const CAPACITY_BYTES: usize = 72_000_000_000;

/// One number, as models/benches/results has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    what: String,
    engine: String,
    model: String,
    case: String,
    keep: f64,
    value: f64,
    unit: String,
    floor: Option<f64>,
    card: String,
    date: String,
}

/// Runs it.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.remove.iter().all(|share| (0.0..1.0).contains(share)), "--remove takes 0 up to 1");
    let (kind, device) = args.model.machine()?;
    ensure!(kind == Kind::BFloat16, "steps on a card are in bf16; leave --dtype out");
    let source = if args.random_weights {
        Source::Random(Random::open(args.model.path(), SEED)?)
    } else {
        open(args.model.path())?
    };
    let weights = Weights::new(source, kind, device)?;
    let bar = spinner("loading the model");
    let start = Instant::now();
    let found = if args.cards == 1 {
        vec![measure(args, Decoder::load(&weights)?, start.elapsed(), &bar)?]
    } else {
        ensure!(!args.parts.contains(&Part::Capacity), "the capacity is that of one card");
        let ranks = Rank::on_cards(args.cards)?;
        let work =
            |rank: &Rank| measure(args, Decoder::load_part(&weights, rank)?, start.elapsed(), &bar);
        on_each(&ranks, work)?
    };
    bar.finish_and_clear();
    let copies = found.iter().map(|(copies, _)| copies).sum();
    let joined = found.into_iter().map(|(_, rows)| rows).reduce(Rows::joined);
    let Some(mut rows) = joined else { return Ok(()) };
    if let Some(bytes) = models::peak_memory() {
        rows.add("host memory at most", "all", 1.0, bytes as f64 / 1e9, "GB", None);
    }
    if let Some(path) = &args.results {
        merge(path, &rows.rows, |a, b| a.says_of() == b.says_of())?;
    }
    rows.print(copies)
}

/// Measures a model, or its part on a card, which took `loaded` to load; the bytes a second that are copied on it come first.
fn measure<'a>(
    args: &'a Args,
    model: Decoder,
    loaded: Duration,
    bar: &ProgressBar,
) -> Result<(f64, Rows<'a>)> {
    let bench = Bench::new(model)?;
    let card = bench.card()?;
    let card = if args.cards == 1 { card } else { format!("{} × {card}", args.cards) };
    let mut rows = Rows { args, card, rows: Vec::new() };
    rows.add("load", "weights", 1.0, loaded.as_secs_f64(), "s", None);
    let mode = if args.batch_invariant { Mode::BatchInvariant } else { Mode::Fast };
    for &tokens in &args.context {
        for &remove in &args.remove {
            let keep = 1.0 - remove;
            if args.parts.contains(&Part::Prefill) {
                bar.set_message(format!("reading {tokens} tokens, keeping {keep}"));
                let found = bench.prefill(tokens, keep, args.repeat)?;
                let median = found.seconds[found.seconds.len() / 2];
                rows.add("prefill", &format!("1x{tokens}"), keep, 1e3 * median, "ms", None);
            }
            let batches = args.batch.iter().filter(|_| args.parts.contains(&Part::Decode));
            for &batch in batches {
                bar.set_message(format!(
                    "writing {batch} times after {tokens} tokens, keeping {keep}"
                ));
                let found = bench.decode(batch, tokens, keep, mode, args.decode)?;
                let (case, median) =
                    (format!("{batch}x{tokens}"), found.seconds[found.seconds.len() / 2]);
                let floor = Some(1e3 * found.floor_seconds);
                rows.add("decode step", &case, keep, 1e3 * median, "ms", floor);
                rows.add("decode wall", &case, keep, 1e3 * found.wall_seconds, "ms", floor);
                rows.add("KV held", &case, keep, found.kv_bytes as f64 / 1e9, "GB", None);
                rows.add("cache on card", &case, keep, found.cache_bytes as f64 / 1e9, "GB", None);
                rows.add("card in use", &case, keep, found.used_bytes as f64 / 1e9, "GB", None);
            }
            if args.parts.contains(&Part::Capacity) {
                bar.set_message(format!(
                    "filling the card with {tokens} tokens each, keeping {keep}"
                ));
                let found = bench.capacity(tokens, keep, CAPACITY_BYTES)?;
                let case = format!("{tokens} tokens in 72 GB");
                rows.add("capacity", &case, keep, found.texts as f64, "texts", None);
                if found.texts > 0 {
                    let batch = found.texts.min(64);
                    let step = bench.decode(batch, tokens, keep, mode, args.decode)?;
                    let second = step.seconds[step.seconds.len() / 2];
                    let case = format!("{batch}x{tokens}");
                    let floor = Some(batch as f64 / step.floor_seconds);
                    rows.add("throughput", &case, keep, batch as f64 / second, "tokens/s", floor);
                }
            }
        }
    }
    Ok((bench.copy_bytes_per_second, rows))
}

impl Row {
    /// What two rows have in common of which the later counts.
    fn says_of(&self) -> impl PartialEq {
        let Self { what, engine, model, case, card, .. } = self;
        let all = [what, engine, model, case, card].map(Clone::clone);
        (all, (1e3 * self.keep).round() as i64)
    }
}

struct Rows<'a> {
    args: &'a Args,
    card: String,
    rows: Vec<Row>,
}

impl Rows<'_> {
    /// The rows of two cards that worked together: the slower's times, and the bytes of both.
    fn joined(mut self, other: Self) -> Self {
        for (row, other) in self.rows.iter_mut().zip(other.rows) {
            match row.unit.as_str() {
                "GB" => row.value += other.value,
                _ => row.value = row.value.max(other.value),
            }
            row.floor = row.floor.zip(other.floor).map(|(a, b)| a.max(b));
        }
        self
    }

    fn add(
        &mut self,
        what: &'static str,
        case: &str,
        keep: f64,
        value: f64,
        unit: &'static str,
        floor: Option<f64>,
    ) {
        let engine = if self.args.batch_invariant { "longctx, batch-invariant" } else { "longctx" };
        let round = |x: f64| (x * 1e3).round() / 1e3;
        self.rows.push(Row {
            what: what.to_owned(),
            engine: engine.to_owned(),
            model: self.args.model.name(),
            case: case.to_owned(),
            keep: round(keep),
            value: round(value),
            unit: unit.to_owned(),
            floor: floor.map(round),
            card: self.card.clone(),
            date: self.args.date.clone().unwrap_or_default(),
        });
    }

    fn print(&self, copies: f64) -> Result<()> {
        if self.args.json {
            println!("{:#}", serde_json::to_value(&self.rows)?);
            return Ok(());
        }
        let mut table = table(&["", "case", "kept", "", "", "over floor"], &[2, 3, 5]);
        for row in &self.rows {
            let over = row.floor.map_or_else(String::new, |floor| {
                let over = if row.unit == "ms" { row.value / floor } else { floor / row.value };
                format!("{over:.2}×")
            });
            table.add_row([
                row.what.clone(),
                row.case.clone(),
                format!("{:.0} %", 100.0 * row.keep),
                format!("{:.2}", row.value),
                row.unit.clone(),
                over,
            ]);
        }
        println!("{table}");
        println!(
            "{}, whose copies reach {:.0} GB/s: the floor is weights and kept rows at that rate",
            self.card,
            copies / 1e9
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(path: &std::path::Path, rows: &[Row]) -> Result<()> {
        merge(path, rows, |a, b| a.says_of() == b.says_of())
    }

    fn row(case: &str, keep: f64, value: f64) -> Row {
        let text = |text: &str| text.to_owned();
        Row {
            what: text("decode step"),
            engine: text("longctx"),
            model: text("m"),
            case: text(case),
            keep,
            value,
            unit: text("ms"),
            floor: None,
            card: text("a card"),
            date: text("2026-11-26"),
        }
    }

    #[test]
    fn rows_take_the_place_of_those_that_say_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.json");
        merged(&path, &[row("1x1", 0.25, 3.0), row("1x1", 1.0, 4.0)]).unwrap();
        merged(&path, &[row("2x1", 1.0, 5.0), row("1x1", 0.25, 2.5)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let rows: Vec<Row> = serde_json::from_str(&text).unwrap();
        let found = rows.iter().map(|row| (row.case.as_str(), row.value)).collect::<Vec<_>>();
        assert_eq!(found, [("1x1", 2.5), ("1x1", 4.0), ("2x1", 5.0)]);
        let first = text.lines().nth(1).unwrap();
        assert!(first.starts_with("  {\"what\": \"decode step\", \"engine\": "), "{first}");

        std::fs::write(&path, "{}").unwrap();
        let error = format!("{:#}", merged(&path, &rows).unwrap_err());
        assert!(error.contains("rows.json: not rows of a bench"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{}", "it is as it was");
    }
}
