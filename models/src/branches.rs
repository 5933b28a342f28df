//! One text that was read once and goes on in several ways, side by side.

use crate::cache::{Usage, causal};
use crate::causal_lm::{CausalLm, Whose};
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use crate::layers::FEW;
use crate::pool::Pool;
use crate::sampling::Sampler;
use crate::session::{Generated, Stop, awake, check, log_probability};
use paged_kernels::Sequence;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Device, Tensor};

/// Branches of one text: each forgot other tokens of it, was asked something else, or draws its answer by other chance.
///
/// The text is read once, and branches write in steps that read the weights once for all. What a branch writes in f32 is
/// to the last bit what a [`Session`](crate::Session) of its own would write: no row of a step changes another's sums, and
/// passes of several tokens are of one branch at a time.
pub struct Branches<'m> {
    model: &'m dyn CausalLm,
    pool: Box<dyn Pool + 'm>,
    hooks: Hooks,
    turn: Turn,
    branches: Vec<Branch>,
    /// As they were marked: forks, whose pages are shared.
    marked: Vec<Branch>,
}

#[derive(Clone)]
struct Branch {
    sequence: Sequence,
    tokens: usize,
    /// Its place among the branches that read the text.
    way: usize,
    /// Of the next token, once something was read.
    logits: Vec<f32>,
}

/// Whose tokens are scored: what scores a pass may ask.
#[derive(Clone, Debug, Default)]
pub struct Turn(Arc<Mutex<Turns>>);

#[derive(Debug, Default)]
struct Turns {
    /// None while the text is read, for all branches at once.
    ways: Vec<usize>,
    next: usize,
}

impl Turn {
    /// The way to forget of what is scored by this call, as a place among the branches that read the text; `None` is all
    /// of them. To be asked once a call.
    pub fn next(&self) -> Option<usize> {
        let mut turns = self.turns();
        let at = turns.next;
        turns.next = (at + 1) % turns.ways.len().max(1); // of each layer the tokens are scored in their order
        turns.ways.get(at).copied()
    }

    fn set(&self, ways: Vec<usize>) {
        *self.turns() = Turns { ways, next: 0 };
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'m> Branches<'m> {
    /// `count` branches of a text that is to be read, in `pool`, on the machine where the model lies.
    ///
    /// The scorer and policy in `hooks` say what each branch drops when the text is read, `[count, kv_heads, tokens]`, and
    /// of tokens that come later what the branch drops whose `turn` it is.
    pub fn new(
        model: &'m dyn CausalLm,
        mut pool: impl Pool + 'm,
        count: usize,
        hooks: Hooks,
        turn: Turn,
    ) -> Result<Self> {
        let empty =
            |way| Ok(Branch { sequence: pool.allocate()?, tokens: 0, way, logits: Vec::new() });
        let branches = (0..count).map(empty).collect::<Result<_>>()?;
        let pool = Box::new(pool);
        Ok(Self { model, pool, hooks, turn, branches, marked: Vec::new() })
    }

    /// Reads the text, for all branches in one pass.
    pub fn read(&mut self, tokens: &[u32]) -> Result<()> {
        check(self.model.config(), 0, tokens.len(), tokens)?;
        self.turn.set(Vec::new());
        let indices: Vec<usize> = (0..tokens.len()).collect();
        let mut pass =
            self.model.enter(&row(tokens, self.pool.device())?, &indices, Whose::Context)?;
        let Self { model, pool, hooks, branches, .. } = self;
        let window = pool.shape().window;
        for layer in 0..model.config().layers {
            model.layer(layer, &mut pass, hooks, window, &mut |queries, keys, values, drops| {
                let wanted = [branches.len() as i64, keys.size()[1], keys.size()[2]];
                if let Some(found) = drops.map(Tensor::size).filter(|found| *found != wanted) {
                    return Err(Error::DropBits { wanted: wanted.to_vec(), found });
                }
                for (i, branch) in branches.iter().enumerate() {
                    let own = drops.map(|drops| drops.f_narrow(0, i as i64, 1)).transpose()?;
                    pool.fill(branch.sequence, layer, keys, values, own.as_ref())?;
                }
                causal(queries, keys, values)
            })?;
        }
        let last = self.model.leave(pass)?.f_select(1, -1)?;
        let logits = Vec::<f32>::try_from(&self.model.logits(&last)?.f_reshape([-1])?)?;
        self.pool.settle()?;
        for branch in &mut self.branches {
            (branch.tokens, branch.logits) = (tokens.len(), logits.clone());
        }
        Ok(())
    }

    /// Lets one branch read more.
    pub fn feed(&mut self, branch: usize, tokens: &[u32]) -> Result<()> {
        let read = self.branches[branch].tokens;
        check(self.model.config(), read, tokens.len(), tokens)?;
        self.pool.begin(&[(self.branches[branch].sequence, tokens.len())])?;
        let indices: Vec<usize> = (read..read + tokens.len()).collect();
        let hidden = self.later(&[branch], tokens, &indices, Whose::Later)?;
        self.hear(&[branch], &hidden.f_narrow(1, -1, 1)?)
    }

    /// Lets each of some branches read a token.
    pub fn step(&mut self, tokens: &[(usize, u32)]) -> Result<()> {
        for batch in tokens.chunks(FEW) {
            let (branches, ids): (Vec<usize>, Vec<u32>) = batch.iter().copied().unzip();
            let indices: Vec<usize> = branches.iter().map(|&at| self.branches[at].tokens).collect();
            for &read in &indices {
                check(self.model.config(), read, 1, &ids)?;
            }
            let step = branches.iter().map(|&at| (self.branches[at].sequence, 1));
            self.pool.begin(&step.collect::<Vec<_>>())?;
            let hidden = awake(|| self.later(&branches, &ids, &indices, Whose::Several))?;
            self.hear(&branches, &hidden)?;
        }
        Ok(())
    }

    /// Runs a step that has begun; the last hidden states, `[1, ids, hidden]`.
    fn later(
        &mut self,
        branches: &[usize],
        ids: &[u32],
        indices: &[usize],
        whose: Whose,
    ) -> Result<Tensor> {
        self.turn.set(branches.iter().map(|&at| self.branches[at].way).collect());
        let Self { model, pool, hooks, .. } = self;
        let window = pool.shape().window;
        let mut pass = model.enter(&row(ids, pool.device())?, indices, whose)?;
        for layer in 0..model.config().layers {
            model.layer(layer, &mut pass, hooks, window, &mut |queries, keys, values, drops| {
                pool.attend(layer, queries, keys, values, drops)
            })?;
        }
        for &at in branches {
            self.branches[at].tokens += ids.len() / branches.len();
        }
        self.model.leave(pass)
    }

    /// Keeps what `branches` expect after `hidden`, `[1, branches, hidden]`.
    fn hear(&mut self, branches: &[usize], hidden: &Tensor) -> Result<()> {
        let logits = Vec::<f32>::try_from(&self.model.logits(hidden)?.f_reshape([-1])?)?;
        self.pool.settle()?;
        let each = logits.chunks(logits.len() / branches.len());
        for (&at, logits) in branches.iter().zip(each) {
            self.branches[at].logits = logits.to_vec();
        }
        Ok(())
    }

    /// Continues all branches, each by its own sampler, as [`Session::generate`](crate::Session::generate) does one;
    /// `each` is called with a branch and a token as it is chosen.
    pub fn generate(
        &mut self,
        samplers: &mut [Sampler],
        stop: &[u32],
        vocabulary: usize,
        limit: usize,
        each: &mut dyn FnMut(usize, u32),
    ) -> Result<Vec<Generated>> {
        let empty = Generated { tokens: Vec::new(), stop: Stop::Length };
        let mut written = vec![empty; samplers.len()];
        let mut going: Vec<usize> = (0..samplers.len()).collect();
        for place in 1..=limit {
            let mut step = Vec::new();
            for branch in going {
                let logits = self.logits(branch).ok_or(Error::EmptyPrompt)?;
                let token = samplers[branch].sample(&logits[..vocabulary.min(logits.len())])?;
                if stop.contains(&token) {
                    written[branch].stop = Stop::Token(token);
                    continue;
                }
                written[branch].tokens.push(token);
                each(branch, token);
                step.push((branch, token));
            }
            if step.is_empty() || place == limit {
                break;
            }
            self.step(&step)?;
            going = step.into_iter().map(|(branch, _)| branch).collect();
        }
        Ok(written)
    }

    /// Reads `tokens` in every branch, and says of each branch and token what
    /// [`Session::log_likelihoods`](crate::Session::log_likelihoods) says of one.
    pub fn log_likelihoods(&mut self, tokens: &[u32], vocabulary: usize) -> Result<Vec<Vec<f64>>> {
        let mut found = vec![Vec::with_capacity(tokens.len()); self.branches.len()];
        for &token in tokens {
            for (branch, found) in found.iter_mut().enumerate() {
                let logits = self.logits(branch).ok_or(Error::EmptyPrompt)?;
                found.push(log_probability(logits, vocabulary, token)?);
            }
            self.step(&(0..found.len()).map(|branch| (branch, token)).collect::<Vec<_>>())?;
        }
        Ok(found)
    }

    /// Remembers the branches as they are, for [`rewind`](Self::rewind).
    pub fn mark(&mut self) -> Result<()> {
        let marked = fork(self.pool.as_mut(), &self.branches)?;
        for old in std::mem::replace(&mut self.marked, marked) {
            self.pool.release(old.sequence)?;
        }
        Ok(())
    }

    /// Goes back to the mark, in branches that go on from the marked ones in `from`, one of which may be there several
    /// times.
    ///
    /// # Errors
    /// [`Error::NoMark`].
    pub fn rewind(&mut self, from: &[usize]) -> Result<()> {
        if self.marked.is_empty() {
            return Err(Error::NoMark);
        }
        let again = fork(self.pool.as_mut(), from.iter().map(|&at| &self.marked[at]))?;
        for old in std::mem::replace(&mut self.branches, again) {
            self.pool.release(old.sequence)?;
        }
        Ok(())
    }

    /// The scores of a branch's next token, `[vocabulary]`, once it has read something.
    pub fn logits(&self, branch: usize) -> Option<&[f32]> {
        let logits = &self.branches.get(branch)?.logits;
        (!logits.is_empty()).then_some(logits)
    }

    /// How many rows a branch holds for each layer and kv head, `[layers, kv_heads]`.
    pub fn kept(&self, branch: usize) -> Result<Vec<usize>> {
        self.pool.lengths(self.branches[branch].sequence)
    }

    /// What a branch holds, pages that it shares with others included.
    pub fn usage(&self, branch: usize) -> Result<Usage> {
        let (shape, kept) = (self.pool.shape(), self.kept(branch)?);
        let pages: usize = kept.iter().map(|rows| rows.div_ceil(shape.page_size)).sum();
        let bytes = pages * shape.page_bytes();
        Ok(Usage {
            bytes,
            peak_bytes: bytes,
            rows: kept.iter().sum(),
            dense_rows: kept.len() * self.branches[branch].tokens,
        })
    }
}

fn fork<'b>(
    pool: &mut dyn Pool,
    branches: impl IntoIterator<Item = &'b Branch>,
) -> Result<Vec<Branch>> {
    let fork =
        |branch: &Branch| Ok(Branch { sequence: pool.fork(branch.sequence)?, ..branch.clone() });
    branches.into_iter().map(fork).collect()
}

/// Token ids as a batch of 1.
fn row(ids: &[u32], device: Device) -> Result<Tensor> {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    Ok(Tensor::f_from_slice(&ids)?.f_to_device(device)?.f_unsqueeze(0)?)
}

impl std::fmt::Debug for Branches<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tokens: Vec<usize> = self.branches.iter().map(|branch| branch.tokens).collect();
        f.debug_struct("Branches").field("tokens", &tokens).finish_non_exhaustive()
    }
}
