//! `longctx positions`: a page that shows where a model puts the tokens of a text.

use super::prompt::PromptArgs;
use super::{ModelArgs, beside, table, write};
use crate::positions::Positions;
use anyhow::Result;
use std::path::PathBuf;

/// What to read, and where to put the page.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// A question about the text: shows what came near it
    #[arg(long, default_value = "")]
    question: String,
    /// The most tokens of the text; what follows is left out
    #[arg(long, default_value_t = 1024)]
    limit: usize,
    /// The page, one HTML file
    #[arg(long, value_name = "FILE", default_value = "positions.html")]
    output: PathBuf,
    /// Print all positions as one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let text = args.prompt.read()?;
    drop(beside(&args.output)?); // there is a place for the page
    let model = args.model.load()?;
    let name = args.model.name();
    let positions = Positions::read(&model, name, &text, &args.question, args.limit)?;
    write(&args.output, positions.page()?.as_bytes())?;
    if args.json {
        println!("{:#}", serde_json::to_value(&positions)?);
        return Ok(());
    }
    let mut rows = table(
        &["layer", "heads", "from", "to", "widest", "constant", "monotone", "hybrid"],
        &[0, 1, 2, 3, 4, 5, 6, 7],
    );
    for heads in positions.heads.chunk_by(|a, b| a.layer == b.layer) {
        let share = |i: usize| {
            let sum: f64 = heads.iter().map(|head| head.patterns[i]).sum();
            format!("{:.0} %", 100.0 * sum / heads.len() as f64)
        };
        let (from, to) =
            heads.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), head| {
                (low.min(head.range[0]), high.max(head.range[1]))
            });
        let widest = heads.iter().map(|head| head.range[1] - head.range[0]).fold(0.0, f32::max);
        let numbers = [from, to, widest].map(|z| format!("{z:.1}"));
        let mut row = vec![heads[0].layer.to_string(), heads.len().to_string()];
        row.extend(numbers);
        row.extend([share(0), share(1), share(2)]);
        rows.add_row(row);
    }
    println!("{rows}");
    if !positions.near.is_empty() {
        println!("\nfar in the text, near the question:");
        for near in positions.near.iter().take(8) {
            let token = &positions.tokens[near.token];
            println!(
                "  {token:?}, token {}, in {} of {} heads",
                near.token,
                near.heads,
                positions.heads.len()
            );
        }
    }
    println!("\n{}", args.output.display());
    Ok(())
}
