//! The seam between the scheduler, which decides what runs next, and the machine that runs it.

use crate::error::Result;
use crate::sampling::Sampling;

/// A machine that reads and writes texts: weights, pages, and a sampler for each text.
///
/// The [`Scheduler`](super::Scheduler) never sees a tensor and the machine never sees a queue. A text's life:
///
/// ```text
/// begin ─ read, advance … ─┬─ draw ─ step, step, … ─ release
///                          └─ fork ─ (read, advance …) ─ draw ─ step, …      the same context, read once
/// ```
///
/// Between any two calls a text may be [suspended](Self::suspend) and, before the next call that names it, resumed.
///
/// **What a text gets does not depend on its neighbours.** A machine that promises this bit for bit gives each text
/// exactly the tokens that it would get alone; one that does not (a fast mode on a card) says so in its own
/// documentation.
///
/// **Nothing waits in a step.** [`step`](Self::step) may return before its tokens are known: they come out of
/// [`drawn`](Self::drawn), one step late at most, so at most one step is under way when the next is asked for. So the
/// scheduler may step a text once more after it has drawn its stop token, and throws that token away.
///
/// **Nothing runs out of pages.** Before [`advance`](Self::advance), [`step`](Self::step) and [`resume`](Self::resume)
/// the scheduler holds what they can take at most against [`free_pages`](Self::free_pages). These bounds must be true and
/// should be tight; what falls short of them costs nothing but a text that is suspended too early.
///
/// # Errors
/// A call that names one text and fails leaves the others as they were; the scheduler ends the text with the error and
/// releases it. After a failed `step` all texts of its batch end so. A machine that is lost fails in every call from then
/// on. What is wrong with one text in a batch (scores that are NaN) belongs into its [`Drawn`], not into `step`'s error.
pub trait Executor {
    /// What the machine has room for. Always the same.
    fn limits(&self) -> Limits;

    /// Pages that are free now, at least: where the machine has not said yet what the work under way takes, its
    /// most is taken off. Does not wait.
    fn free_pages(&self) -> usize;

    /// The most pages that a text alone can hold once it has `tokens` tokens, read and written: those of a text that
    /// drops nothing.
    fn most_pages(&self, tokens: usize) -> usize;

    /// The most pages that [`advance`](Self::advance) can still take until all that `text` was given to read is read,
    /// copies of shared pages included.
    fn pages_to_read(&self, text: TextId) -> usize;

    /// The most pages that the next [`step`](Self::step) can take for `text`, copies of shared pages included.
    fn pages_to_step(&self, text: TextId) -> usize;

    /// Pages that `text` holds, shared ones in full; if it is suspended, those that [`resume`](Self::resume) takes. Does
    /// not wait: may be more than the truth.
    fn pages(&self, text: TextId) -> usize;

    /// A new, empty text. Takes a seat and no page.
    fn begin(&mut self) -> Result<TextId>;

    /// Hands `text` tokens to read, of which there is at least one; [`advance`](Self::advance) then reads them. Nothing
    /// of an earlier `read` is left to do.
    ///
    /// The first tokens are the context: each of its tokens attends to all before it, as in
    /// [`KvCache`](crate::KvCache), after which it is pruned. Later ones are a question: a pass over what was kept.
    fn read(&mut self, text: TextId, tokens: &[u32]) -> Result<()>;

    /// Reads on, by about as much work as `budget` tokens through the whole model, and by something at least; says
    /// whether all is read. The machine chooses where to cut: a pruned context between layers, since each token sees all
    /// before it.
    fn advance(&mut self, text: TextId, budget: usize) -> Result<bool>;

    /// Draws the first token of a text that is all read, and was not drawn from. `sampling` and its random state stay
    /// with the text, whatever its row in a batch, and are suspended with it.
    fn draw(&mut self, text: TextId, sampling: &Sampling) -> Result<()>;

    /// One step: each text of `batch` reads the token that it has drawn last, and draws the next. No text stands twice;
    /// there is at least one, and at most [`Limits::batch`]. Texts that go on keep their order from step to step.
    fn step(&mut self, batch: &[TextId]) -> Result<()>;

    /// The tokens that have become known since the last call, each text's in the order in which they were drawn. With
    /// `wait` all that were drawn until now. Those of a released text do not come; those of a suspended one do.
    fn drawn(&mut self, wait: bool) -> Result<Vec<Drawn>>;

    /// A second text that goes on from where `text` is, in the same pages. `text` is all read and was never drawn from;
    /// both may read on or be drawn from. Takes a seat and no page.
    fn fork(&mut self, text: TextId) -> Result<TextId>;

    /// Moves a text that is all read to host memory, and gives its seat and pages back; says how many bytes it takes
    /// there. May wait for the machine.
    fn suspend(&mut self, text: TextId) -> Result<usize>;

    /// Brings a suspended text back. What it writes from then on is what it would have written, bit for bit.
    fn resume(&mut self, text: TextId) -> Result<()>;

    /// Forgets a text, whatever it is doing, suspended or not.
    fn release(&mut self, text: TextId) -> Result<()>;

    /// What a text that is not suspended holds. May wait for the machine, so it is asked once, before the text is
    /// released.
    fn held(&mut self, text: TextId) -> Result<Held>;
}

/// A text on a machine. A machine never gives one out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TextId(pub u64);

/// What a machine has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pages in all.
    pub pages: usize,
    /// Texts that are not suspended at once, contexts that are kept to be forked included.
    pub seats: usize,
    /// Texts in one step.
    pub batch: usize,
    /// Tokens of a text, read and written.
    pub tokens: usize,
    /// Tokens of a [`read`](Executor::read) that is not a text's first.
    pub question: usize,
    /// Ids that can be read and drawn.
    pub vocabulary: usize,
}

/// A token that has become known.
#[derive(Debug)]
pub struct Drawn {
    /// The text that drew it.
    pub text: TextId,
    /// Its id, or why there is none: the text can only be released then.
    pub token: Result<u32>,
}

/// What a text holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages, shared ones in full.
    pub pages: usize,
    /// Rows (a key and a value of one token, layer and kv head) that a query can see.
    pub rows: usize,
    /// Rows that a cache which forgets nothing would hold.
    pub dense_rows: usize,
}
