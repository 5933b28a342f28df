//! `kernels`: CUDA C++ to PTX by a pinned nvcc, on a machine without a GPU. The PTX is committed, so that whoever
//! builds the crate needs a driver and no toolkit; `--check` says whether it is still what the sources give.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Stage};
use crate::sh;
use crate::wheels;

const PINS: &str = "nvcc.txt";
const TOOLKIT: &str = "nvcc-13.0.88";
const PROGRAMS: &[&str] = &["bin/nvcc", "bin/cudafe++", "bin/ptxas", "nvvm/bin/cicc"];
const INSTEAD: &str = "leave the kernels as they are: the committed PTX needs no compiler";

const LOCK: &str = "kernels.lock";
const RULES: &str = "xtask/kernels.txt";

/// No fast math: its sine is wrong beyond a few turns, and angles here reach hundreds of thousands.
const FLAGS: &str = "-std=c++17 -O3 -Werror=all-warnings -ptx";

/// The cards that each virtual architecture is judged on.
const JUDGED_ON: &[(&str, &[&str])] = &[
    ("compute_80", &["sm_80", "sm_90"]),
    ("compute_90", &["sm_90"]),
    ("compute_90a", &["sm_90a"]),
];

/// Compiles every kernel, or with `--check` compares what that gives with what is committed. Then judges the PTX.
pub fn kernels(arguments: &[String]) -> Result<()> {
    let check = match arguments {
        [] => false,
        [word] if word == "--check" => true,
        _ => bail!("`kernels` takes `--check` or nothing, found `{}`", arguments.join(" ")),
    };
    let rules = Rules::read()?;
    let toolkit = toolkit()?;
    let stage = Stage::open(&cache::root()?)?;
    let breaches = parallel(&rules.products, |product| {
        let made = stage.path.join(product.file());
        product.compile(&toolkit, &made)?;
        rules.judge(product, &toolkit, &made)
    })?;
    for folder in rules.folders() {
        let sources = sh::root().join(folder);
        let products = || rules.products.iter().filter(|product| product.folder == folder);
        if check {
            for product in products() {
                let same = |name| {
                    fs::read(stage.path.join(name)).ok() == fs::read(sources.join(name)).ok()
                };
                if !same(product.file().as_str()) {
                    bail!("{folder}/{} is stale: run `cargo xtask kernels`", product.file());
                }
            }
            if fs::read_to_string(sources.join(LOCK)).ok() != Some(lock(folder)?) {
                bail!("{folder}/{LOCK} is stale: run `cargo xtask kernels`");
            }
            continue;
        }
        for old in files(folder)?.iter().filter(|name| name.ends_with(".ptx")) {
            fs::remove_file(sources.join(old)).with_context(|| format!("cannot remove {old}"))?;
        }
        for product in products() {
            let (made, to) = (stage.path.join(product.file()), sources.join(product.file()));
            fs::copy(made, &to).with_context(|| format!("cannot write {}", to.display()))?;
        }
        let lock = lock(folder)?;
        fs::write(sources.join(LOCK), lock).with_context(|| format!("cannot write {LOCK}"))?;
    }
    match breaches.concat() {
        none if none.is_empty() => Ok(()),
        breaches => bail!("{}: change the kernel, or its budget in {RULES}", breaches.join("\n")),
    }
}

/// The folder of nvcc in the cache, fetched if it is not there.
fn toolkit() -> Result<PathBuf> {
    let folder = cache::root()?.join(TOOLKIT);
    wheels::install(PINS, &folder, INSTEAD)?;
    for program in PROGRAMS.iter().map(|program| folder.join(program)) {
        let mode = |path: &Path| fs::metadata(path).map(|found| found.permissions().mode());
        // A wheel's programs come without the right to run.
        if mode(&program)? & 0o111 == 0 {
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("cannot make {} a program", program.display()))?;
        }
    }
    sh::read(sh::command("g++").arg("--version"))
        .with_context(|| format!("nvcc needs a host compiler: install g++, or {INSTEAD}"))?;
    Ok(folder)
}

/// What is made of one source for one virtual architecture.
#[derive(Debug, PartialEq)]
struct Product {
    folder: String,
    source: String,
    target: String,
}

impl Product {
    fn file(&self) -> String {
        format!("{}.{}.ptx", self.source.trim_end_matches(".cu"), self.target)
    }

    fn compile(&self, toolkit: &Path, to: &Path) -> Result<()> {
        let mut nvcc = Command::new(toolkit.join("bin/nvcc"));
        // By a relative name, so that the checkout's place is not in the PTX.
        nvcc.current_dir(sh::root().join(&self.folder))
            .args(FLAGS.split(' '))
            .arg(format!("-arch={}", self.target));
        nvcc.env_remove("NVCC_APPEND_FLAGS").env_remove("NVCC_PREPEND_FLAGS");
        sh::run(nvcc.arg(&self.source).arg("-o").arg(to))
    }
}

/// `xtask/kernels.txt`.
#[derive(Debug, Default, PartialEq)]
struct Rules {
    products: Vec<Product>,
    budgets: Vec<Budget>,
}

#[derive(Debug, PartialEq)]
struct Budget {
    prefix: String,
    registers: u64,
    shared: u64,
}

impl Rules {
    fn read() -> Result<Self> {
        let text = fs::read_to_string(sh::root().join(RULES));
        Self::parse(&text.with_context(|| format!("cannot read {RULES}"))?)
            .with_context(|| format!("in {RULES}"))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rules = Self::default();
        let mut folder = "";
        for (number, line) in (1..).zip(text.lines()) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match *words {
                [] => {}
                [word, ..] if word.starts_with('#') => {}
                ["in", name] => folder = name,
                ["compile", source, ref targets @ ..] if !targets.is_empty() => {
                    for target in targets {
                        if !JUDGED_ON.iter().any(|(known, _)| known == target) {
                            bail!("line {number}: no card is known to judge `{target}` on");
                        }
                        let [folder, source, target] = [folder, source, target].map(String::from);
                        rules.products.push(Product { folder, source, target });
                    }
                }
                ["budget", prefix, registers, shared] => rules.budgets.push(Budget {
                    prefix: prefix.into(),
                    registers: registers.parse().with_context(|| format!("line {number}"))?,
                    shared: shared.parse().with_context(|| format!("line {number}"))?,
                }),
                _ => bail!("line {number}: cannot read `{line}`"),
            }
        }
        Ok(rules)
    }

    /// Where there are sources.
    fn folders(&self) -> Vec<&str> {
        let mut folders: Vec<_> =
            self.products.iter().map(|product| product.folder.as_str()).collect();
        folders.dedup();
        folders
    }

    /// What is wrong with a product's kernels on the cards it is for.
    fn judge(&self, product: &Product, toolkit: &Path, ptx: &Path) -> Result<Vec<String>> {
        let mut breaches = Vec::new();
        let cards = JUDGED_ON.iter().filter(|(target, _)| *target == product.target);
        for card in cards.flat_map(|(_, cards)| *cards) {
            let mut ptxas = Command::new(toolkit.join("bin/ptxas"));
            ptxas.args(["-v", "-o", "/dev/null"]).arg(format!("-arch={card}")).arg(ptx);
            let output = ptxas.output().context("cannot start ptxas")?;
            let report = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() {
                bail!("ptxas refuses {} for {card}: {report}", product.file());
            }
            let kernels = usage(&report);
            if kernels.is_empty() {
                bail!("ptxas reports no kernel of {} for {card}: {report}", product.file());
            }
            breaches.extend(kernels.iter().filter_map(|usage| self.breach(card, usage)));
        }
        Ok(breaches)
    }

    fn breach(&self, card: &str, usage: &Usage) -> Option<String> {
        let Usage { kernel, registers, shared, spills } = usage;
        if *spills > 0 {
            return Some(format!("{kernel} on {card} spills {spills} bytes"));
        }
        let fits = self.budgets.iter().filter(|budget| kernel.starts_with(&budget.prefix));
        match fits.max_by_key(|budget| budget.prefix.len()) {
            None => Some(format!("{kernel} has no budget")),
            Some(budget) if *registers > budget.registers || *shared > budget.shared => {
                let Budget { registers: most, shared: room, .. } = budget;
                Some(format!(
                    "{kernel} on {card} takes {registers} registers and {shared} bytes of shared memory, at most {most} and {room}"
                ))
            }
            Some(_) => None,
        }
    }
}

/// What ptxas says that a kernel takes.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    kernel: String,
    registers: u64,
    /// Bytes of static shared memory.
    shared: u64,
    /// Bytes of spill stores and loads.
    spills: u64,
}

/// Reads the report of `ptxas -v`.
fn usage(report: &str) -> Vec<Usage> {
    /// The number before `unit`.
    fn before(line: &str, unit: &str) -> u64 {
        let words = line.split(unit).next().unwrap_or_default();
        words.rsplit([' ', ',']).find_map(|word| word.parse().ok()).unwrap_or(0)
    }
    let mut list: Vec<Usage> = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().into();
            list.push(Usage { kernel, ..Usage::default() });
        } else if let Some(last) = list.last_mut() {
            if line.contains("bytes spill") {
                let spills = [" bytes spill stores", " bytes spill loads"];
                last.spills += spills.iter().map(|unit| before(line, unit)).sum::<u64>();
            } else if line.contains("Used ") {
                last.registers = before(line, " registers");
                if line.contains(" bytes smem") {
                    last.shared = before(line, " bytes smem");
                }
            }
        }
    }
    list
}

/// Calls `work` on each item, as many at once as there are cores.
fn parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let queue = Mutex::new(items.iter());
    let next = || queue.lock().ok()?.next();
    let run = || -> Result<Vec<R>> {
        let mut done = Vec::new();
        while let Some(item) = next() {
            done.push(work(item)?);
        }
        Ok(done)
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let done = thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        all.into_iter().map(|thread| thread.join().expect("no worker panics")).collect::<Vec<_>>()
    });
    let mut results = Vec::new();
    for part in done {
        results.extend(part?);
    }
    Ok(results)
}

/// Names of sources, headers and PTX, sorted.
fn files(folder: &str) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(sh::root().join(folder)).with_context(|| format!("cannot list {folder}"))?;
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.context("cannot list the kernels")?.file_name().to_string_lossy().into());
    }
    names.retain(|name: &String| [".cu", ".cuh", ".ptx"].iter().any(|end| name.ends_with(end)));
    names.sort();
    Ok(names)
}

/// What the lock file must say of the files as they are: git's hash of each.
fn lock(folder: &str) -> Result<String> {
    let files = files(folder)?;
    let mut git = sh::command("git");
    git.current_dir(sh::root().join(folder)).args(["hash-object", "--no-filters", "--"]);
    let hashes = sh::read(git.args(&files))?;
    let mut text = String::from(
        "# Written by `cargo xtask kernels`: what the PTX was made of, with git's hashes.\n",
    );
    text += &format!("{TOOLKIT}\nflags {FLAGS}\n");
    for (hash, file) in hashes.lines().zip(&files) {
        text += &format!("{hash} {file}\n");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ptx_was_made_of_these_sources() {
        let rules = Rules::read().unwrap();
        for folder in rules.folders() {
            let committed = fs::read_to_string(sh::root().join(folder).join(LOCK)).unwrap();
            assert_eq!(committed, lock(folder).unwrap(), "run `cargo xtask kernels`");
            let own = rules.products.iter().filter(|product| product.folder == folder);
            let mut products: Vec<_> = own.map(Product::file).collect();
            products.sort();
            let mut ptx = files(folder).unwrap();
            ptx.retain(|name| name.ends_with(".ptx"));
            assert_eq!(ptx, products, "run `cargo xtask kernels`");
        }
    }

    #[test]
    fn rules_are_read_and_nonsense_is_refused_by_line() {
        let rules =
            Rules::parse("# a\n\nin a/b\ncompile a.cu compute_80 compute_90a\nbudget a_ 64 1024\n")
                .unwrap();
        let files: Vec<_> = rules.products.iter().map(Product::file).collect();
        assert_eq!(files, ["a.compute_80.ptx", "a.compute_90a.ptx"]);
        for bad in
            ["compile a.cu", "compile a.cu compute_12", "budget a_ many 0", "budget a_ 1", "words"]
        {
            let error = Rules::parse(&format!("\n{bad}\n")).unwrap_err();
            assert!(format!("{error:#}").contains("line 2"), "{bad}: {error:#}");
        }
    }

    const REPORT: &str = "ptxas info    : Compiling entry function 'a_one' for 'sm_80'
ptxas info    : Function properties for a_one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'b_two' for 'sm_80'
ptxas info    : Function properties for b_two
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size, 400 bytes cmem[0]
";

    #[test]
    fn a_kernel_that_spills_or_takes_too_much_is_named() {
        let [one, two] = &usage(REPORT)[..] else { panic!("two kernels") };
        let expected = Usage { kernel: "a_one".into(), registers: 42, shared: 2048, spills: 0 };
        assert_eq!(*one, expected);
        assert_eq!((two.registers, two.shared, two.spills), (255, 0, 20));
        let rules = |text: &str| Rules::parse(text).unwrap();
        assert_eq!(rules("budget a 41 0\nbudget a_ 42 2048").breach("sm_80", one), None);
        for (budget, words) in
            [("a 41 2048", "at most 41"), ("a 42 2047", "and 2047"), ("b 64 0", "no budget")]
        {
            let breach = rules(&format!("budget {budget}")).breach("sm_80", one).unwrap();
            assert!(breach.starts_with("a_one") && breach.contains(words), "{breach}");
        }
        let breach = rules("budget b 255 0").breach("sm_80", two).unwrap();
        assert_eq!(breach, "b_two on sm_80 spills 20 bytes");
    }
}
