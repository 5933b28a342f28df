//! Questions among noise: HotpotQA's two gold paragraphs between k others, at the beginning, the middle or the end.
//!
//! The score is whether the answer stands in the text. Small models rarely write it; what they always have is a likelihood of
//! the right answer, in nats a token, which is measured beside. RePo (arXiv 2512.14391) is tested in this setting.

use crate::task::{Sample, Task};
use crate::tasks::ruler::{self, Texts};
use anyhow::Result;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Questions with a given number of distractors, the gold paragraphs at a given place among them.
#[derive(Debug)]
pub struct NoisyQa<'a> {
    name: String,
    texts: &'a Texts,
    distractors: usize,
    place: f64,
    seed: u64,
}

impl<'a> NoisyQa<'a> {
    /// `place` goes from 0, the gold paragraphs before all others, to 1, after them.
    pub fn new(texts: &'a Texts, distractors: usize, place: f64, seed: u64) -> Self {
        let name = format!("noise_{distractors:02}_gold_at_{:03.0}", 100.0 * place);
        Self { name, texts, distractors, place, seed }
    }
}

impl Task for NoisyQa<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn samples(&self) -> Option<u64> {
        Some(self.texts.hotpot().ok()?.len())
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let questions = self.texts.hotpot()?;
        let question = questions.question(index)?;
        let gold = question.gold.len();
        // The same draws for every place and number, so that more noise is the same noise and more.
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(index);
        let mut others = question.beside.clone();
        others.shuffle(&mut random);
        others.truncate(self.distractors);
        let strange = questions.strangers(&mut random, question, self.distractors - others.len());
        others.extend(strange);
        let at = (self.place * others.len() as f64).round() as usize;
        let documents = [&others[..at], &question.gold, &others[at..]].concat();
        let documents = documents.iter().map(|&place| questions.documents[place].as_str());
        let drawn = ruler::qa::Drawn { question, documents: documents.collect(), dropped: 0 };
        let mut sample = drawn.write();
        sample.likelihood_of = format!(" {}", question.answers.first().map_or("", String::as_str));
        sample.facts.insert("gold_paragraphs".into(), gold.into());
        sample.facts.insert("distractors".into(), self.distractors.into());
        sample.facts.insert("gold_place".into(), self.place.into());
        Ok(sample)
    }

    fn score(&self, sample: &Sample, text: &str) -> f64 {
        ruler::score("qa_2", &sample.answers, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn texts() -> (tempfile::TempDir, Texts) {
        let folder = tempfile::tempdir().unwrap();
        let question = |q: usize| {
            let paragraph = |p: usize| json!([format!("T{q}-{p}"), [format!("Text {q}-{p}.")]]);
            json!({
                "question": format!("Q{q}?"), "answer": format!("A{q}"), "supporting_facts": [[format!("T{q}-1"), 0], [format!("T{q}-4"), 0]],
                "context": (0..6).map(paragraph).collect::<Vec<_>>(),
            })
        };
        let text = json!((0..4).map(question).collect::<Vec<_>>()).to_string();
        std::fs::write(folder.path().join("hotpotqa.json"), text).unwrap();
        let texts = Texts::new(folder.path());
        (folder, texts)
    }

    #[test]
    fn gold_stands_where_it_is_asked_to_among_its_own_distractors_first() {
        let (_folder, texts) = texts();
        for (distractors, place, wanted) in [
            (0, 0.0, 0),
            (0, 1.0, 0),
            (3, 0.0, 0),
            (3, 1.0, 3),
            (4, 0.5, 2),
            (9, 1.0, 9),
            (9, 0.0, 0),
        ] {
            let task = NoisyQa::new(&texts, distractors, place, 1);
            let sample = task.sample(2).unwrap();
            let is_title =
                |line: &&str| line.starts_with('T') && line.contains('-') && !line.contains(' ');
            let titles: Vec<&str> = sample.context.lines().filter(is_title).collect();
            assert_eq!(titles.len(), 2 + distractors);
            assert_eq!(titles[wanted..wanted + 2], ["T2-1", "T2-4"], "{distractors} {place}");
            let own = titles.iter().filter(|title| title.starts_with("T2-")).count();
            assert_eq!(own, 2 + distractors.min(4));
            assert_eq!((sample.answers, &*sample.likelihood_of), (vec!["A2".to_owned()], " A2"));
        }
    }

    #[test]
    fn a_right_answer_scores_1_and_any_other_0() {
        let (_folder, texts) = texts();
        let task = NoisyQa::new(&texts, 3, 0.5, 1);
        let sample = task.sample(0).unwrap();
        assert_eq!(task.score(&sample, "It is a0."), 1.0);
        for text in ["", "A1", "\u{fffd}"] {
            assert_eq!(task.score(&sample, text), 0.0);
        }
        assert_eq!((task.name(), task.samples()), ("noise_03_gold_at_050", Some(4)));
    }
}
