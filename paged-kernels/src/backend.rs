//! The seam: what a cache of pages is asked to do.

use crate::book::Sequence;
use crate::error::Result;
use crate::shape::{CacheShape, Stats};
use crate::view::{View, ViewMut};

/// A paged cache of keys and values, and attention over it.
///
/// Every (layer, sequence, kv head) keeps its own list of live tokens in pages of its own, so what one head drops is
/// memory and time saved, whatever the others keep. Implemented by [`Reference`](crate::Reference), which is plain and
/// exact, and [`Cpu`](crate::Cpu), which is fast. A sequence is allocated, each of its layers filled once with the
/// prompt (or none: a prompt may also come as a step), and then it takes steps: [`begin_step`](Self::begin_step) plans
/// all layers, then each layer is appended to and attended.
///
/// The rule: a token's drop bit is given with it and obeyed when the token is older than the newest `window`. After a
/// prefill of T tokens `i >= T - window` and every `i` not dropped are live; after a step that makes it `total` tokens,
/// `i >= total - n - window` and every `i` not dropped. So a query sees itself and at least the `window` tokens before
/// it, as in kvpress's decoding. Shapes: H kv heads, Hq = H · G query heads, T tokens of a prompt, N tokens of a step
/// over all its sequences, D head dim. Views may be f32, bf16 or f16 whatever is stored.
pub trait PagedAttention {
    /// The size of the cache.
    fn shape(&self) -> &CacheShape;

    /// A new, empty sequence. It holds no page yet.
    ///
    /// # Errors
    /// None on the CPU; a device may have no room for another table.
    fn allocate(&mut self) -> Result<Sequence>;

    /// A second sequence that goes on from where `sequence` is: several questions about one text, or several answers to
    /// one. The two share all pages until one of them writes to one, which it copies first; a step counts such copies
    /// among the pages that it needs.
    ///
    /// # Errors
    /// A released sequence, or a step that has not reached every layer. Nothing changes then.
    fn fork(&mut self, sequence: Sequence) -> Result<Sequence>;

    /// Stores what one layer of a prompt keeps. `keys` (rotated) and `values` are `[H, T, D]`; `drops` is `[H, T]`,
    /// `true` where a token goes once it has left the window. Every layer must be given the same T.
    ///
    /// # Errors
    /// `OutOfPages`, wrong shapes, a layer filled twice, after a step, or with another T. Nothing changes then.
    fn fill(
        &mut self,
        sequence: Sequence,
        layer: usize,
        keys: View<'_>,
        values: View<'_>,
        drops: &[bool],
    ) -> Result<()>;

    /// Begins a step of some new tokens for each sequence: slots and pages of all layers and heads.
    ///
    /// # Errors
    /// `OutOfPages` if the step does not fit as a whole (pages that it would itself give back do not count); a sequence
    /// given twice, partly filled, or still in an unfinished step. Nothing changes then.
    fn begin_step(&mut self, step: &[(Sequence, usize)]) -> Result<()>;

    /// Stores the step's tokens in one layer: `keys` (rotated) and `values` `[H, N, D]`, `drops` `[H, N]`, tokens in the
    /// order of the step.
    ///
    /// # Errors
    /// No step, a released sequence, wrong shapes, or a layer appended to before. Nothing changes then.
    fn append(
        &mut self,
        layer: usize,
        keys: View<'_>,
        values: View<'_>,
        drops: &[bool],
    ) -> Result<()>;

    /// Attends from the step's tokens: softmax(scale · q·k) over the live rows of the token's sequence, without later
    /// tokens of its own step. `queries` (rotated) and `out` are `[Hq, N, D]`. `lse`, if given, is `[Hq, N]` and gets
    /// the natural logarithm of the softmax's denominator. A head without a visible row, or whose scores are all −∞,
    /// gives 0 and −∞. A NaN among the visible rows gives NaN for that head alone.
    ///
    /// # Errors
    /// No step, a released sequence, wrong shapes, or a layer not yet appended to. `out` is untouched then.
    fn attend(
        &mut self,
        layer: usize,
        queries: View<'_>,
        scale: f32,
        out: ViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()>;

    /// Gives all pages of a sequence back.
    ///
    /// # Errors
    /// `UnknownSequence` if it was released before.
    fn release(&mut self, sequence: Sequence) -> Result<()>;

    /// How much is in use.
    fn stats(&self) -> Stats;

    /// Live rows of each layer and kv head of a sequence: `[layers, H]`.
    ///
    /// # Errors
    /// `UnknownSequence`.
    fn lengths(&self, sequence: Sequence) -> Result<Vec<usize>>;
}
