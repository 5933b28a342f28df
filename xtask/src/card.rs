//! `card`: the tests that need an NVIDIA card, or those of the kernels under one of compute-sanitizer's tools.

use anyhow::{Context, Result, bail};

use crate::fetch::fetch;
use crate::sh;

const TOOLS: [&str; 4] = ["memcheck", "initcheck", "synccheck", "racecheck"];
const SANITIZER: &str = "compute-sanitizer";
/// What cargo starts test executables with.
const RUNNER: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";

/// Runs them in release: what they compare with is computed on the CPU.
pub fn card(arguments: &[String]) -> Result<()> {
    let mut test = sh::cargo();
    let kernels =
        "test --release --all-features --no-fail-fast --lib --tests --package paged-kernels";
    test.args(kernels.split(' '));
    match arguments {
        [] => {
            let cards = cards()?;
            test.envs(fetch()?.variables());
            test.args("--package models -- --ignored cuda --skip=long_soak".split(' '));
            if cards < 2 {
                test.arg("--skip=cuda::ranks");
            }
        }
        [tool] if TOOLS.contains(&tool.as_str()) => {
            cards()?;
            let version = sh::command(SANITIZER).arg("--version").output();
            version.with_context(|| {
                format!("cannot start {SANITIZER}: put CUDA's bin folder on the PATH")
            })?;
            // Left to itself synccheck finds no memory for launches of clusters, and does not look at them.
            let barriers = if tool == "synccheck" { " --num-cuda-barriers=64" } else { "" };
            test.env(RUNNER, format!("{SANITIZER} --tool={tool}{barriers} --error-exitcode=1"));
            test.args("-- --ignored cuda --test-threads=1".split(' '));
        }
        _ => {
            bail!("`card` takes {} or nothing, found `{}`", TOOLS.join(", "), arguments.join(" "))
        }
    }
    sh::run(&mut test)
}

/// How many cards there are, at least one.
fn cards() -> Result<usize> {
    let list = sh::read(sh::command("nvidia-smi").arg("--list-gpus"));
    let cards = list.map(|list| list.lines().filter(|line| line.starts_with("GPU ")).count());
    let advice =
        "take a machine with an NVIDIA card and its driver, or `cargo xtask ci`, which needs none";
    match cards {
        Ok(0) => bail!("nvidia-smi names no card: {advice}"),
        Ok(cards) => Ok(cards),
        Err(error) => bail!("{error:#}: {advice}"),
    }
}
