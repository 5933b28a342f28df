//! Several questions about one context that was read and pruned once, as SCBench (arXiv 2412.10319) asks them: pairs of UUIDs
//! between lines of essays, each question asks for one. A method that keeps what the first question needs loses here.

use crate::fit;
use crate::task::{Sample, Task};
use crate::tasks::ruler::Texts;
use crate::tasks::ruler::TooShort;
use anyhow::Result;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Contexts of `questions` questions each.
pub struct SharedContext<'a> {
    texts: &'a Texts,
    count: &'a dyn Fn(&str) -> Result<usize>,
    tokens: usize,
    questions: u64,
    seed: u64,
}

const NEW_TOKENS: usize = 32;

impl<'a> SharedContext<'a> {
    /// Contexts that have, with question and answer, at most `tokens` tokens.
    pub fn new(
        texts: &'a Texts,
        count: &'a dyn Fn(&str) -> Result<usize>,
        tokens: usize,
        questions: u64,
        seed: u64,
    ) -> Self {
        Self { texts, count, tokens, questions: questions.max(1), seed }
    }

    fn build(&self, index: u64, words: usize) -> Result<Sample> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(index / self.questions);
        let essays = self.texts.essays()?;
        let start = random.random_range(0..=essays.len() - words.min(essays.len()));
        let mut pairs = Vec::new();
        for _ in 0..self.questions {
            let mut code = || format!("{:08x}", random.random::<u32>());
            pairs.push((code(), code()));
        }
        let mut text = String::new();
        let between = words / (pairs.len() + 1);
        let words = &essays[start..start + words];
        for (place, (key, value)) in pairs.iter().enumerate() {
            text += &words[place * between..(place + 1) * between].join(" ");
            text += &format!("\nThe code of {key} is {value}.\n");
        }
        text += &words[pairs.len() * between..].join(" ");
        let asked = (index % self.questions) as usize;
        let (key, value) = &pairs[asked];
        let mut sample = Sample {
            context: format!(
                "Some codes are hidden in the following text. Remember them.\n{text}\n"
            ),
            question: format!("What is the code of {key}? "),
            answer_prefix: format!("The code of {key} is"),
            answers: vec![value.clone()],
            max_new_tokens: NEW_TOKENS,
            ..Sample::default()
        };
        sample.facts.insert("question_number".into(), asked.into());
        Ok(sample)
    }
}

impl Task for SharedContext<'_> {
    fn name(&self) -> &str {
        "shared_context"
    }

    fn group(&self, index: u64) -> u64 {
        index / self.questions
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let mut tokens = |words| {
            // Of any question, so that all of a context have the same.
            let sample = self.build(index / self.questions * self.questions, words)?;
            let prompt = [&*sample.context, &sample.question, &sample.answer_prefix].concat();
            Ok((self.count)(&prompt)? + NEW_TOKENS)
        };
        let most = self.texts.essays()?.len();
        let margin = 8; // keys of the others may take more tokens than the first's
        let limit = self.tokens.saturating_sub(margin);
        match fit::largest(1, most, limit, &mut tokens)? {
            Some(words) => self.build(index, words),
            None => Err(TooShort { tokens: self.tokens, needed: tokens(1)? + margin }.into()),
        }
    }
}

impl std::fmt::Debug for SharedContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedContext")
            .field("tokens", &self.tokens)
            .field("questions", &self.questions)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn questions_of_a_group_share_the_context_and_each_has_its_answer_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let essays = serde_json::json!({"text": "Nothing to see here. ".repeat(500)}).to_string();
        std::fs::write(folder.path().join("PaulGrahamEssays.json"), essays).unwrap();
        let texts = Texts::new(folder.path());
        let count = |text: &str| Ok(text.split_whitespace().count());
        let task = SharedContext::new(&texts, &count, 400, 3, 7);
        let samples: Vec<Sample> = (0..6).map(|index| task.sample(index).unwrap()).collect();
        assert_eq!((0..6).map(|index| task.group(index)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1]);
        assert!(samples[..3].iter().all(|sample| sample.context == samples[0].context));
        assert_ne!(samples[0].context, samples[3].context);
        assert_eq!(samples.iter().map(|s| &s.question).collect::<HashSet<_>>().len(), 6);
        for sample in &samples {
            assert!(sample.context.contains(&sample.answers[0]));
            assert_eq!(task.score(sample, &sample.answers[0]), 1.0);
            assert_eq!(task.score(sample, "12345678"), 0.0);
            let words = count(&sample.context).unwrap() + count(&sample.question).unwrap();
            assert!((300..400).contains(&words), "{words}");
        }
        let error = SharedContext::new(&texts, &count, 40, 3, 7).sample(0).unwrap_err();
        assert!(error.downcast::<TooShort>().unwrap().needed > 40);
    }
}
