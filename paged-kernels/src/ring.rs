//! The newest tokens of one head, whose drop bits are known but not yet obeyed.

use crate::page::Slot;
use std::collections::VecDeque;

/// A window entry: where a token lies and whether it goes when it leaves the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recent {
    /// The token's slot.
    pub slot: Slot,
    /// Whether its slot becomes free once it is older than the window.
    pub drop: bool,
}

/// The newest tokens of one head, oldest first. Between steps it may hold more than the window: the tokens of a step
/// push it over, and the step after takes the surplus off.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ring(VecDeque<Recent>);

impl Ring {
    pub fn push(&mut self, slot: Slot, drop: bool) {
        self.0.push_back(Recent { slot, drop });
    }

    /// Slots of dropped tokens among those older than the newest `window`.
    pub fn leaving(&self, window: usize) -> impl Iterator<Item = Slot> {
        let surplus = self.0.len().saturating_sub(window);
        self.0.iter().take(surplus).filter(|recent| recent.drop).map(|recent| recent.slot)
    }

    /// Forgets all but the newest `window`.
    pub fn advance(&mut self, window: usize) {
        self.0.drain(..self.0.len().saturating_sub(window));
    }

    /// Sets the drop bits of the newest `drops.len()` tokens.
    pub fn decide(&mut self, drops: &[bool]) {
        let older = self.0.len().saturating_sub(drops.len());
        self.0.iter_mut().skip(older).zip(drops).for_each(|(recent, &drop)| recent.drop = drop);
    }

    /// Follows a row that was copied.
    pub fn moved(&mut self, from: Slot, to: Slot) {
        if let Some(recent) = self.0.iter_mut().find(|recent| recent.slot == from) {
            recent.slot = to;
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Recent> {
        self.0.iter().copied()
    }
}
