//! RePo on one layer: where the tokens of a text stand, and what that does to attention.
//!
//! `cargo run -p repo-pos --example reposition`

use repo_pos::{Array, Frequencies, Module, Repo, Repositioner, Result};

const TOKENS: usize = 6;
const HIDDEN: usize = 16;
const HEAD_DIM: usize = 8;

/// Stands in for weights and hidden states of a model.
fn numbers(seed: f32, len: usize) -> Vec<f32> {
    (0..len).map(|n| (1.7 * seed + 0.731 * n as f32).sin()).collect()
}

fn main() -> Result<()> {
    let maps = Module::new(HIDDEN, 1, numbers(2.0, 32), numbers(3.0, 32), numbers(4.0, 2))?;
    let repo = Repo::new(vec![None, Some(maps)])?; // layer 0 keeps the index
    let frequencies = Frequencies::plain(10_000.0, HEAD_DIM)?;
    let hidden = Array::new(numbers(1.0, TOKENS * HIDDEN), [1, TOKENS, HIDDEN])?;
    let index: Vec<_> = (0..TOKENS).map(|n| n as f32).collect();

    for layer in 0..2 {
        let positions = repo.positions(layer, &hidden)?;
        let positions = positions.as_ref().map_or(&index[..], Array::data);
        let mut queries = numbers(5.0, TOKENS * HEAD_DIM);
        let mut keys = numbers(6.0, TOKENS * HEAD_DIM);
        frequencies.rotate(&mut queries, positions, TOKENS)?;
        frequencies.rotate(&mut keys, positions, TOKENS)?;

        let query = &queries[(TOKENS - 1) * HEAD_DIM..];
        println!("layer {layer}\n  token  position  score of the last query");
        for (token, key) in keys.chunks(HEAD_DIM).enumerate() {
            let score: f32 = query.iter().zip(key).map(|(q, k)| q * k).sum();
            println!("  {token:5}  {:8.3}  {score:6.3}", positions[token]);
        }
    }
    Ok(())
}
