//! Where a model puts the tokens of a text: every position of every layer and head, and a page that shows them.

use anyhow::{Context, Result, bail};
use models::{Dense, Hooks, Model, Specials, WINDOW};
use repo_pos::Pattern;
use serde::Serialize;
use std::sync::{Arc, Mutex, PoisonError};
use tch::Tensor;

/// What [`Positions::page`] fills.
const PAGE: &str = include_str!("positions/page.html");
const PLACE: &str = "{{DATA}}";

/// The positions of a text's tokens, and of a question's after it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Positions {
    /// The model, for a title.
    pub model: String,
    /// Each token as text.
    pub tokens: Vec<String>,
    /// The question's first token; as many as there are tokens where there is no question.
    pub question: usize,
    /// Layers of the model, learned positions or not.
    pub layers: usize,
    /// The heads with learned positions: layers in order, kv heads in each.
    pub heads: Vec<Head>,
    /// The text's tokens that most heads bring near the question, best first.
    pub near: Vec<Near>,
}

/// One kv head's positions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Head {
    /// Its layer, from 0.
    pub layer: usize,
    /// Its place among the layer's kv heads, from 0.
    pub head: usize,
    /// Of each token.
    pub positions: Vec<f32>,
    /// The smallest and the largest.
    pub range: [f32; 2],
    /// Shares of its chunks that are constant, monotone and hybrid.
    pub patterns: [f64; 3],
}

/// A token that stands far from a question in the text and near it in some heads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Near {
    /// Its place in the text.
    pub token: usize,
    /// Heads in which it is among the nearest.
    pub heads: usize,
}

/// Tokens of the text that count as a head's nearest.
const NEAREST: usize = 16;
/// Tokens that are listed.
const LISTED: usize = 24;

impl Positions {
    /// Reads `text` and `question` in one pass. Of a text longer than `limit` tokens the last are left out.
    pub fn read(
        model: &Model,
        name: String,
        text: &str,
        question: &str,
        limit: usize,
    ) -> Result<Self> {
        let mut ids = model.tokenizer.encode(text, Specials::Text)?;
        ids.truncate(limit);
        let first = ids.len();
        if !question.is_empty() {
            ids.extend(model.tokenizer.encode(question, Specials::Parse)?);
        }
        if first == 0 {
            bail!("the text is empty; give --prompt TEXT or --file FILE");
        }
        let config = model.lm.config();
        let most = config.max_positions;
        if ids.len() > most {
            bail!(
                "{} tokens do not fit the model's context of {most}; give a smaller --limit",
                ids.len()
            );
        }
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let on_positions = move |layer: usize, positions: &Tensor| {
            let positions = positions.f_squeeze_dim(0).and_then(|z| Vec::<Vec<f32>>::try_from(&z));
            sink.lock().unwrap_or_else(PoisonError::into_inner).push((layer, positions));
        };
        let hooks = Hooks { on_positions: Some(Box::new(on_positions)), ..Hooks::default() };
        let input: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let input = Tensor::f_from_slice(&input)?.f_to_device(model.device)?.f_unsqueeze(0)?;
        let _ = model.lm.forward(&input, &mut Dense::new(config.layers, WINDOW), &hooks)?;
        let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        let mut heads = Vec::new();
        for (layer, positions) in seen {
            let positions = positions.with_context(|| format!("the positions of layer {layer}"))?;
            heads.extend(
                positions.into_iter().enumerate().map(|(head, z)| Head::new(layer, head, z)),
            );
        }
        if heads.is_empty() {
            bail!("{name} has no learned positions; give a RePo checkpoint, or --repo FILE");
        }
        let tokens = ids.iter().map(|&id| Ok(model.tokenizer.decode(&[id], false)?));
        let tokens = tokens.collect::<Result<_>>()?;
        let near = near(&heads, first, ids.len());
        Ok(Self { model: name, tokens, question: first, layers: config.layers, heads, near })
    }

    /// One HTML file that shows them and asks nothing of the network.
    pub fn page(&self) -> Result<String> {
        // `<` is only ever inside a string, where it may be written so; nothing in a token ends the script.
        let data = serde_json::to_string(self)?.replace('<', "\\u003c");
        Ok(PAGE.replacen(PLACE, &data, 1))
    }
}

impl Head {
    fn new(layer: usize, head: usize, positions: Vec<f32>) -> Self {
        let range = positions
            .iter()
            .fold([f32::INFINITY, f32::NEG_INFINITY], |[low, high], &z| [low.min(z), high.max(z)]);
        let chunks = Pattern::chunks(&positions);
        let share = |pattern| {
            chunks.iter().filter(|&&chunk| chunk == pattern).count() as f64
                / chunks.len().max(1) as f64
        };
        let patterns = [Pattern::Constant, Pattern::Monotone, Pattern::Hybrid].map(share);
        Self { layer, head, positions, range, patterns }
    }
}

/// A token counts in a head where it is among the [`NEAREST`] of the text to any of the question's tokens there, and is not
/// in the text's last quarter, which plain rotary embedding brings near as well.
fn near(heads: &[Head], question: usize, tokens: usize) -> Vec<Near> {
    let mut counts = vec![0; question];
    for head in heads.iter().filter(|_| question < tokens) {
        let asked = &head.positions[question..];
        let mut distances: Vec<(f32, usize)> = (0..question)
            .map(|token| {
                let from = |z: &f32| (z - head.positions[token]).abs();
                (asked.iter().map(from).fold(f32::INFINITY, f32::min), token)
            })
            .collect();
        distances.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let nearest = distances.iter().take(NEAREST.min(question / 4));
        for &(_, token) in nearest.filter(|(_, token)| *token < question - question / 4) {
            counts[token] += 1;
        }
    }
    let mut near: Vec<_> = counts
        .into_iter()
        .enumerate()
        .filter(|&(_, heads)| heads > 0)
        .map(|(token, heads)| Near { token, heads })
        .collect();
    near.sort_by_key(|near| (std::cmp::Reverse(near.heads), near.token));
    near.truncate(LISTED);
    near
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixty tokens and a question of four, in a head that counts, one that turns back, one that hardly moves.
    fn example() -> Positions {
        let index = (0..64).map(|n| n as f32).collect();
        // The question stands at 5, where the text's tokens 4 to 6 are.
        let back = (0..64).map(|n| if n < 60 { n as f32 } else { 5.0 }).collect();
        let flat = (0..64).map(|n| (n as f32).sin() * 0.05).collect();
        let heads = vec![Head::new(1, 0, index), Head::new(1, 1, back), Head::new(2, 0, flat)];
        Positions {
            model: "a <b>model</b>".to_owned(),
            tokens: (0..64).map(|n| format!("</script>{n}")).collect(),
            question: 60,
            layers: 3,
            near: near(&heads[..2], 60, 64),
            heads,
        }
    }

    #[test]
    fn heads_are_classed_by_their_chunks() {
        let [index, back, flat] = &example().heads[..] else { panic!("three heads") };
        assert_eq!((index.range, index.patterns), ([0.0, 63.0], [0.0, 1.0, 0.0]));
        assert_eq!(back.patterns, [0.0, 0.75, 0.25]);
        assert_eq!(flat.patterns, [1.0, 0.0, 0.0]);
    }

    #[test]
    fn only_tokens_that_are_far_in_the_text_and_near_in_a_head_count() {
        let near = example().near;
        // The 15 nearest to position 5, and none for the head that counts.
        let tokens: Vec<_> = near.iter().map(|near| near.token).collect();
        assert_eq!(tokens, (0..15).collect::<Vec<_>>());
        assert!(near.iter().all(|near| near.heads == 1));
        assert!(super::near(&example().heads, 64, 64).is_empty(), "no question");
    }

    #[test]
    fn the_page_is_one_file_with_its_data_and_no_link_outside() {
        let (positions, page) = (example(), example().page().unwrap());
        assert!(!page.contains(PLACE));
        for link in ["http:", "https:", "src=", "@import", "url(", "<link"] {
            assert!(!page.contains(link), "{link}");
        }
        let begin = "<script id=\"data\" type=\"application/json\">";
        let data = page.split(begin).nth(1).unwrap().split("</script>").next().unwrap();
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        let whole: serde_json::Value =
            serde_json::from_str(&serde_json::to_string(&positions).unwrap()).unwrap();
        assert!(data == whole);
        assert_eq!(data["tokens"][7], "</script>7");
        assert_eq!(page.matches("</script>").count(), 2, "the data's and the program's own");
        for part in ["viewport", "prefers-color-scheme", "<title>", "lang=\"en\""] {
            assert!(page.contains(part), "{part}");
        }
    }

    /// What the program has made of the page, in windows of a desk and of a phone.
    #[test]
    #[ignore = "needs chromium"]
    fn a_browser_draws_the_page_without_an_error_and_nothing_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("positions.html");
        std::fs::write(&path, example().page().unwrap()).unwrap();
        // Chromium's own windows are 500 wide at least: a frame is as narrow as it is told to be.
        let frame = folder.path().join("frame.html");
        for width in [1280, 390] {
            let inner = "<iframe src=\"positions.html\" style=\"border:0;height:900px;width:";
            let read = "onload=\"document.title=contentDocument.documentElement.dataset.drawn\"";
            std::fs::write(&frame, format!("{inner}{width}px\" {read}></iframe>")).unwrap();
            let run = std::process::Command::new("chromium")
                .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
                .args(["--allow-file-access-from-files", "--window-size=1400,1000"])
                .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
                .arg(format!("file://{}", frame.display()))
                .output()
                .expect("chromium is installed");
            let page = String::from_utf8_lossy(&run.stdout);
            assert!(page.contains(&format!("<title>3 heads, fits {width}</title>")), "{page}");
        }
        let run = std::process::Command::new("chromium")
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
            .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
            .arg(format!("file://{}", path.display()))
            .output()
            .expect("chromium is installed");
        let page = String::from_utf8_lossy(&run.stdout);
        assert!(
            page.contains("Where a &lt;b&gt;model&lt;/b&gt; puts its tokens"),
            "as text, not as markup"
        );
        assert_eq!(
            page.matches("aria-pressed=\"false\"").count(),
            2,
            "a button a head, one of them pressed"
        );
        assert!(page.contains("1 of 3") && page.contains("Layer 1, head 0"));
    }
}
