//! Folders of results as kvpress's `evaluate.py` names and fills them, so that its tools read ours.

use super::{Journal, Row, Settings, Summary};
use crate::files;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

/// What a folder's name says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Name {
    /// `ruler`, `longbench`, …
    pub dataset: String,
    /// Which part of it: a length, a data set; may be empty.
    pub data_dir: String,
    /// The model; `/` becomes `--`.
    pub model: String,
    /// kvpress's name of the method.
    pub press: String,
    /// The threshold of a method that has one, else the share removed.
    pub level: f64,
    /// What is unusual, such as `max_context4096`.
    pub more: Vec<String>,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { dataset, data_dir, model, press, level, more } = self;
        let (model, level) = (model.replace('/', "--"), format!("{level:.2}"));
        let parts = [dataset, data_dir, &model, press, &level].into_iter().chain(more);
        let parts: Vec<&str> = parts.map(String::as_str).filter(|part| !part.is_empty()).collect();
        f.write_str(&parts.join("__"))
    }
}

/// Writes `predictions.csv`, `metrics.json` and `config.yaml` from the journals of `folder`, each beside and then in place.
pub fn write(folder: &Path, summary: Summary, config: &[(&str, Value)]) -> Result<()> {
    let (settings, mut rows) = Journal::merged(folder)?;
    rows.sort_by(|a, b| (&a.task, a.index).cmp(&(&b.task, b.index)));
    place(folder, "predictions.csv", &predictions(&rows, summary)?)?;
    place(folder, "config.yaml", yaml(config, &settings).as_bytes())?;
    let mut metrics = Vec::new();
    let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut writer = serde_json::Serializer::with_formatter(&mut metrics, indent);
    serde::Serialize::serialize(&summary.metrics(&rows), &mut writer)?;
    place(folder, "metrics.json", &metrics)
}

fn place(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    let write = || -> std::io::Result<()> {
        let mut file = files::beside(&path)?;
        file.write_all(bytes)?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| super::journal::no_place(&path))
}

/// Every column of the data set but the context, then the two that kvpress adds, then what we know beside.
fn predictions(rows: &[Row], summary: Summary) -> Result<Vec<u8>> {
    let facts: BTreeSet<&String> = rows.iter().flat_map(|row| row.facts.keys()).collect();
    let answers = summary.answers();
    let mut csv =
        csv::WriterBuilder::new().terminator(csv::Terminator::Any(b'\n')).from_writer(Vec::new());
    let mut header = vec!["task", "question", "answer_prefix", answers, "max_new_tokens"];
    header.extend(facts.iter().map(|name| name.as_str()).filter(|name| *name != "task"));
    header.extend(["predicted_answer", "compression_ratio", "score"]);
    csv.write_record(&header)?;
    for row in rows {
        let mut record = vec![
            row.task.clone(),
            row.question.clone(),
            row.answer_prefix.clone(),
            if summary.one_answer() { row.answers.concat() } else { python_list(&row.answers) },
            row.max_new_tokens.to_string(),
        ];
        record.extend(facts.iter().filter(|name| *name != &"task").map(|name| {
            match row.facts.get(*name) {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(items)) => {
                    let items = items
                        .iter()
                        .map(|item| item.as_str().map_or(item.to_string(), str::to_owned));
                    python_list(&items.collect::<Vec<_>>())
                }
                Some(value) => value.to_string(),
                None => String::new(),
            }
        }));
        record.extend([
            row.predicted_answer.clone(),
            row.compression_ratio.to_string(),
            row.score.to_string(),
        ]);
        csv.write_record(&record)?;
    }
    csv.into_inner().map_err(|error| error.into_error().into())
}

/// As Python prints a list of strings, which is what its readers evaluate.
fn python_list(items: &[String]) -> String {
    let quoted = |item: &String| {
        let quote = if item.contains('\'') && !item.contains('"') { '"' } else { '\'' };
        let mut text = String::from(quote);
        for c in item.chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                c if c == quote => text.extend(['\\', c]),
                c => text.push(c),
            }
        }
        text.push(quote);
        text
    };
    format!("[{}]", items.iter().map(quoted).collect::<Vec<_>>().join(", "))
}

/// kvpress's fields in its order, then all settings under a name of ours. JSON's scalars are YAML's.
fn yaml(config: &[(&str, Value)], settings: &Settings) -> String {
    let mut text: String =
        config.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
    text.push_str("longctx:\n");
    text.extend(settings.iter().map(|(name, value)| format!("  {name}: {value}\n")));
    text
}

/// Reads a `predictions.csv` of ours or of kvpress: each row's task, answers, prediction and share removed.
///
/// # Errors
/// If a column is missing, or a cell is not what its column holds; with row and column.
pub fn read_predictions(path: &Path) -> Result<Vec<Row>> {
    let named = || format!("{} is no CSV file, or cut off; copy it again", path.display());
    let text = files::bytes(path)?;
    let mut csv = csv::Reader::from_reader(&*text);
    let header = csv.headers().with_context(named)?.clone();
    let column = |name: &str| header.iter().position(|column| column == name);
    let wanted = |names: &[&str]| {
        names.iter().find_map(|name| column(name)).with_context(|| {
            format!("{} has no column {}: is it kvpress's predictions?", path.display(), names[0])
        })
    };
    let (prediction, answer) = (wanted(&["predicted_answer"])?, wanted(&["answer", "answers"])?);
    let (task, ratio) = (column("task"), column("compression_ratio"));
    let mut rows = Vec::new();
    for (index, record) in (0..).zip(csv.records()) {
        let record = record.with_context(named)?;
        let cell = |column: Option<usize>| column.and_then(|c| record.get(c)).unwrap_or_default();
        let wrong = |column: &str, found: &str| {
            let line = index + 2;
            format!("{} row {line}, column {column}: cannot read {found:?}", path.display())
        };
        let ratio = cell(ratio);
        rows.push(Row {
            task: cell(task).to_owned(),
            index,
            answers: crate::records::answers(&Value::from(cell(Some(answer))))
                .with_context(|| wrong(&header[answer], cell(Some(answer))))?,
            predicted_answer: cell(Some(prediction)).to_owned(),
            compression_ratio: match ratio {
                "" => 0.0,
                ratio => ratio.parse().with_context(|| wrong("compression_ratio", ratio))?,
            },
            ..Row::default()
        });
    }
    Ok(rows)
}
