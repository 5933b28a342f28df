//! What pruning costs the models that surrogates are published for: `cargo run -p kvzap --example overhead`.

use kvzap::ModelShape;

fn main() {
    println!(
        "{:24}{:>10}{:>16}{:>12}{:>12}{:>10}",
        "", "surrogate", "parameters", "MB in bf16", "MFLOP/token", "of model"
    );
    for (name, model) in ModelShape::PUBLISHED {
        for (kind, width) in [("MLP", Some(model.hidden / 8)), ("linear", None)] {
            let overhead = model.overhead(width);
            println!(
                "{name:24}{kind:>10}{:>15.2}M{:>12.1}{:>12.1}{:>9.2}%",
                overhead.parameters as f64 / 1e6,
                2.0 * overhead.parameters as f64 / 1e6,
                overhead.flops as f64 / 1e6,
                100.0 * overhead.share(),
            );
        }
        println!("{:24}{} bytes of cache a token in bf16", "", model.cache_bytes(2));
    }
}
