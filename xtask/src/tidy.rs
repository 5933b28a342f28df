//! `tidy`: the rules that no compiler knows. Each breach is one line: where, what, and what to do.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::sh;

/// What each crate may name of ours and of libtorch's, whatever the features, tests included.
const ARROWS: &[(&str, &[&str])] = &[
    ("kvzap", &["tch"]),
    ("repo-pos", &["tch"]),
    ("paged-kernels", &[]),
    ("models", &["kvzap", "repo-pos", "paged-kernels", "tch"]),
    ("eval", &["kvzap", "repo-pos", "models", "tch"]),
    ("xtask", &[]),
];

/// What must not be reached, over however many crates, with which features.
const DISTANT: &[(&str, &[&str], &[&str])] = &[
    ("kvzap", &[], &["tch", "torch-sys", "cudarc"]),
    ("repo-pos", &[], &["tch", "torch-sys", "cudarc"]),
    ("paged-kernels", &[], &["tch", "torch-sys", "cudarc"]),
    ("paged-kernels", &["--all-features"], &["tch", "torch-sys"]),
    ("eval", &["--no-default-features"], &["tch", "torch-sys", "models"]),
];

/// `xtask` must build before anything else can.
const XTASK_MAY_USE: &[&str] = &["anyhow"];

/// The files that may opt out of the lint which denies `unsafe`.
const UNSAFE: &[&str] = &[
    "models/src/bridge.rs",
    "models/src/card/driver.rs",
    "models/src/card/join.rs",
    "models/src/card/memory.rs",
    "models/src/card/nccl.rs",
    "models/src/device.rs",
    "paged-kernels/src/cuda/driver.rs",
    "paged-kernels/src/cuda/view.rs",
];

const MAX_LINES: usize = 600;
const MAX_BYTES: u64 = 1_000_000;
/// Of PTX, which is neither fetched nor made where a crate is built.
const MAX_PTX_BYTES: u64 = 2_000_000;
/// Of a surrogate of the default model, which is trained on a card.
const MAX_SURROGATE_BYTES: u64 = 3_000_000;

/// What files must not say, and the files that must.
const FORBIDDEN: &str = "xtask/tidy.txt";
const MAY_SAY_IT: &[&str] = &[FORBIDDEN, "Cargo.lock"];

/// Runs every rule.
pub fn tidy() -> Result<()> {
    let mut breaches = Vec::new();
    breaches
        .extend(arrows(&tree("--workspace --depth=1 --edges=all --all-features --prefix=depth")?));
    for (name, features, forbidden) in DISTANT {
        let line =
            format!("--package={name} --edges=normal,build --prefix=none {}", features.join(" "));
        breaches.extend(distant(name, forbidden, &tree(line.trim())?));
    }

    let forbidden =
        fs::read_to_string(sh::root().join(FORBIDDEN)).context("cannot read the rules")?;
    let listed = "ls-files -z --cached --others --exclude-standard";
    for path in sh::read(sh::command("git").args(listed.split(' ')))?.split_terminator('\0') {
        // A file that is deleted but still in the index is not there to be read.
        let Ok(bytes) = fs::read(sh::root().join(path)) else { continue };
        breaches.extend(file(path, &bytes, &forbidden));
    }
    for breach in &breaches {
        say!("{breach}");
    }
    match breaches.len() {
        0 => Ok(()),
        n => bail!("{n} rules are broken, as listed above"),
    }
}

/// `cargo tree`, which also says when Cargo.lock is behind the manifests.
fn tree(arguments: &str) -> Result<String> {
    sh::read(sh::cargo().args(["tree", "--locked"]).args(arguments.split(' ')))
}

/// Checks the tree of all members, a level deep: `0kvzap v0.1.0 (…)`, then `1half v2.7.1` for each dependency.
fn arrows(tree: &str) -> Vec<String> {
    let ours: Vec<&str> =
        ARROWS.iter().map(|(name, _)| *name).chain(["tch", "torch-sys"]).collect();
    let (mut from, mut allowed): (&str, Option<&[&str]>) = ("", None);
    let mut breaches = Vec::new();
    for line in tree.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        if let Some(name) = name.strip_prefix('0') {
            from = name;
            allowed = ARROWS.iter().find(|(name, _)| *name == from).map(|(_, allowed)| *allowed);
            if allowed.is_none() {
                breaches
                    .push(format!("{from}: a crate without arrows: add them to xtask/src/tidy.rs"));
            }
        } else if let (Some(name), Some(allowed)) = (name.strip_prefix('1'), allowed) {
            let wrong = match from {
                "xtask" => !XTASK_MAY_USE.contains(&name),
                _ => ours.contains(&name) && !allowed.contains(&name),
            };
            if wrong {
                breaches.push(format!(
                    "{from}/Cargo.toml: depends on {name}, which is no arrow of ours: remove it, or move the code up"
                ));
            }
        }
    }
    breaches
}

fn distant(from: &str, forbidden: &[&str], tree: &str) -> Vec<String> {
    let reached = |name: &&&str| tree.lines().any(|line| line.split(' ').next() == Some(**name));
    let breach = |name: &&str| {
        format!(
            "{from}/Cargo.toml: reaches {name}: put what needs it behind a feature that is off by default"
        )
    };
    forbidden.iter().filter(reached).map(breach).collect()
}

/// Checks one file that is, or would be, committed.
fn file(path: &str, bytes: &[u8], forbidden: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    let most = match path {
        _ if path.ends_with(".ptx") => MAX_PTX_BYTES,
        _ if path.starts_with("kvzap/surrogates/") => MAX_SURROGATE_BYTES,
        _ => MAX_BYTES,
    };
    if bytes.len() as u64 > most {
        let size = bytes.len() as u64;
        breaches
            .push(format!("{path}: {size} bytes, at most {most}: fetch or generate it instead"));
    }
    let text = String::from_utf8_lossy(bytes);
    for (number, line) in (1..).zip(text.lines()).filter(|_| !MAY_SAY_IT.contains(&path)) {
        for words in
            forbidden.lines().filter(|words| !words.starts_with('#') && line.contains(words))
        {
            breaches.push(format!("{path}:{number}: says `{words}`: {FORBIDDEN} tells why not"));
        }
    }
    if path.ends_with(".rs") {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            breaches.push(format!("{path}: {lines} lines, at most {MAX_LINES}: split it by idea"));
        }
        // Spelled in two, since this file may not say it either.
        if text.contains(concat!("unsafe", "_code")) && !UNSAFE.contains(&path) {
            let place = UNSAFE.join(" or ");
            breaches.push(format!(
                "{path}: opts out of the lint on unsafe code: move the code to {place}"
            ));
        }
    }
    let member = path
        .strip_suffix("/Cargo.toml")
        .is_some_and(|name| ARROWS.iter().any(|(member, _)| *member == name));
    if member && !text.contains("[lints]\nworkspace = true") {
        breaches
            .push(format!("{path}: its lints are its own: add `[lints]` with `workspace = true`"));
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_arrows_of_the_plan_are_allowed() {
        let good = "0kvzap v0.1.0 (/a/kvzap)\n1half v2.7.1\n1tch v0.24.0\n\n0xtask v0.1.0 (/a)\n1anyhow v1.0.1\n";
        assert!(arrows(good).is_empty());
        for (from, to) in [
            ("kvzap", "repo-pos"),
            ("paged-kernels", "tch"),
            ("models", "eval"),
            ("eval", "paged-kernels"),
            ("xtask", "clap"),
            ("xtask", "kvzap"),
        ] {
            let breaches = arrows(&format!("0{from} v0.1.0 (/a)\n1{to} v1.0.0\n"));
            assert_eq!(breaches.len(), 1, "{from} to {to}");
            assert!(breaches[0].starts_with(&format!("{from}/Cargo.toml: depends on {to}")));
        }
        assert!(arrows("0seventh v0.1.0 (/a)\n")[0].contains("without arrows"));
    }

    #[test]
    fn what_is_reached_far_away_counts_and_names_are_whole_words() {
        let tree = "kvzap v0.1.0 (/a)\nhalf v2.7.1\ntorch-sys v0.24.0\ntch-extra v1.0.0\n";
        assert_eq!(distant("kvzap", &["tch", "torch-sys"], tree).len(), 1);
        assert!(distant("kvzap", &["tch"], tree).is_empty());
    }

    #[test]
    fn a_file_that_breaks_a_rule_is_named_with_its_line() {
        let opt_out = concat!("#![allow(unsafe", "_code)]\n");
        let long = "\n".repeat(MAX_LINES + 1);
        for (path, text, wanted) in [
            ("a.md", "one\nsee /secret/x\n", "a.md:2: says `/secret/`"),
            ("a/src/b.rs", opt_out, "a/src/b.rs: opts out"),
            ("a/src/b.rs", &long, "a/src/b.rs: 601 lines"),
            ("kvzap/Cargo.toml", "[package]\n", "kvzap/Cargo.toml: its lints"),
        ] {
            let breaches = file(path, text.as_bytes(), "# why\n/secret/\n");
            assert_eq!(breaches.len(), 1, "{breaches:?}");
            assert!(breaches[0].starts_with(wanted), "{breaches:?}");
        }
        assert_eq!(file("a.bin", &vec![0; 1_000_001], "/secret/\n").len(), 1);
        assert!(file(UNSAFE[0], opt_out.as_bytes(), "").is_empty());
        assert!(file("kvzap/Cargo.toml", b"[lints]\nworkspace = true\n", "").is_empty());
        assert!(file(FORBIDDEN, b"/secret/\n", "/secret/\n").is_empty());
    }
}
