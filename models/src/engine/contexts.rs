//! Contexts that were read once and are kept for those who begin with them.

use super::executor::TextId;
use std::collections::HashMap;
use std::sync::Arc;

/// Texts that nobody writes to, by their tokens. An engine has one model and one way to forget, so the tokens say all
/// that keys, values and the kept set depend on; their equality is compared, not a hash alone.
#[derive(Debug, Default)]
pub struct Contexts {
    kept: HashMap<Arc<[u32]>, Kept>,
    /// Requests that have not begun yet, by their context.
    wanted: HashMap<Arc<[u32]>, usize>,
    uses: u64,
}

#[derive(Debug)]
struct Kept {
    text: TextId,
    used: u64,
}

impl Contexts {
    /// Counts a request that waits.
    pub fn want(&mut self, context: &Arc<[u32]>) {
        *self.wanted.entry(context.clone()).or_default() += 1;
    }

    /// Takes one off.
    pub fn unwant(&mut self, context: &[u32]) {
        if let Some(count) = self.wanted.get_mut(context) {
            *count -= 1;
            if *count == 0 {
                self.wanted.remove(context);
            }
        }
    }

    pub fn is_wanted(&self, context: &[u32]) -> bool {
        self.wanted.contains_key(context)
    }

    pub fn keep(&mut self, context: Arc<[u32]>, text: TextId) {
        self.uses += 1;
        self.kept.insert(context, Kept { text, used: self.uses });
    }

    /// The text that has read `context`, which counts as a use.
    pub fn get(&mut self, context: &[u32]) -> Option<TextId> {
        let kept = self.kept.get_mut(context)?;
        self.uses += 1;
        kept.used = self.uses;
        Some(kept.text)
    }

    pub fn contains(&self, context: &[u32]) -> bool {
        self.kept.contains_key(context)
    }

    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Gives up the one that was not used for longest, but not `spared`; those that nobody waits for go first.
    pub fn evict(&mut self, spared: Option<&[u32]>) -> Option<TextId> {
        let others = self.kept.iter().filter(|(context, _)| Some(&context[..]) != spared);
        let context = others.min_by_key(|(context, kept)| (self.is_wanted(context), kept.used))?;
        let context = context.0.clone();
        self.kept.remove(&context).map(|kept| kept.text)
    }

    /// Gives up one that nobody waits for, if there are more than `most` of them.
    pub fn trim(&mut self, most: usize) -> Option<TextId> {
        let idle = self.kept.keys().filter(|context| !self.is_wanted(context)).count();
        if idle > most { self.evict(None) } else { None }
    }
}
