//! `longctx eval --list`: what there is, what it needs, and how long it takes here.

use super::super::{DeviceName, DtypeName, Machine, ModelArgs, table};
use super::data::{cache, texts_folder};
use crate::{InfiniteBench, LongBench, Method, Reading, Ruler, Runner, Texts};
use anyhow::Result;
use models::{Sampling, WINDOW};
use std::path::PathBuf;

/// A line of the list.
struct Listed {
    name: &'static str,
    tasks: String,
    needs: &'static [&'static str],
    published: &'static str,
    /// Prompts of the default run, their tokens, and the tokens of an answer.
    prompts: [f64; 3],
}

pub fn list() -> Result<()> {
    let ruler: Vec<_> = Ruler::names().collect();
    let longbench: Vec<_> = LongBench::names().collect();
    let infinitebench: Vec<_> = InfiniteBench::names().collect();
    let listed = [
        Listed {
            name: "ruler",
            tasks: ruler.join(", "),
            needs: &Texts::FILES,
            published: "or --data PATH: simonjegou/ruler",
            prompts: [260.0, 2048.0, 70.0],
        },
        Listed {
            name: "needle",
            tasks: "a depth each, 0 to 100 percent".to_owned(),
            needs: &["PaulGrahamEssays.json"],
            published: "",
            prompts: [100.0, 2048.0, 64.0],
        },
        Listed {
            name: "noisy-qa",
            tasks: "a number of distractors and a place of the gold paragraphs each".to_owned(),
            needs: &["hotpotqa.json"],
            published: "",
            prompts: [140.0, 700.0, 40.0],
        },
        Listed {
            name: "shared-context",
            tasks: "several questions about a context that is read once".to_owned(),
            needs: &["PaulGrahamEssays.json"],
            published: "",
            prompts: [20.0, 600.0, 32.0],
        },
        Listed {
            name: "longbench",
            tasks: format!("{}; with _e the LongBench-E ones", longbench.join(", ")),
            needs: &[],
            published: "--data PATH: THUDM/LongBench or Xnhyacinth/LongBench",
            prompts: [420.0, 6000.0, 120.0],
        },
        Listed {
            name: "longbench-v2",
            tasks: "questions with four options".to_owned(),
            needs: &[],
            published: "--data PATH: THUDM/LongBench-v2 or simonjegou/LongBench-v2",
            prompts: [20.0, 100_000.0, 16.0],
        },
        Listed {
            name: "infinitebench",
            tasks: infinitebench.join(", "),
            needs: &[],
            published: "--data PATH: InfiniteBench or MaxJeblick/InfiniteBench",
            prompts: [220.0, 120_000.0, 40.0],
        },
        Listed {
            name: "aime25",
            tasks: "thirty problems, four rollouts each".to_owned(),
            needs: &[],
            published: "--data PATH: records with problem and answer",
            prompts: [20.0, 8000.0, 7000.0],
        },
    ];
    let speed = speed()?;
    let folder = texts_folder();
    println!(
        "Texts are looked for in {} (--texts); `cargo xtask fetch` puts them there.",
        folder.display()
    );
    match &speed {
        Some(speed) => println!(
            "Times are for 20 samples a task and any number of methods, which share the reading, from a measurement just now: \
             SmolLM2-135M reads 2,000 tokens in {:.1} s and writes {:.0} a second here. Contexts past its {:.0} tokens are cut \
             (--cut), and counted so.",
            speed.seconds(2000.0, 0.0),
            1.0 / speed.write,
            speed.most
        ),
        None => println!("Times need the default model, which `cargo xtask fetch` gets."),
    }
    println!();
    let mut table = table(&["--task", "about", "data", "tasks"], &[1]);
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic).set_width(100);
    for Listed { name, tasks, needs, published, prompts: [count, tokens, answer] } in listed {
        let missing: Vec<&str> =
            needs.iter().copied().filter(|file| !folder.join(file).is_file()).collect();
        let state = match (needs, &*missing) {
            ([], _) => published.to_owned(),
            (_, []) => format!(
                "{} {published}",
                if needs.len() == 1 {
                    format!("{}: there.", needs[0])
                } else {
                    "all texts: there,".to_owned()
                }
            ),
            (_, missing) => format!("not there: {} {published}", missing.join(", ")),
        };
        let time = speed
            .as_ref()
            .map_or("-".to_owned(), |speed| minutes(count * speed.seconds(tokens, answer)));
        table.add_row([name, &time, state.trim_end_matches([' ', ',']), &tasks]);
    }
    println!("{table}");
    Ok(())
}

/// Seconds that a model takes here.
struct Speed {
    /// Of a token read, and of each token before it that it looks at.
    read: [f64; 2],
    /// Of a token written.
    write: f64,
    /// The most tokens that it reads.
    most: f64,
}

impl Speed {
    /// To read `tokens`, or as many as the model can, and to write `answer`.
    fn seconds(&self, tokens: f64, answer: f64) -> f64 {
        let [token, before] = self.read;
        let tokens = tokens.min(self.most);
        tokens * (token + before * tokens / 2.0) + answer * self.write
    }

    /// From the seconds that a short and a long text took.
    fn fitted(texts: [(f64, f64); 2], write: f64, most: f64) -> Self {
        let [(short, first), (long, second)] = texts;
        let before = 2.0 * (second / long - first / short) / (long - short);
        let before = before.max(0.0); // another program may have slowed the short one
        Self { read: [second / long - before * long / 2.0, before], write, most }
    }
}

/// Of the default model, from two texts.
fn speed() -> Result<Option<Speed>> {
    let path: PathBuf = cache().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.is_file() {
        return Ok(None);
    }
    let args = ModelArgs {
        model: path,
        repo: None,
        machine: Machine { device: DeviceName::Cpu, dtype: Some(DtypeName::F32), threads: None },
    };
    let model = args.load()?;
    let runner = Runner {
        model: &model,
        surrogate: None,
        method: Method::Full,
        window: WINDOW,
        protect: 0,
        stored: None,
        while_decoding: false,
        limit: 16,
        sampling: Sampling::default(),
    };
    let read = |times| runner.read(&"The grass is green. The sky is blue. ".repeat(times));
    let took = |reading: &Reading<'_>| {
        let read = reading.read();
        (read.context_tokens as f64, read.prefill_seconds)
    };
    let short = took(&read(40)?);
    let mut reading = read(200)?;
    let long = took(&reading);
    let (tokens, seconds) = reading.ask("", "Once upon a time,", &mut |_| {})?.decode;
    let most = model.lm.config().max_positions as f64;
    Ok(Some(Speed::fitted([short, long], seconds / tokens.max(1) as f64, most)))
}

fn minutes(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_gives_back_what_was_measured_and_grows_with_the_square() {
        let speed = Speed::fitted([(400.0, 0.5), (1600.0, 3.0)], 0.02, 8192.0);
        assert!((speed.seconds(400.0, 0.0) - 0.5).abs() < 1e-9);
        assert!((speed.seconds(1600.0, 10.0) - 3.2).abs() < 1e-9);
        assert!(speed.seconds(6400.0, 0.0) > 4.0 * 3.0);
        assert_eq!(speed.seconds(1e6, 0.0), speed.seconds(8192.0, 0.0));
        // Where the short text was slower for each token, no more than the long one tells.
        let speed = Speed::fitted([(400.0, 2.0), (1600.0, 3.0)], 0.02, 8192.0);
        assert!((speed.seconds(3200.0, 0.0) - 6.0).abs() < 1e-9);
    }
}
