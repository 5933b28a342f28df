//! Text to hide things in.

use crate::files;
use anyhow::{Result, bail};
use serde_json::Value;
use std::path::Path;

/// A long text, cut into sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Haystack {
    sentences: Vec<String>,
}

impl Haystack {
    /// Reads a plain text, or one of the JSON files that RULER brings: its essays (`{"text": …}`), SQuAD
    /// (`{"data": [{"paragraphs": [{"context": …}]}]}`), HotpotQA (`[{"context": [[title, [sentence]]]}]`).
    pub fn load(path: &Path) -> Result<Self> {
        Ok(Self::new(&documents(path)?.join("\n")))
    }

    /// Cuts `text` after a full stop, question or exclamation mark that white space follows.
    pub fn new(text: &str) -> Self {
        let mut sentences = Vec::new();
        let mut start = 0;
        let mut previous = ' ';
        for (at, c) in text.char_indices() {
            if c.is_whitespace() && matches!(previous, '.' | '?' | '!') {
                push(&mut sentences, &text[start..at]);
                start = at;
            }
            previous = c;
        }
        push(&mut sentences, &text[start..]);
        Self { sentences }
    }

    /// Its sentences, white space inside them as single spaces.
    pub fn sentences(&self) -> &[String] {
        &self.sentences
    }
}

fn push(sentences: &mut Vec<String>, text: &str) {
    let words: Vec<&str> = text.split_whitespace().collect();
    if !words.is_empty() {
        sentences.push(words.join(" "));
    }
}

/// The documents of a file: of `.jsonl` the field `text` of each line, of `.json` one of the layouts that
/// [`Haystack::load`] names, of anything else the whole as one.
pub fn documents(path: &Path) -> Result<Vec<String>> {
    let text = files::text(path)?;
    let named = |e: serde_json::Error| anyhow::anyhow!("{}: not JSON: {e}", path.display());
    let documents = match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl") => {
            let line = |line: &str| {
                Ok(serde_json::from_str::<Value>(line).map_err(named)?["text"].clone())
            };
            let lines: Vec<Value> =
                text.lines().filter(|l| !l.trim().is_empty()).map(line).collect::<Result<_>>()?;
            strings(&lines)
        }
        Some("json") => json_documents(&serde_json::from_str(&text).map_err(named)?),
        _ => vec![text],
    };
    if documents.iter().all(|d| d.trim().is_empty()) {
        bail!(
            "{} holds no text; wanted plain text, JSON lines with a field `text`, or RULER's essays, SQuAD or HotpotQA",
            path.display()
        );
    }
    Ok(documents)
}

fn json_documents(json: &Value) -> Vec<String> {
    let items = |value: &Value| value.as_array().cloned().unwrap_or_default();
    if let Some(text) = json["text"].as_str() {
        return vec![text.to_owned()];
    }
    let squad = items(&json["data"]);
    if !squad.is_empty() {
        let article = |article: &Value| {
            let contexts: Vec<Value> =
                items(&article["paragraphs"]).iter().map(|p| p["context"].clone()).collect();
            strings(&contexts).join("\n")
        };
        return squad.iter().map(article).collect();
    }
    let mut seen = std::collections::HashSet::new();
    let mut paragraphs = Vec::new();
    for question in items(json) {
        for paragraph in items(&question["context"]) {
            let title = paragraph[0].as_str().unwrap_or_default().to_owned();
            if seen.insert(title) {
                paragraphs.push(strings(&items(&paragraph[1])).concat());
            }
        }
    }
    paragraphs
}

fn strings(values: &[Value]) -> Vec<String> {
    values.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_at_marks_that_white_space_follows() {
        let haystack = Haystack::new("One is 1.5 here.  Two\nlines? Three! four");
        assert_eq!(haystack.sentences(), ["One is 1.5 here.", "Two lines?", "Three!", "four"]);
    }

    #[test]
    fn each_known_layout_gives_its_documents() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            documents(&path).map_err(|e| e.to_string())
        };
        assert_eq!(read("a.txt", "x y").unwrap(), ["x y"]);
        assert_eq!(read("a.jsonl", "{\"text\":\"x\"}\n\n{\"text\":\"y\"}\n").unwrap(), ["x", "y"]);
        assert_eq!(read("a.json", "{\"text\":\"x\"}").unwrap(), ["x"]);
        let squad = r#"{"data":[{"paragraphs":[{"context":"p"},{"context":"q"}]},{"paragraphs":[{"context":"r"}]}]}"#;
        assert_eq!(read("b.json", squad).unwrap(), ["p\nq", "r"]);
        let hotpot =
            r#"[{"context":[["A",["s "," t"]],["B",["u"]]]},{"context":[["A",["s"," t"]]]}]"#;
        assert_eq!(read("c.json", hotpot).unwrap(), ["s  t", "u"]);
        assert!(read("d.json", "[1, 2]").unwrap_err().contains("holds no text"));
        assert!(read("e.json", "{").unwrap_err().contains("not JSON"));
    }
}
