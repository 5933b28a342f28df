//! The needle test on an engine of one's own, without libtorch: anything that reads a context and then a question
//! can stand where this one searches for the sentence that shares most words with the question.
//!
//! ```text
//! cargo run -p eval --no-default-features --example own_engine
//! ```

use eval::{Answer, Generate, Haystack, Needle, Sample, run};
use std::collections::HashSet;

struct Search;

impl Generate for Search {
    fn generate(&mut self, sample: &Sample) -> anyhow::Result<Answer> {
        let words = |text: &str| -> HashSet<String> {
            text.split(|c: char| !c.is_alphanumeric()).map(str::to_lowercase).collect()
        };
        let question = words(&sample.question);
        let best = sample
            .context
            .split_inclusive(['.', '\n'])
            .max_by_key(|sentence| words(sentence).intersection(&question).count());
        Ok(Answer { text: best.unwrap_or_default().to_owned(), ..Answer::default() })
    }
}

fn main() -> anyhow::Result<()> {
    let filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. ";
    let haystack = Haystack::new(&filler.repeat(40));
    let words = |text: &str| Ok(text.split_whitespace().count());
    let mut right = 0.0;
    run(
        &Needle::new(&haystack, &words, 400, 42),
        &mut Search,
        10,
        &mut |sample, answer, score| {
            println!("{:?}: {}", sample.answers, answer.text.trim());
            right += score;
        },
    )?;
    println!("{right} of 10 right");
    Ok(())
}
