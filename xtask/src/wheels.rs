//! Pinned files out of pinned Python wheels: pip downloads and checks them, `unpack.py` takes them out.
//! Of Python nothing is installed, imported or kept. The format of a pin file is told in `xtask/libtorch.txt`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Stage};
use crate::sh;

/// What a pin file asks for.
#[derive(Debug, PartialEq)]
pub struct Pins {
    /// `name version` of each wheel.
    wheels: Vec<String>,
    pub takes: Vec<Take>,
}

/// A file or folder of the filled cache.
#[derive(Debug, PartialEq)]
pub struct Take {
    /// Relative to where the pin file is unpacked.
    pub place: String,
    /// Bytes, where it is a file out of a wheel.
    pub size: Option<u64>,
}

impl Pins {
    /// Reads `xtask/<name>`.
    pub fn read(name: &str) -> Result<Self> {
        let path = sh::root().join("xtask").join(name);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut pins = Self { wheels: Vec::new(), takes: Vec::new() };
        for (number, line) in (1..).zip(text.lines()) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match *words {
                ["#>", member, place, size, sha256]
                    if is_sha256(sha256) && !member.ends_with('/') =>
                {
                    let size = size.parse().with_context(|| format!("line {number}: size"))?;
                    pins.takes.push(Take { place: place.into(), size: Some(size) });
                }
                ["#>", member, place] if member.ends_with('/') && place.ends_with('/') => {
                    pins.takes.push(Take { place: place.into(), size: None });
                }
                ["#=", place, _] => pins.takes.push(Take { place: place.into(), size: None }),
                [sign, ..] if sign.starts_with('#') && !["#>", "#="].contains(&sign) => {}
                [] => {}
                [wheel, hash] if hash.strip_prefix("--hash=sha256:").is_some_and(is_sha256) => {
                    let (name, version) = wheel
                        .split_once("==")
                        .with_context(|| format!("line {number}: `{wheel}` has no `==version`"))?;
                    pins.wheels.push(format!("{name} {version}"));
                }
                _ => bail!("line {number}: cannot read `{line}`"),
            }
        }
        Ok(pins)
    }

    /// Whether all of it lies at `target`, files at their size.
    pub fn lie_at(&self, target: &Path) -> bool {
        self.takes.iter().all(|take| {
            fs::metadata(target.join(&take.place)).is_ok_and(|found| {
                take.size.is_none_or(|size| found.is_file() && found.len() == size)
            })
        })
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Makes sure that `folder`, in the cache, holds all that `xtask/<name>` asks for. Quick when it does.
pub fn install(name: &str, folder: &Path, instead: &str) -> Result<()> {
    let pins = Pins::read(name)?;
    if pins.lie_at(folder) {
        return Ok(());
    }
    if !cfg!(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")) {
        bail!("what xtask/{name} pins is for Linux x86-64 with glibc: {instead}");
    }
    let stage = Stage::open(&cache::root()?)?;
    if pins.lie_at(folder) {
        return Ok(()); // by another process, while this one waited
    }
    unpack(name, &pins, &stage, instead)?;
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::rename(&stage.path, folder).with_context(|| format!("cannot make {}", folder.display()))
}

/// Fills `stage` with what `xtask/<name>` asks for, all of it checked. `instead` is what a person can do when this
/// can't be done.
pub fn unpack(name: &str, pins: &Pins, stage: &Stage, instead: &str) -> Result<()> {
    let pins_file = sh::root().join("xtask").join(name);
    let wheels = stage.path.join(".wheels");
    fs::create_dir(&wheels).with_context(|| format!("cannot make {}", wheels.display()))?;
    check_python(instead)?;
    check_disk(pins, stage, instead)?;

    say!("fetching {}", pins.wheels.join(", "));
    let mut pip = sh::command("python3");
    pip.args("-m pip download --no-deps --require-hashes --no-cache-dir --dest".split(' '));
    pip.arg(&wheels).arg("--requirement").arg(&pins_file);
    pip.args("--only-binary=:all: --implementation=cp --python-version=311 --abi=cp311".split(' '));
    // pip takes no tag for granted: each that one of the wheels carries.
    for tag in ["manylinux_2_28", "manylinux_2_25", "manylinux_2_17", "manylinux2014"] {
        pip.arg(format!("--platform={tag}_x86_64"));
    }
    // Half a gigabyte does not fit everyone's temporary folder; nothing is installed, so no environment is needed.
    pip.env("TMPDIR", &wheels).env("PIP_REQUIRE_VIRTUALENV", "0");
    sh::run(&mut pip).with_context(|| {
        format!("pip could not fetch the wheels, as it says above: check the network and pip's index, or {instead}")
    })?;
    sh::run(sh::command("python3").arg("xtask/unpack.py").args([
        &wheels,
        &pins_file,
        &stage.path,
    ]))?;
    fs::remove_dir_all(&wheels).with_context(|| format!("cannot remove {}", wheels.display()))?;
    if !pins.lie_at(&stage.path) {
        bail!(
            "what was unpacked is not what xtask/{name} asks for: a disk or a `size` there is wrong"
        );
    }
    Ok(())
}

fn check_python(instead: &str) -> Result<()> {
    sh::read(sh::command("python3").arg("--version"))
        .with_context(|| format!("no Python 3: install it with pip, or {instead}"))?;
    sh::read(sh::command("python3").args(["-m", "pip", "--version"])).with_context(|| {
        format!("no pip: install it (python3-pip, or `python3 -m ensurepip`), or {instead}")
    })?;
    Ok(())
}

/// pip holds each wheel twice for a moment, and a wheel is about as large as what is taken out of it.
fn check_disk(pins: &Pins, stage: &Stage, instead: &str) -> Result<()> {
    const MB: u64 = 1_000_000;
    let wanted = pins.takes.iter().filter_map(|take| take.size).sum::<u64>() * 5 / 2;
    let script = "import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free)";
    let free = sh::read(sh::command("python3").args(["-c", script]).arg(&stage.path))?;
    let free: u64 = free.trim().parse().context("cannot read the free space")?;
    if free < wanted {
        let folder = stage.path.display();
        let (free, wanted, variable) = (free / MB, wanted / MB, cache::VARIABLE);
        bail!(
            "{wanted} MB are needed at {folder}, {free} MB are free: set {variable} to a folder on another disk, or {instead}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

    #[test]
    fn a_pin_file_names_wheels_and_what_to_take() {
        let text = format!(
            "# words\n\nsome-lib==1.2 --hash=sha256:{SHA256}\n#> a/b.so lib/b.so 7 {SHA256}\n#> a/i/ i/\n#= v 1.2\n"
        );
        let take = |place: &str, size| Take { place: place.into(), size };
        let takes = vec![take("lib/b.so", Some(7)), take("i/", None), take("v", None)];
        assert_eq!(
            Pins::parse(&text).unwrap(),
            Pins { wheels: vec!["some-lib 1.2".into()], takes }
        );
    }

    #[test]
    fn what_is_not_pinned_is_refused_by_line() {
        for (line, why) in [
            ("some-lib==1.2".to_string(), "no hash"),
            (format!("some-lib>=1.2 --hash=sha256:{SHA256}"), "no version"),
            ("some-lib==1.2 --hash=sha256:abcd".into(), "a short hash"),
            (format!("#> a/b.so b.so {SHA256}"), "no size"),
            (format!("#> a/b.so b.so many {SHA256}"), "a size in words"),
            ("#> a/b.so b.so 7 abcd".into(), "a short hash of a file"),
            ("#> a/b.so b.so".into(), "a file without a pin"),
        ] {
            let error = Pins::parse(&format!("\n{line}\n")).expect_err(why);
            assert!(format!("{error:#}").contains("line 2"), "{why}: {error:#}");
        }
    }

    #[test]
    fn a_file_of_another_size_does_not_count() {
        let folder = std::env::temp_dir().join(format!("longctx-pins-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let pins = Pins::parse(&format!("#> a/b b 3 {SHA256}\n#= v 1\n")).unwrap();
        fs::write(folder.join("v"), "1").unwrap();
        assert!(!pins.lie_at(&folder));
        fs::write(folder.join("b"), "12").unwrap();
        assert!(!pins.lie_at(&folder));
        fs::write(folder.join("b"), "123").unwrap();
        assert!(pins.lie_at(&folder));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn the_committed_pin_files_can_be_read() {
        assert_eq!(Pins::read("libtorch.txt").unwrap().wheels.len(), 3);
        assert_eq!(Pins::read("data.txt").unwrap().wheels.len(), 3);
        assert_eq!(Pins::read("nvcc.txt").unwrap().wheels.len(), 5);
    }
}
