//! `demo`: the main job from a fresh clone.

use std::path::PathBuf;

use anyhow::Result;

use crate::fetch::{Data, fetch};
use crate::setup::setup;
use crate::sh;

/// Builds and runs `longctx demo` with `arguments`, on the default model and text unless they name others.
pub fn demo(arguments: &[String]) -> Result<()> {
    setup()?;
    let Data { model, haystack } = fetch()?;
    let mut run = sh::cargo();
    run.args("run --release --package eval --bin longctx -- demo".split(' '));
    let surrogate = sh::root().join("kvzap/surrogates/smollm2-135m-instruct-mlp");
    let defaults = [("--model", model), ("--haystack", haystack), ("--surrogate", surrogate)];
    for (flag, default) in defaults {
        if !names(arguments, flag) {
            run.args([PathBuf::from(flag), default]);
        }
    }
    // Where the person is, so that a relative file among the arguments means what it says.
    sh::run(run.args(arguments).current_dir("."))
}

fn names(arguments: &[String], flag: &str) -> bool {
    arguments.iter().any(|word| {
        word.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_found_in_both_spellings_and_not_in_a_longer_one() {
        let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        assert!(names(&words("--needles 2 --model m"), "--model"));
        assert!(names(&words("--model=m"), "--model"));
        assert!(!names(&words("--models m model"), "--model"));
    }
}
