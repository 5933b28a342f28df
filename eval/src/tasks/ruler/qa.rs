//! Questions about documents, some of which hold the answer: SQuAD's and HotpotQA's.

use crate::task::Sample;
use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap, HashSet};

const NEW_TOKENS: usize = 32;

/// A set of questions and the documents of all of them.
#[derive(Debug)]
pub struct Questions {
    pub documents: Vec<String>,
    pub questions: Vec<Question>,
}

#[derive(Debug)]
pub struct Question {
    pub text: String,
    pub answers: Vec<String>,
    /// The documents that hold the answer.
    pub gold: Vec<usize>,
    /// Others that the data set puts beside them.
    pub beside: Vec<usize>,
    /// Others that come before strange ones: SQuAD's of the same article.
    pub near: Vec<usize>,
}

/// What chance decided.
pub struct Drawn<'a> {
    pub question: &'a Question,
    /// In the order of the text.
    pub documents: Vec<&'a str>,
    /// Of the question's own documents, how many had no room.
    pub dropped: usize,
}

impl Questions {
    /// SQuAD v2: the questions that have an answer.
    pub fn squad(json: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct File {
            data: Vec<Article>,
        }
        #[derive(Deserialize)]
        struct Article {
            paragraphs: Vec<Paragraph>,
        }
        #[derive(Deserialize)]
        struct Paragraph {
            context: String,
            qas: Vec<Asked>,
        }
        #[derive(Deserialize)]
        struct Asked {
            question: String,
            #[serde(default)]
            is_impossible: bool,
            answers: Vec<Answer>,
        }
        #[derive(Deserialize)]
        struct Answer {
            text: String,
        }
        let File { data } = serde_json::from_str(json)?;
        let paragraphs = data.iter().flat_map(|article| &article.paragraphs);
        let (documents, places) = sorted(paragraphs.map(|p| p.context.clone()));
        let mut questions = Vec::new();
        for article in &data {
            let all: Vec<usize> = article.paragraphs.iter().map(|p| places[&p.context]).collect();
            for paragraph in &article.paragraphs {
                let gold = places[&paragraph.context];
                for asked in paragraph.qas.iter().filter(|asked| !asked.is_impossible) {
                    questions.push(Question {
                        text: asked.question.clone(),
                        answers: asked.answers.iter().map(|answer| answer.text.clone()).collect(),
                        gold: vec![gold],
                        beside: Vec::new(),
                        near: all.iter().copied().filter(|&other| other != gold).collect(),
                    });
                }
            }
        }
        Ok(Self { documents, questions })
    }

    /// HotpotQA with distractors: ten paragraphs a question, title and text, of which two hold the answer.
    pub fn hotpot(json: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Asked {
            question: String,
            answer: String,
            context: Vec<(String, Vec<String>)>,
            #[serde(default)]
            supporting_facts: Vec<(String, i64)>,
        }
        let asked: Vec<Asked> = serde_json::from_str(json)?;
        let document =
            |(title, text): &(String, Vec<String>)| format!("{title}\n{}", text.concat());
        let (documents, places) = sorted(asked.iter().flat_map(|a| a.context.iter().map(document)));
        let question = |asked: Asked| {
            let titles: HashSet<&str> =
                asked.supporting_facts.iter().map(|(title, _)| title.as_str()).collect();
            let (gold, beside): (Vec<_>, Vec<_>) =
                asked.context.iter().partition(|(title, _)| titles.contains(title.as_str()));
            let places = |own: Vec<_>| own.into_iter().map(|d| places[&document(d)]).collect();
            Question {
                gold: places(gold),
                beside: places(beside),
                near: Vec::new(),
                text: asked.question,
                answers: vec![asked.answer],
            }
        };
        let questions = asked.into_iter().map(question).collect();
        Ok(Self { documents, questions })
    }

    pub fn len(&self) -> u64 {
        self.questions.len() as u64
    }

    /// Question `index`.
    pub fn question(&self, index: u64) -> Result<&Question> {
        let question = usize::try_from(index).ok().and_then(|index| self.questions.get(index));
        question
            .with_context(|| format!("there are {} questions; ask for fewer", self.questions.len()))
    }

    pub fn sizes(&self, index: u64) -> Result<(usize, usize)> {
        let question = self.question(index)?;
        ensure!(!question.gold.is_empty(), "question {index} names no document that answers it");
        Ok((question.gold.len(), self.documents.len()))
    }

    /// Question `index` among `size` documents: its own, those near them, then any.
    pub fn draw(&self, random: &mut ChaCha8Rng, index: u64, size: usize) -> Result<Drawn<'_>> {
        let question = self.question(index)?;
        let mut chosen = question.gold.clone();
        for more in [&question.beside, &question.near] {
            let room = size.saturating_sub(chosen.len());
            if more.len() <= room {
                chosen.extend(more);
            } else {
                chosen.extend(more.choose_multiple(random, room));
            }
        }
        chosen.extend(self.strangers(random, question, size.saturating_sub(chosen.len())));
        let own = question.gold.len() + question.beside.len();
        chosen.shuffle(random);
        let documents = chosen.into_iter().map(|place| self.documents[place].as_str()).collect();
        Ok(Drawn { question, documents, dropped: own.saturating_sub(size) })
    }

    /// So many documents, or as many as there are, that have nothing to do with the question.
    pub fn strangers(
        &self,
        random: &mut ChaCha8Rng,
        question: &Question,
        count: usize,
    ) -> Vec<usize> {
        let own = [&question.gold, &question.beside, &question.near].into_iter().flatten();
        let mut taken: HashSet<usize> = own.copied().collect();
        let mut strangers = Vec::new();
        while strangers.len() < count && taken.len() < self.documents.len() {
            let other = random.random_range(0..self.documents.len());
            if taken.insert(other) {
                strangers.push(other);
            }
        }
        strangers
    }
}

impl Drawn<'_> {
    pub fn write(&self) -> Sample {
        const INSTRUCTION: &str = "Answer the question based on the given documents. Only give me the answer and do not \
                                   output any other words.";
        let documents = self.documents.iter().zip(1..);
        let documents: Vec<String> =
            documents.map(|(document, number)| format!("Document {number}:\n{document}")).collect();
        let mut sample = Sample {
            context: format!(
                "{INSTRUCTION}\n\nThe following are given documents.\n\n{}\n\n",
                documents.join("\n\n")
            ),
            question: format!("{INSTRUCTION}\n\nQuestion: {} ", self.question.text),
            answer_prefix: "Answer:".to_owned(),
            answers: self.question.answers.clone(),
            max_new_tokens: NEW_TOKENS,
            ..Sample::default()
        };
        if self.dropped > 0 {
            sample.facts.insert("paragraphs_dropped".into(), self.dropped.into());
        }
        sample
    }
}

/// The documents without repetition, sorted, and the place of each.
fn sorted(documents: impl Iterator<Item = String>) -> (Vec<String>, HashMap<String, usize>) {
    let documents: Vec<String> = documents.collect::<BTreeSet<_>>().into_iter().collect();
    let places = documents.iter().cloned().zip(0..).collect();
    (documents, places)
}
