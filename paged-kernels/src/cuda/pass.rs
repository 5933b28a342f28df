//! Passes of several tokens a text over a cache on the card.

use crate::book::Sequence;
use crate::cuda::driver::Device;
use crate::cuda::driver::pass::{Pass, PassText};
use crate::cuda::driver::resident::State;
use crate::cuda::resident::Resident;
use crate::error::{Error, Result};
use std::collections::BTreeSet;

/// The longest pass that a cache may have seats for: what closes the holes of one keeps its slots in shared memory.
pub(super) const MOST_TOKENS: usize = 8192;

impl Resident {
    /// Plans a pass of some new tokens for each text, in all layers: a question of a few tokens, a chunk of a long prompt, the
    /// next turn of a talk. [`append`](Self::append) and [`attend`](Self::attend) then take the tokens of all texts, one text
    /// after the other, until the next pass or step; before a step the [`batch`](Self::batch) must be named anew.
    ///
    /// This is sparse prefill over a pruned cache: each token of the pass attends to what its text has kept so far, to the
    /// window, and to the pass up to itself. A pass drops nothing of itself; its bits are obeyed from the next on. A prompt
    /// that comes in several passes is not what [`fill`](Self::fill) makes of it: there every token attends to all before it,
    /// dropped or not, as KVzap and kvpress prefill.
    ///
    /// Two or three launches; nothing waits but the first pass, and those with more tokens than any before, which need memory.
    ///
    /// # Errors
    /// An unknown text, one that stands twice or is not filled in every layer; [`Error::PassTooLong`]; a step under way.
    pub fn begin_pass(&mut self, texts: &[(Sequence, usize)]) -> Result<()> {
        self.check_finished()?;
        let (mut seen, most) = (BTreeSet::new(), self.seats.pass);
        for &(sequence, tokens) in texts {
            if !seen.insert(sequence) {
                return Err(Error::SequenceTwice);
            }
            self.text(sequence)?.filled.check_step()?;
            if tokens > most {
                return Err(Error::PassTooLong { found: tokens, most });
            }
        }
        let mut entries = Vec::with_capacity(texts.len());
        for &(sequence, tokens) in texts {
            let text = self.text(sequence)?;
            text.filled.step();
            let leaving = std::mem::replace(&mut text.recent, tokens);
            entries.push(PassText { seat: sequence.index(), tokens, leaving });
        }
        let (group, cut) = (self.shape.group(), self.step.cut);
        let pass = loaded(&mut self.pass, &self.device, &self.state)?;
        self.device.leave(&self.state, pass, &entries, self.forked)?;
        self.device.begin_pass(&self.state, pass, &entries, group, cut)?;
        let tokens = entries.iter().map(|text| text.tokens).sum();
        self.under_way(
            texts.iter().filter(|text| text.1 > 0).map(|text| Some(text.0)).collect(),
            Some(tokens),
        );
        Ok(())
    }

    /// Lets go what the last passes of `texts` have pushed out of the window, so that steps of one token can follow.
    pub(super) fn settle(&mut self, texts: &[Option<Sequence>]) -> Result<()> {
        let mut entries = Vec::new();
        for &sequence in texts.iter().flatten() {
            let leaving = std::mem::replace(&mut self.text(sequence)?.recent, 1);
            // After a single token the step itself sees to it.
            if leaving > 1 {
                entries.push(PassText { seat: sequence.index(), tokens: 0, leaving });
            }
        }
        if entries.is_empty() {
            return Ok(());
        }
        let pass = loaded(&mut self.pass, &self.device, &self.state)?;
        self.device.leave(&self.state, pass, &entries, self.forked)
    }
}

/// The kernels of passes, which few caches need.
fn loaded<'a>(pass: &'a mut Option<Pass>, device: &Device, state: &State) -> Result<&'a mut Pass> {
    match pass {
        Some(pass) => Ok(pass),
        none => Ok(none.insert(Pass::new(device, state)?)),
    }
}
