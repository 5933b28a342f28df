//! Everything that is not `cargo build`. `cargo xtask` alone prints the list; each task is a file here, and
//! versions and hashes are data in `xtask/*.txt`.

/// A line to standard error, for whoever still reads it: `eprintln` would panic where nobody does.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($line)*);
    }};
}

mod cache;
mod card;
mod ci;
mod demo;
mod fetch;
mod golden;
mod kernels;
mod setup;
mod sh;
mod tidy;
mod wheels;

use std::env;
use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;

struct Task {
    name: &'static str,
    arguments: &'static str,
    help: &'static str,
    run: fn(&[String]) -> Result<()>,
}

const TASKS: &[Task] = &[
    Task {
        name: "setup",
        arguments: "",
        help: "fetch libtorch, or take $LIBTORCH, and point cargo at it",
        run: |_| setup::setup(),
    },
    Task {
        name: "demo",
        arguments: "[argument…]",
        help: "answer from a long text with full and pruned caches (arguments: longctx demo --help)",
        run: demo::demo,
    },
    Task {
        name: "fetch",
        arguments: "",
        help: "fetch the default model and the texts",
        run: |_| fetch::fetch().map(|_| ()),
    },
    Task { name: "ci", arguments: "", help: "every check, cheapest first", run: |_| ci::ci() },
    Task {
        name: "card",
        arguments: "[tool]",
        help: "the tests that need an NVIDIA card, or those of the kernels under a compute-sanitizer tool",
        run: card::card,
    },
    Task {
        name: "tidy",
        arguments: "",
        help: "check who depends on whom, and what may be in the tree",
        run: |_| tidy::tidy(),
    },
    Task {
        name: "kernels",
        arguments: "[--check]",
        help: "compile the CUDA kernels to PTX, or check that the PTX is theirs and within its budget",
        run: kernels::kernels,
    },
    Task {
        name: "golden",
        arguments: "[name…]",
        help: "make the golden files again, in a Python environment of their own",
        run: golden::golden,
    },
];

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let name = arguments.next();
    let arguments: Vec<String> = arguments.collect();
    let Some(task) = TASKS.iter().find(|task| Some(task.name) == name.as_deref()) else {
        return help(name.as_deref());
    };
    if task.arguments.is_empty() && !arguments.is_empty() {
        say!("error: `{}` takes no arguments, found `{}`", task.name, arguments.join(" "));
        return ExitCode::from(2);
    }
    if env::var_os(sh::MANIFEST).is_none() {
        say!("error: run it as `cargo xtask {}`, which tells it the checkout", task.name);
        return ExitCode::from(2);
    }
    match (task.run)(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The list of tasks: asked for, or because `name` is none of them.
fn help(name: Option<&str>) -> ExitCode {
    let mut text = String::from("usage: cargo xtask TASK\n\n");
    for Task { name, arguments, help, .. } in TASKS {
        text += &format!("  {:<20} {help}\n", format!("{name} {arguments}"));
    }
    text += &format!("\nDownloads are kept in ${}, else ~/.cache/longctx.", cache::VARIABLE);
    match name {
        None | Some("help" | "-h" | "--help") => {
            let _ = writeln!(std::io::stdout(), "{text}"); // to `head`, perhaps
            ExitCode::SUCCESS
        }
        Some(name) => {
            say!("error: no task `{name}`\n\n{text}");
            ExitCode::from(2)
        }
    }
}
