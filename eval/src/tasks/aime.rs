//! AIME25: thirty problems whose answer is an integer in a box, several rollouts of each, sampled, the cache pruned while
//! the model thinks.
//!
//! Read from records with `question` (or `problem`) and `answer`. The problem is the whole user message, as in kvpress's
//! `evaluate_aime.py`. A sample is a rollout: its number decides its draws, so that a run that is resumed goes on as if it had
//! never stopped.

use crate::metrics::{BoxRule, boxed, same_integer};
use crate::records::{self, ADVICE, answers, files, text, value};
use crate::task::{Sample, Task};
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// The problems, and how they are asked.
#[derive(Debug)]
pub struct Aime {
    problems: Vec<(String, String)>,
    rollouts: u64,
    rule: BoxRule,
    integers: bool,
}

/// The most tokens of an answer.
const NEW_TOKENS: usize = 32_000;

impl Aime {
    /// `rollouts` of each problem, their boxes found by `rule`; `integers` compares numbers where kvpress compares strings.
    pub fn load(path: &Path, rollouts: u64, rule: BoxRule, integers: bool) -> Result<Self> {
        ensure!(rollouts > 0, "0 rollouts ask nothing; give 1 or more");
        let mut problems = Vec::new();
        for file in files(path)? {
            for (line, record) in (1..).zip(records::read(&file)?) {
                let named = || format!("{} sample {line}", file.display());
                let field = if record.contains_key("question") { "question" } else { "problem" };
                let problem = text(&record, field).with_context(named)?.to_owned();
                let answers = value(&record, "answer").and_then(answers).with_context(named)?;
                let [answer] = <[String; 1]>::try_from(answers).map_err(|all| {
                    anyhow::anyhow!("{}: {} answers, wanted one; {ADVICE}", named(), all.len())
                })?;
                problems.push((problem, answer));
            }
        }
        Ok(Self { problems, rollouts, rule, integers })
    }
}

impl Task for Aime {
    fn name(&self) -> &str {
        "aime25"
    }

    fn samples(&self) -> Option<u64> {
        Some(self.problems.len() as u64 * self.rollouts)
    }

    /// Rollouts of a problem share its reading.
    fn group(&self, index: u64) -> u64 {
        index / self.rollouts
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let problem = index / self.rollouts;
        let (text, answer) = &self.problems[problem as usize];
        let mut sample = Sample {
            context: text.clone(),
            answers: vec![answer.clone()],
            max_new_tokens: NEW_TOKENS,
            thinking: true,
            ..Sample::default()
        };
        sample.facts.insert("problem".into(), problem.into());
        sample.facts.insert("rollout".into(), (index % self.rollouts).into());
        Ok(sample)
    }

    fn score(&self, sample: &Sample, text: &str) -> f64 {
        let [answer] = &*sample.answers else { return 0.0 };
        let found = boxed(text, self.rule, true);
        let right = found
            .is_some_and(|found| found == answer || self.integers && same_integer(found, answer));
        f64::from(right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aime(lines: &str, rule: BoxRule, integers: bool) -> Result<Aime> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("aime25.jsonl");
        std::fs::write(&path, lines).unwrap();
        Aime::load(&path, 4, rule, integers)
    }

    #[test]
    fn an_answer_is_read_however_the_column_was_written() {
        for answer in ["70", "\"70\"", "[\"70\"]", "\"['70']\""] {
            let aime = aime(
                &format!("{{\"problem\": \"p\", \"answer\": {answer}}}"),
                BoxRule::V055,
                false,
            );
            assert_eq!(aime.unwrap().sample(3).unwrap().answers, ["70"], "{answer}");
        }
        for (answer, wanted) in
            [("null", "null"), ("{}", "an object"), ("[]", "empty"), ("\"['1' '2']\"", "2 answers")]
        {
            let lines = format!("{{\"problem\": \"p\", \"answer\": {answer}}}");
            let error = format!("{:#}", aime(&lines, BoxRule::V055, false).unwrap_err());
            assert!(error.contains("sample 1") && error.contains(wanted), "{answer}: {error}");
        }
    }

    #[test]
    fn rollouts_are_samples_of_one_group_and_boxes_are_compared_as_asked() {
        let lines = "{\"question\": \"p\", \"answer\": 16}\n{\"question\": \"q\", \"answer\": 7}\n";
        let strict = aime(lines, BoxRule::V055, false).unwrap();
        assert_eq!(strict.samples(), Some(8));
        assert_eq!([0, 3, 4, 7].map(|index| strict.group(index)), [0, 0, 1, 1]);
        let sample = strict.sample(2).unwrap();
        assert!(sample.thinking);
        assert_eq!((&sample.facts["problem"], &sample.facts["rollout"]), (&0.into(), &2.into()));
        let loose = aime(lines, BoxRule::V055, true).unwrap();
        let old = aime(lines, BoxRule::V054, false).unwrap();
        for (text, wanted) in [
            (r"\boxed{16}", [1.0, 1.0, 1.0]),
            (r"\boxed{016}", [0.0, 1.0, 0.0]),
            ("16", [0.0, 0.0, 1.0]),
            (r"\boxed{15}", [0.0, 0.0, 0.0]),
            ("", [0.0, 0.0, 0.0]),
        ] {
            assert_eq!(
                [&strict, &loose, &old].map(|task| task.score(&sample, text)),
                wanted,
                "{text}"
            );
        }
    }
}
