//! `longctx train`: makes what longctx adds to a model.

mod heat;
mod kvzap;
pub(super) mod pieces;

use anyhow::Result;

/// What to train.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    /// A KVzap surrogate: fitted to what KVzip+ says of a model's tokens
    Kvzap(kvzap::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Kvzap(args) => kvzap::run(args),
    }
}
