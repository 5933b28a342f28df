//! A text by itself on a card: prompts through libtorch, steps through the graph.

use super::{CardCache, Place, Step, Token};
use crate::cache::{KvCache, Usage};
use crate::error::{Error, Result};
use crate::sampling::{Sampler, Sampling};
use crate::session::Steps;
use paged_kernels::Resident;
use tch::Tensor;

/// A [`CardCache`] whose steps a [`Step`] takes. A drawn token is fed back on the card; the host waits for each before it
/// queues the next step, since one that ends the text must not be read.
#[derive(Debug)]
pub struct CardText {
    cache: CardCache<Resident>,
    step: Step,
    /// What the last step drew and how, while its batch is seated.
    drawn: Option<(u32, Sampling)>,
}

impl CardText {
    /// A text in `cache`, whose steps `step` takes.
    pub fn new(cache: CardCache<Resident>, step: Step) -> Self {
        Self { cache, step, drawn: None }
    }
}

impl Steps for CardText {
    fn step(&mut self, token: u32, sampler: &mut Sampler) -> Result<u32> {
        let position = self.cache.tokens();
        let sampling = sampler.sampling();
        let (resident, sequence) = self.cache.step();
        if self.drawn.as_ref() != Some(&(token, sampling.clone())) {
            let token = Token::Known(token);
            let place = Place { sequence, token, position, sampling: sampling.clone() };
            self.step.batch(resident, &[Some(place)])?;
        }
        let number = self.step.run(resident, &[sampler.chance()])?;
        let drawn = self.step.drawn(number, true)?.ok_or(Error::NoLogits)?;
        if drawn.missing > 0 {
            return Err(self.cache.out_of_pages());
        }
        let token = drawn.tokens.first().copied().flatten().ok_or(Error::NoLogits)?;
        self.drawn = Some((token, sampling));
        Ok(token)
    }

    fn scores(&self) -> Result<Vec<f32>> {
        Ok(Vec::try_from(self.step.scores()?.f_reshape([-1])?)?)
    }
}

impl KvCache for CardText {
    fn tokens(&self) -> usize {
        self.cache.tokens()
    }

    fn window(&self) -> usize {
        self.cache.window()
    }

    fn begin(&mut self, tokens: usize) -> Result<()> {
        self.drawn = None;
        self.cache.begin(tokens)
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.cache.attend(layer, queries, keys, values, drops)
    }

    fn usage(&self) -> Usage {
        self.cache.usage()
    }

    fn mark(&mut self) -> Result<()> {
        self.cache.mark()
    }

    fn rewind(&mut self) -> Result<()> {
        self.drawn = None;
        self.cache.rewind()
    }
}
