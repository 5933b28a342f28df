//! Pieces of text, and what stands around a piece that the model repeats.

use crate::documents;
use crate::fnv::Fnv;
use crate::runner::context_ids;
use anyhow::{Result, bail, ensure};
use kvzap::Spans;
use models::{Model, Specials};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// How many tokens a piece has: one number, or a range like `500-2000` that is drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// The shortest.
    pub least: usize,
    /// The longest.
    pub most: usize,
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = text.split_once('-').unwrap_or((text, text));
        let number =
            |text: &str| text.trim().parse::<usize>().map_err(|e| format!("{text:?}: {e}"));
        let lengths = Self { least: number(least)?, most: number(most)? };
        if lengths.least < 9 || lengths.most < lengths.least {
            return Err("give a number from 9 up, or a range of them such as 500-2000".to_owned());
        }
        Ok(lengths)
    }
}

impl std::fmt::Display for Lengths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { least, most } = self;
        if least == most { write!(f, "{least}") } else { write!(f, "{least}-{most}") }
    }
}

/// Pieces of text, as token ids.
///
/// KVzap trains on "user: text, repeat it; assistant: text" (arXiv 2601.07891, section 3). Here the text is cut from
/// token ids and set between the template's ids, so that both copies have the same tokens whatever surrounds them.
#[derive(Debug)]
pub struct Pieces {
    texts: Vec<Vec<u32>>,
    before: Vec<u32>,
    between: Vec<u32>,
}

impl Pieces {
    /// Cuts `count` pieces out of the documents of `paths`, files or folders of them, in an order that `seed` chooses; each
    /// `together` in a row have one length.
    pub fn cut(
        model: &Model,
        paths: &[PathBuf],
        count: usize,
        lengths: Lengths,
        together: usize,
        seed: u64,
    ) -> Result<Self> {
        let tokenizer = &model.tokenizer;
        let (before, after) = context_ids(model, "")?;
        let between = format!("\n\nRepeat the previous context exactly.{after}");
        let between = tokenizer.encode(&between, Specials::Parse)?;
        let (longest, limit) =
            (2 * lengths.most + before.len() + between.len(), model.lm.config().max_positions);
        ensure!(
            longest <= limit,
            "pieces of {} tokens, twice and with the template, are {longest}; the model reads {limit}; \
             give a smaller --tokens",
            lengths.most
        );

        let mut texts = Vec::new();
        for file in files_of(paths)? {
            texts.extend(documents(&file)?);
        }
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        texts.shuffle(&mut random);
        let mut draw = || {
            let [least, most] = [lengths.least, lengths.most].map(|n| (n as f64).ln());
            let drawn = (least + random.random::<f64>() * (most - least)).exp().round() as usize;
            drawn.clamp(lengths.least, lengths.most)
        };
        let mut pieces: Vec<Vec<u32>> = Vec::new();
        let (mut open, mut wanted) = (Vec::new(), draw());
        // Short documents in a row make pieces too; a long one is cut where a piece is full. A few at a time, as not all
        // may be needed.
        for some in texts.chunks(256) {
            let encoded: Vec<Vec<u32>> = some
                .par_iter()
                .map(|text| tokenizer.encode(&format!("{}\n\n", text.trim()), Specials::Text))
                .collect::<models::Result<_>>()?;
            for mut rest in encoded.iter().map(Vec::as_slice) {
                while !rest.is_empty() && pieces.len() < count {
                    let (head, tail) = rest.split_at((wanted - open.len()).min(rest.len()));
                    open.extend_from_slice(head);
                    rest = tail;
                    if open.len() == wanted {
                        pieces.push(std::mem::take(&mut open));
                        // Those that are read together have one length.
                        if pieces.len().is_multiple_of(together) {
                            wanted = draw();
                        }
                    }
                }
            }
            if pieces.len() == count {
                return Ok(Self { texts: pieces, before, between });
            }
        }
        bail!(
            "{count} pieces of {lengths} tokens wanted, the text holds {}; give more text or ask for fewer",
            pieces.len()
        );
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// The first `count`, and the others.
    pub fn split_at(self, count: usize) -> (Self, Self) {
        let Self { mut texts, before, between } = self;
        let others = texts.split_off(count);
        let others = Self { texts: others, before: before.clone(), between: between.clone() };
        (Self { texts, before, between }, others)
    }

    /// Each as a context: after what the template puts before a user's text, and not repeated.
    pub fn contexts(&self) -> impl Iterator<Item = Vec<u32>> {
        self.texts.iter().map(|text| [&self.before, text].map(Vec::as_slice).concat())
    }

    /// Those of `range` that are next to one another and of one length, to be read together.
    pub fn alike(&self, range: Range<usize>) -> impl Iterator<Item = &[Vec<u32>]> {
        self.texts[range].chunk_by(|a, b| a.len() == b.len())
    }

    /// The ids of a pass over pieces of one length, one after another, and where a piece's two copies stand.
    pub fn repeated(&self, texts: &[Vec<u32>]) -> (Vec<Vec<u32>>, Spans) {
        let length = texts.first().map_or(0, Vec::len);
        let first = self.before.len();
        let second = first + length + self.between.len();
        let spans = Spans { original: first..first + length, repeat: second..second + length };
        let ids =
            |text: &Vec<u32>| [&self.before, text, &self.between, text].map(Vec::as_slice).concat();
        (texts.iter().map(ids).collect(), spans)
    }

    /// A number that other pieces do not have: FNV-1a over all ids.
    pub fn fingerprint(&self) -> u64 {
        let ids = self.texts.iter().flatten().chain(&self.before).chain(&self.between);
        let mut hash = Fnv::default();
        hash.extend(ids.copied());
        hash.0
    }
}

/// All files of files and folders.
pub fn files_of(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    Ok(paths.iter().map(|path| files(path)).collect::<Result<Vec<_>>>()?.concat())
}

/// A file, or all files of a folder and its folders, by name.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    ensure!(
        path.exists(),
        "there is no {}; give files of text or of JSON lines, or folders of them",
        path.display()
    );
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let files = crate::files::entries(path)?
        .iter()
        .map(|path| files(path))
        .collect::<Result<Vec<_>>>()?
        .concat();
    ensure!(
        !files.is_empty(),
        "{} holds no files of text; give files or folders that do",
        path.display()
    );
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_a_number_or_a_range() {
        assert_eq!("480".parse(), Ok(Lengths { least: 480, most: 480 }));
        assert_eq!("500-2000".parse(), Ok(Lengths { least: 500, most: 2000 }));
        for wrong in ["", "8", "x", "9-", "2000-500", "-9"] {
            assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
        }
        assert_eq!(Lengths { least: 9, most: 10 }.to_string(), "9-10");
    }

    #[test]
    fn folders_give_their_files_by_name() {
        let folder = tempfile::tempdir().unwrap();
        assert!(files(folder.path()).unwrap_err().to_string().contains("holds no files"));
        std::fs::create_dir(folder.path().join("a")).unwrap();
        for name in ["b.txt", "a/c.txt"] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let missing = files(&folder.path().join("d")).unwrap_err().to_string();
        assert!(missing.contains("there is no") && missing.contains("give files"), "{missing}");
        let found = files(folder.path()).unwrap();
        assert_eq!(found, [folder.path().join("a/c.txt"), folder.path().join("b.txt")]);
    }
}
