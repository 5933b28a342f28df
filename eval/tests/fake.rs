//! The tasks on models that know the answer, and on models that do not.

use anyhow::Result;
use eval::{Answer, Generate, Haystack, Needle, Sample, Task, run};

struct Fake(fn(&Sample) -> String);

impl Generate for Fake {
    fn generate(&mut self, sample: &Sample) -> Result<Answer> {
        Ok(Answer { text: (self.0)(sample), ..Answer::default() })
    }
}

fn words(text: &str) -> Result<usize> {
    Ok(text.split_whitespace().count())
}

fn haystack() -> Haystack {
    let sentence = |i| format!("Sentence {i} says nothing at all about numbers.");
    Haystack::new(&(0..400).map(sentence).collect::<Vec<_>>().join(" "))
}

fn mean(task: &dyn Task, answer: fn(&Sample) -> String) -> f64 {
    let mut sum = 0.0;
    run(task, &mut Fake(answer), 30, &mut |_, _, score| sum += score).unwrap();
    sum / 30.0
}

#[test]
fn a_model_that_knows_scores_all_and_one_that_does_not_scores_nothing() {
    let haystack = haystack();
    let needle = Needle::new(&haystack, &words, 500, 1);
    assert_eq!(mean(&needle, |sample| format!(" {}.", sample.answers[0])), 1.0);
    assert_eq!(mean(&needle, |_| "I do not know".into()), 0.0);
    assert_eq!(mean(&needle, |_| String::new()), 0.0);
    assert_eq!(mean(&needle, |sample| sample.question.repeat(50)), 0.0);
}

#[test]
fn the_needle_can_be_found_in_the_context_alone() {
    let haystack = haystack();
    let needle = Needle::new(&haystack, &words, 500, 1);
    for index in 0..50 {
        let sample = needle.sample(index).unwrap();
        assert_eq!(sample.context.matches(&sample.answers[0]).count(), 1, "sample {index}");
        assert!(!sample.question.contains(&sample.answers[0]));
    }
}

#[test]
fn a_prompt_fills_its_length_and_never_passes_it() {
    let haystack = haystack();
    for tokens in [200, 500, 1000] {
        let needle = Needle::new(&haystack, &words, tokens, 3);
        for index in 0..20 {
            let sample = needle.sample(index).unwrap();
            let length = words(&sample.context).unwrap() + words(&sample.question).unwrap();
            assert!(length <= tokens && length + 8 > tokens, "{length} of {tokens}");
        }
    }
}

#[test]
fn an_index_repeats_its_sample_and_another_differs() {
    let haystack = haystack();
    let needle = Needle::new(&haystack, &words, 300, 9);
    assert_eq!(needle.sample(4).unwrap(), needle.sample(4).unwrap());
    assert_ne!(needle.sample(4).unwrap(), needle.sample(5).unwrap());
}

#[test]
fn needles_lie_at_all_depths() {
    let haystack = haystack();
    let needle = Needle::new(&haystack, &words, 500, 2);
    let depth = |index| {
        let sample = needle.sample(index).unwrap();
        sample.context.find("One of the special").unwrap() as f64 / sample.context.len() as f64
    };
    let depths: Vec<f64> = (0..60).map(depth).collect();
    for fifth in 0..5 {
        let range = f64::from(fifth) / 5.0..f64::from(fifth + 1) / 5.0;
        assert!(depths.iter().any(|d| range.contains(d)), "none in {range:?}");
    }
}

#[test]
fn a_prompt_that_cannot_fit_says_so() {
    let empty = Haystack::new("");
    let needle = Needle::new(&empty, &words, 500, 1);
    assert!(needle.sample(0).unwrap_err().to_string().contains("haystack is empty"));
    let haystack = haystack();
    let needle = Needle::new(&haystack, &words, 10, 1);
    assert!(needle.sample(0).unwrap_err().to_string().contains("does not fit"));
}
