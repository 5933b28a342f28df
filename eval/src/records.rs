//! Published data sets: JSON lines, a sample a line.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// One line.
pub type Record = Map<String, Value>;

/// The `.jsonl` files of `path`, which is one of them or a folder of them, sorted.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let is_lines = |path: &Path| path.extension().is_some_and(|end| end == "jsonl");
    if path.is_file() {
        ensure!(
            is_lines(path),
            "{} is not a .jsonl file; of a parquet file write one, a JSON object a row",
            path.display()
        );
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| {
        format!("cannot read {}: it is neither file nor folder", path.display())
    })?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| is_lines(path))
        .collect();
    ensure!(!files.is_empty(), "{} holds no .jsonl files", path.display());
    files.sort();
    Ok(files)
}

/// The objects of a file of JSON lines.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut records = Vec::new();
    for (number, line) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let record = serde_json::from_slice(line).with_context(|| {
            format!(
                "{} line {number} is no JSON object, or cut off; fetch the file again",
                path.display()
            )
        })?;
        records.push(record);
    }
    ensure!(!records.is_empty(), "{} holds no samples", path.display());
    Ok(records)
}

/// The text of a field.
pub fn text<'a>(record: &'a Record, field: &str) -> Result<&'a str> {
    match record.get(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => bail!("field {field} is {}, wanted a string", kind(other)),
        None => bail!("field {field} is missing"),
    }
}

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
    let context = |record: &Record| record.get(field).map_or(String::new(), Value::to_string);
    let number = |(number, record): (u64, &Record)| *first.entry(context(record)).or_insert(number);
    (0..).zip(records).map(number).collect()
}
