//! Published data sets: JSON lines, a sample a line, and parquet, a sample a row.

#[cfg(feature = "parquet")]
mod parquet;
#[cfg(test)]
mod tests;

use crate::files;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// One line.
pub type Record = Map<String, Value>;

/// Files of samples by how they end, those that this build reads.
const ENDS: &[&str] = if cfg!(feature = "parquet") { &["jsonl", "parquet"] } else { &["jsonl"] };

/// The data sets of `path`: a file is one; of a folder each file is one, and each folder in it that has files. A folder whose
/// files are parts of one data set, as the hub cuts them, is one.
#[cfg(any(feature = "models", all(feature = "parquet", test)))] // only the command takes several
pub fn sets(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() || is_one(path)? {
        return Ok(vec![path.to_owned()]);
    }
    let mut sets = files_in(path)?;
    for below in files::entries(path)?.into_iter().filter(|below| below.is_dir()) {
        if is_one(&below)? {
            sets.push(below);
        } else {
            sets.extend(files_in(&below)?);
        }
    }
    sets.sort();
    ensure!(!sets.is_empty(), nothing_in(path)?);
    for (at, set) in sets.iter().enumerate() {
        let twin = sets[..at].iter().find(|other| name(other) == name(set));
        if let Some(twin) = twin {
            let (twin, set, name) = (twin.display(), set.display(), name(set));
            bail!("{twin} and {set} are both a data set {name}; remove or rename one");
        }
    }
    Ok(sets)
}

/// The name of a data set: its file's, or its folder's where the file is a part, such as `test-00000-of-00002.parquet`.
pub fn name(path: &Path) -> String {
    let own = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let own = own.unwrap_or_default().to_string_lossy().into_owned();
    match path.parent() {
        Some(folder) if is_part(path) && folder.file_name().is_some() => name(folder),
        _ => own,
    }
}

/// The files of samples that `path` is or holds, sorted.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        ensure!(
            is_samples(path),
            "{} is no file of samples: its name must end in .{}",
            path.display(),
            ENDS.join(" or .")
        );
        return Ok(vec![path.to_owned()]);
    }
    let files = files_in(path)?;
    ensure!(!files.is_empty(), nothing_in(path)?);
    Ok(files)
}

fn is_samples(path: &Path) -> bool {
    path.extension().is_some_and(|end| ENDS.iter().any(|known| end == *known))
}

/// `test-00000-of-00002.parquet`.
fn is_part(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let mut words = stem.rsplitn(4, '-');
    let [all, of, part] = [words.next(), words.next(), words.next()].map(Option::unwrap_or_default);
    let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    number(all) && of == "of" && number(part) && words.next().is_some()
}

#[cfg(any(feature = "models", all(feature = "parquet", test)))]
fn is_one(folder: &Path) -> Result<bool> {
    let files = files_in(folder)?;
    Ok(!files.is_empty() && files.iter().all(|file| is_part(file)))
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = files::entries(folder)?;
    files.retain(|path| path.is_file() && is_samples(path));
    Ok(files)
}

fn nothing_in(folder: &Path) -> Result<String> {
    let mut text =
        format!("{} holds no files that end in .{}", folder.display(), ENDS.join(" or ."));
    let below = files::entries(folder)?;
    let below: Vec<String> =
        below.iter().filter(|path| path.is_dir()).map(|path| name(path)).collect();
    if !below.is_empty() {
        text += &format!("; it has folders: give one of {}", below.join(", "));
    }
    Ok(text)
}

/// The samples of a file, or of all files of a folder.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for file in files(path)? {
        let before = records.len();
        match file.extension().and_then(|end| end.to_str()) {
            #[cfg(feature = "parquet")]
            Some("parquet") => records.extend(parquet::read(&file)?),
            _ => records.extend(read_lines(&file)?),
        }
        ensure!(records.len() > before, "{} holds no samples; fetch it again", file.display());
    }
    Ok(records)
}

fn read_lines(path: &Path) -> Result<Vec<Record>> {
    let bytes = files::bytes(path)?;
    let lines = (1..).zip(bytes.split(|&byte| byte == b'\n'));
    let filled = lines.filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace));
    let record = |(number, line): (usize, &[u8])| {
        serde_json::from_slice(line).with_context(|| {
            format!(
                "{} line {number} is no JSON object, or cut off; fetch the file again",
                path.display()
            )
        })
    };
    filled.map(record).collect()
}

/// The text of a field.
pub fn text<'a>(record: &'a Record, field: &str) -> Result<&'a str> {
    match value(record, field)? {
        Value::String(text) => Ok(text),
        other => bail!("field {field} is {}, wanted a string; {ADVICE}", kind(other)),
    }
}

/// What a field holds.
pub fn value<'a>(record: &'a Record, field: &str) -> Result<&'a Value> {
    record.get(field).with_context(|| format!("field {field} is missing; {ADVICE}"))
}

/// What to say of samples that are not as they should be.
pub const ADVICE: &str = "are these samples of this --task? see longctx eval --list";

/// The right answers that a cell holds: a list, one string, a number, or a list as Python or numpy prints it
/// (`['70']`, `['1' '2']`), since such columns go through CSV files.
pub fn answers(value: &Value) -> Result<Vec<String>> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => bail!("an answer is {}, wanted a string or a number", kind(other)),
    };
    let found = match value {
        Value::Array(items) => items.iter().map(one).collect::<Result<_>>()?,
        Value::String(text) => match printed_list(text) {
            Some(items) => items,
            None => vec![text.clone()],
        },
        other => vec![one(other)?],
    };
    ensure!(!found.is_empty(), "the list of answers is empty");
    Ok(found)
}

/// The strings of a list that Python printed; `None` if the text is no such list.
fn printed_list(text: &str) -> Option<Vec<String>> {
    let mut inside = text.trim().strip_prefix('[')?.strip_suffix(']')?.chars().peekable();
    let mut items = Vec::new();
    loop {
        while inside.next_if(|c| c.is_whitespace() || *c == ',').is_some() {}
        let Some(quote) = inside.next() else { return Some(items) };
        if !matches!(quote, '\'' | '"') {
            return None;
        }
        let mut item = String::new();
        loop {
            match inside.next()? {
                c if c == quote => break,
                '\\' => item.push(match inside.next()? {
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    c => c,
                }),
                c => item.push(c),
            }
        }
        items.push(item);
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// For each record the number of the first that has the same text in `field`.
pub fn groups(records: &[Record], field: &str) -> Vec<u64> {
    let mut first = std::collections::HashMap::new();
    let texts = records.iter().map(|record| record.get(field).and_then(Value::as_str));
    (0..).zip(texts).map(|(number, text)| *first.entry(text).or_insert(number)).collect()
}
