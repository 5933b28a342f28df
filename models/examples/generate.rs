//! Continues a prompt from a cache that KVzap prunes, with the crates alone and no command around them:
//!
//! ```text
//! cargo run --release -p models --example generate -- MODEL SURROGATE THRESHOLD "A long prompt …"
//! ```

use kvzap::{Surrogate, Threshold, TorchSurrogate};
use models::{
    Cpu, Hooks, Model, Paged, Pruning, Sampler, Sampling, Session, Specials, WINDOW, cache_shape,
};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use tch::{Device, Kind};

const LIMIT: usize = 64;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, surrogate, threshold, prompt] = arguments.as_slice() else {
        anyhow::bail!("give MODEL SURROGATE THRESHOLD PROMPT");
    };
    let Model { lm, tokenizer, stop, kind, device, .. } =
        Model::load(Path::new(model), Kind::Float, Device::Cpu)?;
    let surrogate = Surrogate::load(surrogate)?;
    let config = lm.config();
    surrogate.check(config.layers, config.hidden_size, config.kv_heads)?;
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(TorchSurrogate::new(&surrogate, kind, device)?),
        policy: Box::new(Threshold::new(threshold.parse()?)?),
        while_decoding: true,
    });

    let prompt = tokenizer.encode(prompt, Specials::Parse)?;
    let shape = cache_shape(config, prompt.len() + LIMIT, WINDOW, kind)?;
    let cache = Paged::new(Cpu::new(shape)?)?;
    let mut session = Session::new(lm.as_ref(), device, cache, hooks);
    session.feed(&prompt)?;

    let mut sampler = Sampler::new(Sampling::default())?;
    let mut text = tokenizer.stream();
    session.generate(&mut sampler, &stop, tokenizer.vocab_size(), LIMIT, &mut |token| {
        if let Some(piece) = text.push(token) {
            print!("{piece}");
            let _ = std::io::stdout().flush();
        }
        ControlFlow::Continue(())
    })?;
    println!("{}", text.finish().unwrap_or_default());
    let usage = session.cache().usage();
    eprintln!("{} bytes held, {:.0} % removed", usage.bytes, 100.0 * usage.removed());
    Ok(())
}
