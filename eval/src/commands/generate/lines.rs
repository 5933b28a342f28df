//! The requests of a batch: a JSON object a line.

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// One line. What it leaves out is the command's.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// Named again beside the answer; the line's number if left out.
    pub id: Option<Value>,
    /// What is read and pruned before the question is seen.
    pub prompt: Option<String>,
    /// A conversation, in place of a prompt.
    pub messages: Option<Vec<Turn>>,
    /// About the prompt.
    pub question: Option<String>,
    pub max_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub seed: Option<u64>,
    pub priority: Option<i8>,
}

/// One turn of a conversation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turn {
    pub role: String,
    pub content: String,
}

impl Line {
    fn check(&self) -> Result<()> {
        match (&self.prompt, &self.messages) {
            (Some(_), Some(_)) => bail!("it has both prompt and messages; give one of them"),
            (None, None) => bail!("it has neither prompt nor messages; give one of them"),
            (Some(prompt), _) => ensure!(!prompt.trim().is_empty(), "its prompt is empty"),
            (_, Some(turns)) => {
                ensure!(!turns.is_empty(), "its messages are empty; give at least one");
                ensure!(
                    self.question.is_none(),
                    "a question is about a prompt; make it the last of the messages"
                );
            }
        }
        ensure!(self.max_tokens != Some(0), "max_tokens is 0; ask for at least 1");
        Ok(())
    }
}

/// The lines of `path`, with their numbers. All of them are checked before one is answered.
pub fn read(path: &Path) -> Result<Vec<(usize, Line)>> {
    let bytes = if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes)
            .context("cannot read standard input; give --batch a file")?;
        bytes
    } else {
        std::fs::read(path).with_context(|| {
            let path = path.display();
            format!(
                "cannot read {path}; --batch takes a file of JSON lines, or - for standard input"
            )
        })?
    };
    let mut lines = Vec::new();
    for (number, bytes) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let line = parse(bytes).and_then(|line| line.check().map(|()| line));
        let line = line.with_context(|| {
            format!(
                "{} line {number}: wanted {{\"prompt\": TEXT}} or {{\"messages\": [{{\"role\": …, \"content\": …}}]}}, \
                 and question, max_tokens, temperature, top_k, top_p, seed, priority, id as you like",
                path.display()
            )
        })?;
        lines.push((number, line));
    }
    ensure!(!lines.is_empty(), "{} holds no requests; give a JSON object a line", path.display());
    Ok(lines)
}

fn parse(bytes: &[u8]) -> Result<Line> {
    // serde would take a list for a struct too.
    ensure!(bytes.trim_ascii_start().starts_with(b"{"), "it is no JSON object");
    serde_json::from_slice(bytes).map_err(|error| {
        // Its text ends in a line and a column, and the line is 1 in each of ours.
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or_default();
        anyhow!("{what}, at column {}", error.column())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("batch.jsonl");
        std::fs::write(&path, text).unwrap();
        format!("{:#}", read(&path).unwrap_err())
    }

    #[test]
    fn a_bad_line_is_named_with_its_number_and_what_is_wrong() {
        let good = "{\"prompt\": \"Hello\"}\n\n";
        for (line, wrong) in [
            ("{\"prompt\": \"a\"", "EOF while parsing an object, at column 14"),
            ("[1]", "it is no JSON object"),
            ("{\"promt\": \"a\"}", "unknown field `promt`, expected one of `id`, `prompt`"),
            ("{\"prompt\": 7}", "invalid type: integer `7`, expected a string"),
            ("{\"question\": \"a\"}", "neither prompt nor messages"),
            ("{\"prompt\": \"a\", \"messages\": []}", "both prompt and messages"),
            ("{\"prompt\": \" \"}", "its prompt is empty"),
            ("{\"messages\": []}", "its messages are empty"),
            ("{\"messages\": [{\"role\": \"user\"}]}", "missing field `content`"),
            (
                "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"question\": \"b\"}",
                "the last of the messages",
            ),
            ("{\"prompt\": \"a\", \"max_tokens\": 0}", "at least 1"),
            ("{\"prompt\": \"a\", \"max_tokens\": -1}", "invalid value: integer `-1`"),
            ("\u{1}", "it is no JSON object"),
            ("{\"prompt\": \"a\"} {", "trailing characters, at column 17"),
        ] {
            let text = refused(&format!("{good}{line}\n{good}"));
            assert!(text.contains("batch.jsonl line 3: wanted"), "{text}");
            assert!(text.contains(wrong), "{text}");
        }
        assert!(refused("\n \n").contains("holds no requests"));
    }

    #[test]
    fn lines_without_an_end_and_of_windows_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("batch.jsonl");
        std::fs::write(&path, "{\"prompt\": \"a\"}\r\n{\"prompt\": \"b\", \"id\": [1]}").unwrap();
        let lines = read(&path).unwrap();
        assert_eq!(lines.iter().map(|line| line.0).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(lines[1].1.id, Some(serde_json::json!([1])));
    }
}
