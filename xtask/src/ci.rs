//! `ci`: every check in one command, cheapest first, and what needs no libtorch before there is one.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::fetch::fetch;
use crate::kernels::kernels;
use crate::setup::setup;
use crate::sh;
use crate::tidy::tidy;

type Step = fn() -> Result<()>;

const STEPS: &[(&str, Step)] = &[
    ("format", format),
    ("tidy", tidy),
    ("leaves, no libtorch", leaves),
    ("downstream, no libtorch", downstream),
    ("kernels", || kernels(&["--check".into()])),
    ("setup", setup),
    ("fetch", || fetch().map(|_| ())),
    ("clippy", clippy),
    ("tests", tests),
    ("tests on the model", model_tests),
    ("docs", docs),
];

/// Runs the steps up to the first that fails, then says how long each took.
pub fn ci() -> Result<()> {
    let mut times: Vec<(&str, Duration)> = Vec::new();
    let mut result = Ok(());
    for (name, step) in STEPS {
        say!("\n== {name}");
        let start = Instant::now();
        result = step().with_context(|| format!("step `{name}`"));
        times.push((name, start.elapsed()));
        if result.is_err() {
            break;
        }
    }
    say!("");
    let all = times.iter().map(|(_, time)| time).sum();
    for (name, time) in times.into_iter().chain([("all", all)]) {
        say!("{:>8.1} s  {name}", time.as_secs_f64());
    }
    result
}

/// Runs cargo at the root on `arguments`, words with single spaces between.
fn cargo(arguments: &str) -> Result<()> {
    sh::run(sh::cargo().args(arguments.split(' ')))
}

fn format() -> Result<()> {
    cargo("fmt --all --check")?;
    cargo(&format!("fmt --all --check --manifest-path {DOWNSTREAM}/Cargo.toml"))
}

fn leaves() -> Result<()> {
    let mut test = sh::cargo_without_libtorch("test", "Cargo.toml");
    sh::run(test.args("--package kvzap --package repo-pos --package paged-kernels".split(' ')))
}

/// Two crates outside the workspace that take a leaf each.
const DOWNSTREAM: &str = "xtask/tests/downstream";

/// Builds and tests them, and shows that nothing of libtorch is among what they are built from.
fn downstream() -> Result<()> {
    // The versions that the workspace is tested with, and no second lock file to look after.
    let (from, to) =
        (sh::root().join("Cargo.lock"), sh::root().join(DOWNSTREAM).join("Cargo.lock"));
    fs::copy(from, &to).with_context(|| format!("cannot write {}", to.display()))?;
    let manifest = format!("{DOWNSTREAM}/Cargo.toml");
    sh::run(&mut sh::cargo_without_libtorch("test", &manifest))?;
    let mut tree = sh::cargo_without_libtorch("tree", &manifest);
    let tree = sh::read(tree.args(["--workspace", "--prefix=none", "--edges=all"]))?;
    match tree.lines().find(|line| line.starts_with("tch ") || line.starts_with("torch-sys ")) {
        Some(line) => {
            bail!("{manifest} is built from `{line}`: keep it behind a leaf's feature `tch`")
        }
        None => Ok(()),
    }
}

// All of these name the same packages and features, so that cargo builds each dependency once for all.

fn clippy() -> Result<()> {
    cargo("clippy --workspace --all-targets --all-features -- -D warnings")
}

fn tests() -> Result<()> {
    cargo("test --workspace --all-features")
}

/// The tests marked `#[ignore = "needs the default model: cargo xtask fetch"]`. Those that want a GPU have `cuda` in
/// their path, those that want chromium `browser`, those that want minutes `long_soak`.
fn model_tests() -> Result<()> {
    let mut test = sh::cargo();
    test.args("test --workspace --all-features --lib --bins --tests".split(' '));
    let chosen = ["--", "--ignored", "--skip=cuda", "--skip=browser", "--skip=long_soak"];
    sh::run(test.envs(fetch()?.variables()).args(chosen))
}

fn docs() -> Result<()> {
    cargo("doc --workspace --all-features --no-deps")
}
