//! Answers several questions about one text at once, from a cache that KVzap prunes, and prints tokens as they come:
//!
//! ```text
//! cargo run --release -p models --example engine -- MODEL SURROGATE THRESHOLD TEXT-FILE "First question" "Second …"
//! ```

use kvzap::{Surrogate, Threshold, TorchSurrogate};
use models::engine::{CpuExecutor, Engine, Event, Request, Room};
use models::{Hooks, Model, Pruning, Specials};
use std::path::Path;
use tch::{Device, Kind};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, surrogate, threshold, file, questions @ ..] = arguments.as_slice() else {
        anyhow::bail!("give MODEL SURROGATE THRESHOLD TEXT-FILE QUESTION…");
    };
    let Model { lm, tokenizer, template, stop, kind, device, .. } =
        Model::load(Path::new(model), Kind::Float, Device::Cpu)?;
    let surrogate = Surrogate::load(surrogate)?;
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(TorchSurrogate::new(&surrogate, kind, device)?),
        policy: Box::new(Threshold::new(threshold.parse()?)?),
        while_decoding: true,
    });

    // One text, so one context: it is read and pruned once, and its pages are shared.
    let text = std::fs::read_to_string(file)?;
    let (text, after) = match &template {
        Some(template) => template.around(&text)?,
        None => (text, "\n".to_owned()),
    };
    let context = tokenizer.encode(&text, Specials::Parse)?;
    let requests = questions.iter().map(|question| {
        let question = tokenizer.encode(&[question, after.as_str()].concat(), Specials::Parse)?;
        Ok(Request { question, limit: 64, stop: stop.clone(), ..Request::new(context.clone()) })
    });
    let requests = requests.collect::<models::Result<Vec<_>>>()?;

    let room = Room { vocabulary: tokenizer.vocab_size(), ..Room::new(lm.config(), 1 << 30) };
    let engine = Engine::builder().start(move || CpuExecutor::new(lm, kind, hooks, room))?;
    let mut answers = questions.iter().map(|_| tokenizer.stream()).collect::<Vec<_>>();
    for (request, event) in engine.generate(requests) {
        match event {
            Event::Token(token) => {
                if let Some(piece) = answers[request].push(token) {
                    println!("{request} | {piece}");
                }
            }
            Event::End(end) => {
                let stop = end.stop?;
                let held = end.usage.held;
                println!("{request} = {stop:?}, {} of {} rows held", held.rows, held.dense_rows);
            }
        }
    }
    println!("{:?}", engine.totals());
    Ok(())
}
