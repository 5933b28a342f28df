//! RULER's material, each file read when it is first asked for.

use super::qa::Questions;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::cell::OnceCell;
use std::path::{Path, PathBuf};

/// The line that is repeated where a text says nothing.
pub const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// The folder of essays, questions and lists of words that `cargo xtask fetch` fills.
#[derive(Debug)]
pub struct Texts {
    folder: PathBuf,
    essays: OnceCell<Vec<String>>,
    nouns: OnceCell<Vec<String>>,
    adjectives: OnceCell<Vec<String>>,
    words: OnceCell<Vec<String>>,
    squad: OnceCell<Questions>,
    hotpot: OnceCell<Questions>,
}

impl Texts {
    /// What the folder holds.
    pub const FILES: [&str; 6] = [
        "PaulGrahamEssays.json",
        "squad.json",
        "hotpotqa.json",
        "nounlist.txt",
        "adjectivelist.txt",
        "verblist.txt",
    ];

    /// What lies in `folder`, under the names that RULER and wonderwords give it.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            essays: OnceCell::new(),
            nouns: OnceCell::new(),
            adjectives: OnceCell::new(),
            words: OnceCell::new(),
            squad: OnceCell::new(),
            hotpot: OnceCell::new(),
        }
    }

    /// The words of `PaulGrahamEssays.json`.
    pub(crate) fn essays(&self) -> Result<&[String]> {
        #[derive(Deserialize)]
        struct Essays {
            text: String,
        }
        let read = |text: &str| {
            let Essays { text } = serde_json::from_str(text)?;
            Ok(text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        };
        let essays = self.file(&self.essays, "PaulGrahamEssays.json", read)?;
        ensure!(!essays.is_empty(), "PaulGrahamEssays.json has no words: fetch it again");
        Ok(essays)
    }

    /// `nounlist.txt`.
    pub(super) fn nouns(&self) -> Result<&[String]> {
        self.list(&self.nouns, "nounlist.txt")
    }

    /// `adjectivelist.txt`.
    pub(super) fn adjectives(&self) -> Result<&[String]> {
        self.list(&self.adjectives, "adjectivelist.txt")
    }

    /// Nouns, adjectives and verbs, sorted, each once.
    pub(super) fn words(&self) -> Result<&[String]> {
        if let Some(words) = self.words.get() {
            return Ok(words);
        }
        let verbs = OnceCell::new();
        let lists = [self.nouns()?, self.adjectives()?, self.list(&verbs, "verblist.txt")?];
        let mut words = lists.concat();
        words.sort_unstable();
        words.dedup();
        Ok(self.words.get_or_init(|| words))
    }

    /// `squad.json`.
    pub(crate) fn squad(&self) -> Result<&Questions> {
        self.file(&self.squad, "squad.json", Questions::squad)
    }

    /// `hotpotqa.json`.
    pub(crate) fn hotpot(&self) -> Result<&Questions> {
        self.file(&self.hotpot, "hotpotqa.json", Questions::hotpot)
    }

    fn list<'a>(&self, cell: &'a OnceCell<Vec<String>>, name: &str) -> Result<&'a [String]> {
        let lines = |text: &str| Ok(text.lines().map(|line| line.trim_end().to_owned()).collect());
        let list = self.file(cell, name, lines)?;
        ensure!(!list.is_empty(), "{}/{name} is empty: fetch it again", self.folder.display());
        Ok(list)
    }

    fn file<'a, V>(
        &self,
        cell: &'a OnceCell<V>,
        name: &str,
        parse: impl Fn(&str) -> Result<V>,
    ) -> Result<&'a V> {
        if let Some(value) = cell.get() {
            return Ok(value);
        }
        let path = self.folder.join(name);
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("cannot read {}; `cargo xtask fetch` gets RULER's material", path.display())
        })?;
        let value = parse(&text)
            .with_context(|| format!("{} is not RULER's: fetch it again", path.display()))?;
        Ok(cell.get_or_init(|| value))
    }
}
