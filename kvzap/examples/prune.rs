//! Scores in, kept positions out: the same scores under KVzap's threshold and under a fixed budget.
//!
//! `cargo run -p kvzap --example prune`

use kvzap::{Array, Budget, Policy, Result, Scope, Threshold, judged};

const HEADS: usize = 2;
const TOKENS: usize = 12;
const WINDOW: usize = 4; // short, for show

fn main() -> Result<()> {
    #[rustfmt::skip]
    let scores = Array::new(vec![
        -1.0, -6.5, -5.0, -2.0, -7.0, -4.0, -3.9, -8.0, -9.0, -9.0, -9.0, -9.0,
        -0.5, -1.5, -3.0, -2.0, -5.0, -3.5, -4.5, -1.0, -9.0, -9.0, -9.0, -9.0,
    ], &[1, HEADS, TOKENS])?;

    println!("{TOKENS} tokens, the newest {WINDOW} of them safe");
    show("threshold -4", Threshold::new(-4.0)?.drops(&scores)?);
    show("a third of each head", Budget::new(1.0 / 3.0, WINDOW, Scope::Head)?.drops(&scores)?);
    show("a third of the layer", Budget::new(1.0 / 3.0, WINDOW, Scope::Layer)?.drops(&scores)?);
    Ok(())
}

/// A drop bit counts once its token has left the window.
fn show(policy: &str, drops: Vec<bool>) {
    println!("{policy}");
    for (head, drops) in drops.chunks(TOKENS).enumerate() {
        let gone = |token: &usize| judged(TOKENS, WINDOW).contains(token) && drops[*token];
        let kept: Vec<usize> = (0..TOKENS).filter(|token| !gone(token)).collect();
        println!("  head {head} keeps {kept:?}");
    }
}
