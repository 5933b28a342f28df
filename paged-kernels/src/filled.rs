//! Which layers of a text have its prompt: each is filled once, with as many tokens as the others, before the first step.

use crate::error::{Error, Result};

#[derive(Debug, Clone)]
pub struct Filled {
    layers: Vec<bool>,
    tokens: usize,
    stepped: bool,
}

impl Filled {
    pub fn none(layers: usize) -> Self {
        Self { layers: vec![false; layers], tokens: 0, stepped: false }
    }

    /// Says whether a layer may be filled with `tokens` tokens now.
    pub fn check(&self, layer: usize, tokens: usize) -> Result<()> {
        if self.stepped {
            return Err(Error::FilledLate);
        }
        if self.layers[layer] {
            return Err(Error::FilledTwice { layer });
        }
        if self.layers.contains(&true) && self.tokens != tokens {
            return Err(Error::TokensDiffer { layer, expected: self.tokens, found: tokens });
        }
        Ok(())
    }

    pub fn fill(&mut self, layer: usize, tokens: usize) {
        self.layers[layer] = true;
        self.tokens = tokens;
    }

    /// Says whether the text may step: all of its layers are filled, or none.
    pub fn check_step(&self) -> Result<()> {
        match self.layers.iter().position(|filled| !filled) {
            Some(layer) if self.layers.contains(&true) => Err(Error::NotFilled { layer }),
            _ => Ok(()),
        }
    }

    pub fn step(&mut self) {
        self.stepped = true;
    }
}
