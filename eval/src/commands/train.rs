//! `longctx train`: makes what longctx adds to a model.

pub(super) mod corpus;
mod course;
pub(super) mod curve;
mod heat;
mod kvzap;
pub(super) mod pieces;
mod repo;
mod rows;

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
    Kvzap(Box<kvzap::Args>),
    /// Position maps (RePo), or the same training without them; for a model, or a new one from scratch
    Repo(Box<repo::Args>),
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Kvzap(args) => kvzap::run(args),
        What::Repo(args) => repo::run(args),
    }
}
