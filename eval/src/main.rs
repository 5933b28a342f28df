//! The `longctx` command: see `longctx --help`.

use clap::{Parser, Subcommand};
use eval::commands::{
    bench, calibrate, curve, demo, eval as benchmarks, facts, generate, positions, report, train,
};
use std::process::ExitCode;

/// Long-context inference from a pruned KV cache.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a prompt, or a question about a text
    Generate(generate::Args),
    /// Hide needles in a long text, and look for them with the full cache and with pruned ones
    Demo(demo::Args),
    /// Run benchmarks with the full cache and with pruned ones
    Eval(Box<benchmarks::Args>),
    /// Make a page, pictures and tables of results
    Report(report::Args),
    /// Measure prefill and decode, beside what the memory allows
    Bench(bench::Args),
    /// Find the threshold of a surrogate that removes a wanted share
    Calibrate(calibrate::Args),
    /// Ask what is still known when more and more is forgotten, by every method
    Curve(curve::Args),
    /// Show where a model with learned positions puts the tokens of a text, as a page
    Positions(positions::Args),
    /// Ask for facts scattered in noise, within the trained length and beyond, and compare models
    Facts(facts::Args),
    /// Train what longctx adds to a model: KVzap surrogates, RePo's positions
    Train(train::Args),
}

fn main() -> ExitCode {
    sigpipe::reset(); // who reads no further, as `head`, ends it, as any command
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Eval(args) => benchmarks::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Curve(args) => curve::run(&args),
        Command::Positions(args) => positions::run(&args),
        Command::Facts(args) => facts::run(&args),
        Command::Train(args) => train::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("longctx: {error:#}");
            ExitCode::FAILURE
        }
    }
}
