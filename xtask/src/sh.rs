//! Child processes. Each is printed, so that a person can run it alone, and runs at the root unless told otherwise.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

/// What cargo tells a process it runs. The folder where xtask was compiled will not do: checkouts that share a
/// target directory share one binary, and it would write into the wrong one.
pub const MANIFEST: &str = "CARGO_MANIFEST_DIR";

/// The root of the checkout.
pub fn root() -> PathBuf {
    let mut root = PathBuf::from(env::var_os(MANIFEST).unwrap_or_default());
    root.pop();
    root
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into()))
}

/// A command at the root.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// The cargo that runs us, under our configuration alone: an exported `RUSTFLAGS` would replace the rpath to
/// libtorch, and an inherited `LIBTORCH` would win over what `setup` has just written.
pub fn cargo() -> Command {
    let mut command = command(env::var_os("CARGO").unwrap_or("cargo".into()));
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTDOCFLAGS", "LIBTORCH"] {
        command.env_remove(name);
    }
    command
}

/// Cargo as it is for someone who has no libtorch: outside the checkout, where our configuration does not reach,
/// on the manifest at `manifest`, and building apart, since other flags would rebuild what the rest has built.
pub fn cargo_without_libtorch(task: &str, manifest: &str) -> Command {
    let mut command = cargo();
    command.current_dir("/").arg(task).arg("--manifest-path").arg(root().join(manifest));
    command.env("CARGO_TARGET_DIR", target().join("leaves"));
    command
}

/// Runs `command` with our input and output.
pub fn run(command: &mut Command) -> Result<()> {
    let line = print(command);
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    succeeded(&line, status)
}

/// Runs `command` and returns what it wrote to its output.
pub fn read(command: &mut Command) -> Result<String> {
    let line = print(command);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    succeeded(&line, output.status)?;
    String::from_utf8(output.stdout).with_context(|| format!("`{line}` wrote what is not UTF-8"))
}

fn succeeded(line: &str, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("`{line}` failed with {status}");
    }
    Ok(())
}

/// Prints `command` and returns its beginning, enough to tell in an error which of the printed ones failed.
fn print(command: &Command) -> String {
    let line = line(command);
    say!("$ {line}");
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let mut words: Vec<_> =
        words.map(|word| Path::new(word).file_name().unwrap_or(word)).map(quoted).collect();
    if words.len() > 4 {
        words.truncate(4);
        words.push("…".into());
    }
    words.join(" ")
}

/// `command` as a shell would take it, without the variables taken away.
fn line(command: &Command) -> String {
    let mut words = Vec::new();
    if let Some(folder) =
        command.get_current_dir().filter(|folder| folder.is_absolute() && *folder != root())
    {
        words.push(format!("cd {} &&", quoted(folder.as_os_str())));
    }
    for (name, value) in command.get_envs() {
        words.extend(value.map(|value| format!("{}={}", name.display(), quoted(value))));
    }
    let program = command.get_program();
    let cargo = env::var_os("CARGO").is_some_and(|cargo| cargo == program);
    words.push(if cargo { "cargo".into() } else { quoted(program) });
    words.extend(command.get_args().map(quoted));
    words.join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_=+.,:/@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_command_can_be_pasted() {
        let mut command = command("python3");
        command.args(["-c", "print('a b')", ""]).env("A", "1 2").env_remove("B");
        assert_eq!(line(&command), r"A='1 2' python3 -c 'print('\''a b'\'')' ''");
        command.current_dir("/");
        assert!(line(&command).starts_with("cd / && A="));
    }

    #[test]
    fn a_failing_child_is_an_error_that_names_it() {
        let error = run(command("false").arg("x")).unwrap_err();
        assert!(format!("{error:#}").contains("`false x` failed with exit status: 1"));
        let error = read(&mut command("no-such-program")).unwrap_err();
        assert!(format!("{error:#}").contains("cannot start `no-such-program`"));
    }
}
