//! `longctx eval --list`: what there is, what it needs, and how long it takes here.

use super::super::{DeviceName, DtypeName, ModelArgs, table};
use super::data::{cache, texts_folder};
use crate::{LongBench, Method, Ruler, Runner};
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
    let listed = [
        Listed {
            name: "ruler",
            tasks: ruler.join(", "),
            needs: &[
                "PaulGrahamEssays.json",
                "squad.json",
                "hotpotqa.json",
                "nounlist.txt",
                "adjectivelist.txt",
                "verblist.txt",
            ],
            published: "or --data PATH: simonjegou/ruler in JSON lines",
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
            published: "--data PATH: THUDM/LongBench's or Xnhyacinth/LongBench's JSON lines",
            prompts: [420.0, 6000.0, 120.0],
        },
        Listed {
            name: "aime25",
            tasks: "thirty problems, four rollouts each".to_owned(),
            needs: &[],
            published: "--data PATH: JSON lines with problem and answer",
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
            "Times are for a method, 20 samples a task, from a measurement just now: SmolLM2-135M reads {:.0} and writes \
             {:.0} tokens a second here.",
            speed.read, speed.write
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
        let time = speed.as_ref().map_or("-".to_owned(), |speed| {
            minutes(count * (tokens / speed.read + answer / speed.write))
        });
        table.add_row([name, &time, state.trim_end_matches([' ', ',']), &tasks]);
    }
    println!("{table}");
    Ok(())
}

/// Tokens a second.
struct Speed {
    read: f64,
    write: f64,
}

/// Of the default model, on a short text; a longer one is slower for each of its tokens.
fn speed() -> Result<Option<Speed>> {
    let path: PathBuf = cache().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.is_file() {
        return Ok(None);
    }
    let args = ModelArgs {
        model: path,
        repo: None,
        device: DeviceName::Cpu,
        dtype: DtypeName::F32,
        threads: None,
    };
    let model = args.load()?;
    let runner = Runner {
        model: &model,
        surrogate: None,
        method: Method::Full,
        window: WINDOW,
        while_decoding: false,
        limit: 16,
        sampling: Sampling::default(),
    };
    let mut reading = runner.read(&"The grass is green. The sky is blue. ".repeat(200))?;
    let answer = reading.ask("", "Once upon a time,", &mut |_| {})?;
    Ok(Some(Speed {
        read: answer.context_tokens as f64 / answer.prefill_seconds,
        write: answer.decode.0.max(1) as f64 / answer.decode.1,
    }))
}

fn minutes(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
