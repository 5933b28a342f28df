//! A cache that keeps its books on the card, for steps that are captured once and replayed.

use crate::book::Sequence;
use crate::cuda::check;
use crate::cuda::driver::Device;
use crate::cuda::driver::attend::Cut;
use crate::cuda::driver::pass::Pass;
use crate::cuda::driver::resident::{NO_SEAT, State, Step, Targets};
use crate::cuda::fused::Projected;
use crate::cuda::pass::MOST_TOKENS;
use crate::cuda::plan::SLAB;
use crate::cuda::view::{DeviceBits, DeviceView, DeviceViewMut, check_type};
use crate::error::{Error, Result};
use crate::filled::Filled;
use crate::shape::{CacheShape, Dtype};
use crate::view::check_shape;
use cudarc::driver::CudaStream;
use std::sync::Arc;

/// What a [`Resident`] cache has room for besides its pages: 4 bytes for each page that a head may have, and for each token
/// of its window and of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seats {
    /// Texts at once.
    pub texts: usize,
    /// Tokens that one head of a text may keep.
    pub tokens: usize,
    /// Tokens of a text in one [pass](Resident::begin_pass), up to 8192; 1 where there are only steps.
    pub pass: usize,
    /// What attention promises.
    pub mode: Mode,
}

/// What attention promises about the bits of its results. They are the same in every run in either mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// A layer's pages are shared out equally, whatever heads that cuts: a text's neighbours change its last bits.
    #[default]
    Fast,
    /// Each head is cut by its own length alone: a text's bits are the same whatever its neighbours.
    BatchInvariant,
}

/// A cache in the memory of an NVIDIA card whose pages, lengths and windows are the card's own: drop bits are read where
/// the scores were computed, a step of one token a text is planned there for all layers in one launch, and no call but
/// those that say so waits for the card.
///
/// The rules are those of [`PagedAttention`](crate::PagedAttention): a token's drop bit is obeyed when the window has
/// passed it. Since the host does not see the bits, it does not know the lengths: a page that is wanted when none is free
/// is counted ([`missing`](Self::missing)), and the text whose it was gives nonsense, within bounds, until it is released.
/// A caller who asks [`free_pages`](Self::free_pages) now and then never gets there: a step takes at most a page a head,
/// and for one text no more than one in a page's worth of steps.
///
/// [`begin_step`](Self::begin_step), [`append`](Self::append) and [`attend`](Self::attend) use the same addresses in every
/// step, so a captured step can be replayed for as long as its texts take part; [`batch`](Self::batch) changes them. After a
/// pass of several tokens ([`begin_pass`](Self::begin_pass)) it must be called before the graph is replayed again.
#[derive(Debug)]
pub struct Resident {
    pub(super) shape: CacheShape,
    pub(super) seats: Seats,
    pub(super) device: Device,
    pub(super) state: State,
    pub(super) step: Step,
    /// Loaded for the first pass.
    pub(super) pass: Option<Pass>,
    /// By seat.
    texts: Vec<Option<Text>>,
    allocated: u64,
    /// Whether texts may share pages.
    pub(super) forked: bool,
    batch: Vec<Option<Sequence>>,
    /// Tokens of the pass under way, if it is one: the batch is then its texts.
    tokens: Option<usize>,
    /// Which layers have the tokens of the step under way.
    appended: Option<Vec<bool>>,
}

#[derive(Debug)]
pub(super) struct Text {
    generation: u64,
    pub(super) filled: Filled,
    /// Tokens of its last pass, or of its steps since: no more are beyond the window and not yet gone.
    pub(super) recent: usize,
}

impl Resident {
    /// An empty cache on the first card, working on its default stream.
    ///
    /// # Errors
    /// Those of [`Cuda::new`](crate::Cuda::new).
    pub fn new(shape: CacheShape, seats: Seats) -> Result<Self> {
        check_sizes(&shape, seats, 1)?;
        let dtype = shape.dtype;
        Self::build(shape, seats, Device::first(dtype)?)
    }

    /// An empty cache on the card of `stream`, working on that stream.
    ///
    /// # Errors
    /// Those of [`Cuda::new`](crate::Cuda::new).
    pub fn on(stream: Arc<CudaStream>, shape: CacheShape, seats: Seats) -> Result<Self> {
        check_sizes(&shape, seats, 1)?;
        let dtype = shape.dtype;
        Self::build(shape, seats, Device::new(stream, dtype)?)
    }

    fn build(shape: CacheShape, seats: Seats, device: Device) -> Result<Self> {
        check_sizes(&shape, seats, device.blocks)?;
        let most_pages = seats.tokens.div_ceil(shape.page_size);
        let places = shape.window + seats.pass;
        let state = State::new(&device, &shape, seats.texts, most_pages, places)?;
        let cut = match seats.mode {
            Mode::Fast => Cut::Fast,
            Mode::BatchInvariant => Cut::Invariant,
        };
        let step = Step::new(&device, &state, shape.group(), cut)?;
        let texts = (0..seats.texts).map(|_| None).collect();
        Ok(Self {
            shape,
            seats,
            device,
            state,
            step,
            pass: None,
            texts,
            allocated: 0,
            forked: false,
            batch: Vec::new(),
            tokens: None,
            appended: None,
        })
    }

    /// The size of the cache.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// What it has room for besides its pages.
    pub fn seats(&self) -> Seats {
        self.seats
    }

    /// The stream that the cache works on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.device.stream()
    }

    /// A seat for a text, empty.
    ///
    /// # Errors
    /// [`Error::NoSeat`].
    pub fn allocate(&mut self) -> Result<Sequence> {
        let seats = self.texts.len();
        let seat = self.texts.iter().position(Option::is_none).ok_or(Error::NoSeat { seats })?;
        let generation = self.allocated;
        self.allocated += 1;
        let filled = Filled::none(self.shape.layers);
        self.texts[seat] = Some(Text { generation, filled, recent: 0 });
        Ok(Sequence::at(seat, generation))
    }

    fn check_text(&self, sequence: Sequence) -> Result<()> {
        match self.texts.get(sequence.index()) {
            Some(Some(text)) if Sequence::at(sequence.index(), text.generation) == sequence => {
                Ok(())
            }
            _ => Err(Error::UnknownSequence),
        }
    }

    pub(super) fn text(&mut self, sequence: Sequence) -> Result<&mut Text> {
        self.check_text(sequence)?;
        self.texts[sequence.index()].as_mut().ok_or(Error::UnknownSequence)
    }

    fn check_layer(&self, found: usize) -> Result<()> {
        let layers = self.shape.layers;
        if found < layers { Ok(()) } else { Err(Error::Layer { found, layers }) }
    }

    fn check_bits(&self, bits: DeviceBits<'_>, tokens: usize) -> Result<()> {
        let [heads, found] = bits.shape();
        check_shape("drops", [heads, found, 1], [self.shape.kv_heads, tokens, 1])
    }

    /// Stores one layer of a text's prompt: `keys` and `values` `[H, T, D]`, of which a head keeps the newest window and
    /// the tokens whose bit in `drops`, `[H, T]`, is not set. All layers of a text have as many tokens. Nothing waits
    /// but a first prompt longer than any before, which needs memory.
    ///
    /// # Errors
    /// An unknown text or layer, shapes that are not the cache's, a layer filled before or too late.
    pub fn fill(
        &mut self,
        sequence: Sequence,
        layer: usize,
        keys: DeviceView<'_>,
        values: DeviceView<'_>,
        drops: DeviceBits<'_>,
    ) -> Result<()> {
        let CacheShape { kv_heads, head_dim, .. } = self.shape;
        let [_, tokens, _] = keys.shape();
        self.check_layer(layer)?;
        check_shape("keys", keys.shape(), [kv_heads, tokens, head_dim])?;
        check_shape("values", values.shape(), [kv_heads, tokens, head_dim])?;
        self.check_bits(drops, tokens)?;
        let text = self.text(sequence)?;
        text.filled.check(layer, tokens)?;
        text.filled.fill(layer, tokens);
        let at = [layer, sequence.index()];
        self.device.admit(&self.state, &mut self.step, at, keys, values, drops)
    }

    /// Says who takes the steps that follow, one token each, in the order of the steps' tensors. `None` is a place that
    /// nobody has: what attention writes there is left alone, and a graph serves batches that fill it or not.
    ///
    /// # Errors
    /// An unknown text, one that stands twice or is not filled in every layer; more places than seats; a step under way.
    pub fn batch(&mut self, texts: &[Option<Sequence>]) -> Result<()> {
        self.check_finished()?;
        let seats = self.texts.len();
        if texts.len() > seats {
            return Err(Error::NoSeat { seats });
        }
        for (i, &sequence) in texts.iter().flatten().enumerate() {
            if texts.iter().flatten().skip(i + 1).any(|&other| other == sequence) {
                return Err(Error::SequenceTwice);
            }
            self.text(sequence)?.filled.check_step()?;
        }
        for &sequence in texts.iter().flatten() {
            self.text(sequence)?.filled.step();
        }
        self.settle(texts)?;
        self.under_way(texts.to_vec(), None);
        self.appended = None;
        self.upload_batch()
    }

    /// Notes whose rows are to come, and of a pass how many.
    pub(super) fn under_way(&mut self, texts: Vec<Option<Sequence>>, tokens: Option<usize>) {
        (self.batch, self.tokens) = (texts, tokens);
        self.appended = Some(vec![false; self.shape.layers]);
    }

    fn upload_batch(&mut self) -> Result<()> {
        let seat = |text: &Option<Sequence>| text.map_or(NO_SEAT, |text| text.index() as u32);
        let seats = self.batch.iter().map(seat).collect::<Vec<_>>();
        self.device.batch(&mut self.step, &seats)
    }

    pub(super) fn check_finished(&self) -> Result<()> {
        let missing =
            self.appended.as_ref().and_then(|layers| layers.iter().position(|done| !done));
        match missing {
            Some(layer) if self.batch.iter().any(Option::is_some) => {
                Err(Error::StepUnfinished { layer })
            }
            _ => Ok(()),
        }
    }

    /// Plans a step of one token for each text of the batch, in all layers: one launch.
    ///
    /// # Errors
    /// [`Error::StepUnfinished`] if the step before has not reached every layer; [`Error::NoBatch`] after a pass.
    pub fn begin_step(&mut self) -> Result<()> {
        self.check_finished()?;
        if self.tokens.is_some() {
            return Err(Error::NoBatch);
        }
        self.device.begin(&self.state, &self.step, self.batch.len())?;
        self.appended = Some(vec![false; self.shape.layers]);
        Ok(())
    }

    /// Stores the step's `keys` and `values`, `[H, N, D]` for a batch or a pass of N, in one layer, and records `drops`, `[H, N]`;
    /// without them all stay.
    ///
    /// # Errors
    /// No step, an unknown layer or one that has the step's tokens, shapes that are not the cache's.
    pub fn append(
        &mut self,
        layer: usize,
        keys: DeviceView<'_>,
        values: DeviceView<'_>,
        drops: Option<DeviceBits<'_>>,
    ) -> Result<()> {
        let CacheShape { kv_heads, head_dim, .. } = self.shape;
        let shape = [kv_heads, self.places(), head_dim];
        self.check_layer(layer)?;
        check_shape("keys", keys.shape(), shape)?;
        check_shape("values", values.shape(), shape)?;
        drops.map_or(Ok(()), |drops| self.check_bits(drops, self.places()))?;
        self.appended(layer)?;
        self.device.append(&self.state, self.targets(layer), keys, values, drops)
    }

    /// Where the tokens under way go in a layer.
    fn targets(&self, layer: usize) -> Targets<'_> {
        match &self.pass {
            Some(pass) if self.tokens.is_some() => pass.targets(&self.state, layer),
            _ => self.step.targets(layer, self.shape.kv_heads * self.batch.len()),
        }
    }

    /// Notes that a layer has the step's tokens.
    pub(super) fn appended(&mut self, layer: usize) -> Result<()> {
        self.check_layer(layer)?;
        let appended = self.appended.as_mut().ok_or(Error::NoStep)?;
        let twice = std::mem::replace(&mut appended[layer], true);
        if twice { Err(Error::AppendedTwice { layer }) } else { Ok(()) }
    }

    /// Places of the batch, or tokens of the pass.
    pub(super) fn places(&self) -> usize {
        self.tokens.unwrap_or(self.batch.len())
    }

    pub(super) fn launch_fused(
        &mut self,
        layer: usize,
        projected: &Projected<'_>,
        threshold: f32,
        queries: &mut DeviceViewMut<'_>,
    ) -> Result<()> {
        self.device.append_fused(&self.state, self.targets(layer), projected, threshold, queries)
    }

    /// Whether the attention of steps leaves room on each multiprocessor for a block of the kernel that follows: what that
    /// needs and this does not write can come meanwhile. It is slower by itself, and its last bits are others.
    pub fn leave_room(&mut self, room: bool) {
        self.step.slim = room;
    }

    /// Attends from the step's `queries`, `[Hq, N, D]`, in one layer, after its rows are appended; `lse`, if given, is f32
    /// `[Hq, N, 1]`.
    ///
    /// # Errors
    /// No step, an unknown layer or one without the step's tokens, shapes that are not the cache's.
    pub fn attend(
        &mut self,
        layer: usize,
        queries: DeviceView<'_>,
        scale: f32,
        out: DeviceViewMut<'_>,
        lse: Option<DeviceViewMut<'_>>,
    ) -> Result<()> {
        let CacheShape { query_heads, head_dim, .. } = self.shape;
        let texts = self.places();
        self.check_layer(layer)?;
        check_shape("queries", queries.shape(), [query_heads, texts, head_dim])?;
        check_shape("out", out.shape(), [query_heads, texts, head_dim])?;
        if let Some(lse) = &lse {
            check_shape("lse", lse.shape(), [query_heads, texts, 1])?;
            check_type("lse", lse.dtype(), Dtype::F32)?;
        }
        if !self.appended.as_ref().ok_or(Error::NoStep)?[layer] {
            return Err(Error::NotAppended { layer });
        }
        if let (Some(pass), Some(_)) = (&self.pass, self.tokens) {
            let (device, state) = (&self.device, &self.state);
            return device.attend_pass(state, pass, layer, queries, scale, &out, lse.as_ref());
        }
        let step = self.step.layer(&self.state, &self.device, layer, texts, self.shape.group());
        self.device.attend(&self.state.pool, &step, queries, scale, &out, lse.as_ref())
    }

    /// A second text that goes on from where `sequence` is: several questions about one text, or several answers to one.
    /// The two share all pages until one of them writes to one, which it copies first: a step takes a page for each such
    /// copy. One launch; nothing waits.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::NoSeat`]; [`Error::StepUnfinished`] in the middle of a step.
    pub fn fork(&mut self, sequence: Sequence) -> Result<Sequence> {
        self.check_finished()?;
        let text = self.text(sequence)?;
        let (filled, recent) = (text.filled.clone(), text.recent);
        let fork = self.allocate()?;
        let text = self.text(fork)?;
        (text.filled, text.recent) = (filled, recent);
        self.forked = true;
        self.device.fork(&self.state, sequence.index(), fork.index())?;
        Ok(fork)
    }

    /// Gives a text's pages and its seat back. Its place in the batch, if it has one, is nobody's then.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn release(&mut self, sequence: Sequence) -> Result<()> {
        self.text(sequence)?;
        self.texts[sequence.index()] = None;
        if let Some(place) = self.batch.iter_mut().find(|place| **place == Some(sequence)) {
            *place = None;
            if self.tokens.is_none() {
                self.upload_batch()?;
            }
        }
        self.device.release(&self.state, sequence.index())
    }

    pub(super) fn lens(&self, sequence: Sequence) -> Result<Vec<u32>> {
        let lens = self.state.lens(&self.device)?;
        Ok(lens.into_iter().skip(sequence.index()).step_by(self.texts.len()).collect())
    }

    /// Pages that are free. Waits for the card.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn free_pages(&self) -> Result<usize> {
        Ok(self.state.counters(&self.device)?[0])
    }

    /// Where the card keeps [`free_pages`](Self::free_pages) and [`missing`](Self::missing), two 32-bit numbers that what is
    /// queued on the stream may read: to know them without waiting. The first may be negative once pages were missing.
    pub fn counters(&self) -> u64 {
        self.state.counters_address()
    }

    /// Pages, and rows past a head's most tokens, that were wanted so far and not there. Waits for the card.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn missing(&self) -> Result<usize> {
        Ok(self.state.counters(&self.device)?[1])
    }

    /// Live tokens of each head of a text, `[layers, H]`. Waits for the card.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::Cuda`].
    pub fn lengths(&self, sequence: Sequence) -> Result<Vec<usize>> {
        self.check_text(sequence)?;
        Ok(self.lens(sequence)?.into_iter().map(|len| len as usize).collect())
    }
}

/// Says whether the kernels' numbers hold a cache's sizes on a card of `blocks` multiprocessors.
fn check_sizes(shape: &CacheShape, seats: Seats, blocks: usize) -> Result<()> {
    check(shape)?;
    let wrong = |field, found, advice| Err(Error::CacheShape { field, found, advice });
    let Seats { texts, tokens, pass, .. } = seats;
    for (field, found) in [("texts", texts), ("tokens", tokens), ("pass", pass)] {
        if found == 0 {
            return wrong(field, 0, "it must be at least 1");
        }
    }
    if pass > MOST_TOKENS {
        return wrong(
            "pass",
            pass,
            "a pass has at most 8192 tokens of a text; give longer ones in chunks",
        );
    }
    let rows = shape.layers.checked_mul(shape.kv_heads).and_then(|n| n.checked_mul(texts));
    let entries = rows.and_then(|rows| rows.checked_mul(tokens.div_ceil(shape.page_size)));
    if entries.is_none_or(|entries| entries > u32::MAX as usize) {
        let advice = "the pages of all heads' tables must fit 32 bits; give fewer texts or tokens";
        return wrong("tokens", tokens, advice);
    }
    let slabs = (shape.pages.saturating_add(1)).checked_mul(shape.page_size.div_ceil(SLAB));
    let shares = slabs.and_then(|slabs| slabs.checked_mul(blocks + 1));
    if shares.is_none_or(|shares| shares > u32::MAX as usize) {
        return wrong(
            "pages",
            shape.pages,
            "16 rows each, times multiprocessors, must fit 32 bits",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::driver::attend::HEAD_WORDS;
    use crate::cuda::plan::shares;
    use cudarc::driver::CudaContext;

    /// Rows of each head of each text, `[texts][2]`, of which every seventh text rests.
    fn compare(lengths: &[[usize; 2]]) {
        let shape = CacheShape {
            layers: 2,
            kv_heads: 2,
            query_heads: 2,
            head_dim: 16,
            page_size: 16,
            window: 1,
            pages: 1 << 15,
            dtype: Dtype::Bf16,
        };
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let tokens = lengths.iter().flatten().max().unwrap() + 1;
        let seats = Seats { texts: lengths.len(), tokens: tokens + 1, pass: 1, mode: Mode::Fast };
        let mut cache = Resident::on(stream.clone(), shape, seats).unwrap();
        let rows = stream.alloc_zeros::<half::bf16>(2 * tokens * 16).unwrap();
        let rows = DeviceView::of(&rows, [2, tokens, 16], &stream).unwrap();
        let mut batch = Vec::new();
        for (i, lengths) in lengths.iter().enumerate() {
            let text = cache.allocate().unwrap();
            // The first ones stay, and the window's one.
            let bit = |head: usize, token: usize| u32::from(token + 1 >= lengths[head]);
            let word =
                |head: usize, word: usize| (0..32).map(|t| bit(head, 32 * word + t) << t).sum();
            let words =
                (0..2).flat_map(|head| (0..tokens.div_ceil(32)).map(move |w| word(head, w)));
            let bits = stream.clone_htod(&words.collect::<Vec<u32>>()).unwrap();
            let bits = DeviceBits::of(&bits, [2, tokens], &stream).unwrap();
            for layer in 0..2 {
                cache.fill(text, layer, rows, rows, bits).unwrap();
            }
            assert_eq!(cache.lengths(text).unwrap()[..2], *lengths);
            batch.push((i % 7 != 6).then_some(text));
        }
        cache.batch(&batch).unwrap();
        cache.begin_step().unwrap();

        let (mut records, mut listed) = (Vec::new(), 0);
        for head in 0..2 {
            for (text, lengths) in lengths.iter().enumerate() {
                let active = text % 7 != 6;
                let len = if active { lengths[head] as u32 + 1 } else { 0 };
                let (text, head) = (text as u32, head as u32);
                records.push([listed, len, text, active.into(), head, 0, 0, 0]);
                listed += len.div_ceil(16);
            }
        }
        let expected = shares(&mut records, listed as usize, cache.device.blocks);
        for layer in 0..2 {
            let (heads, shares) =
                cache.step.plan(&cache.state, &cache.device, layer, batch.len()).unwrap();
            assert_eq!(shares.as_chunks::<4>().0, expected);
            for (found, expected) in heads.as_chunks::<HEAD_WORDS>().0.iter().zip(&records) {
                assert_eq!(found[..7], expected[..7], "{lengths:?}");
            }
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_step_is_planned_as_on_the_host() {
        compare(&[[1, 1]]);
        compare(&[[33, 9000]]);
        compare(&[[5000, 5000], [31, 16], [15, 700]]);
        let scattered = |i: usize| [i * 7919 % 400 + 1, i * 104_729 % 90 + 1];
        compare(&(0..70).map(scattered).collect::<Vec<_>>());
        compare(&(0..700).map(|i| scattered(i).map(|len| len / 8 + 1)).collect::<Vec<_>>());
    }
}
