//! `Resident` behind the trait's face: host views are copied to the card and back. Steps of one token a text go the way of
//! steps, all others that of passes.

use paged_kernels::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use paged_kernels::{
    CacheShape, DeviceBits, DeviceView, DeviceViewMut, Mode, PagedAttention, Resident, Result,
    Seats, Sequence, Stats, View, ViewMut,
};
use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

/// A stream of its own. Tests share the context: cudarc waits for the whole card where a context gets its first stream, and
/// that would end what another test captures.
pub fn own_stream() -> Arc<CudaStream> {
    static FIRST: OnceLock<Arc<CudaStream>> = OnceLock::new();
    let first = FIRST.get_or_init(|| CudaContext::new(0).unwrap().new_stream().unwrap());
    first.context().new_stream().unwrap()
}

pub struct OnCard {
    cache: RefCell<Resident>,
    shape: CacheShape,
    stream: Arc<CudaStream>,
    living: Vec<Sequence>,
    /// Whose steps are planned on the card, if anybody's.
    batch: Option<Vec<Option<Sequence>>>,
    tokens: usize,
    pages_peak: usize,
}

/// `[heads, tokens]` as the card takes them.
pub fn pack(drops: &[bool], heads: usize) -> Vec<u32> {
    let tokens = drops.len() / heads;
    let words = drops.chunks_exact(tokens.max(1)).flat_map(|head| head.chunks(32));
    words
        .map(|word| word.iter().enumerate().fold(0, |bits, (i, &drop)| bits | u32::from(drop) << i))
        .collect()
}

impl OnCard {
    pub fn new(shape: CacheShape) -> Result<Self> {
        let stream = own_stream();
        let seats = Seats { texts: 64, tokens: 1200, pass: 60, mode: Mode::Fast };
        let cache = RefCell::new(Resident::on(stream.clone(), shape.clone(), seats)?);
        let (living, batch) = (Vec::new(), None);
        Ok(Self { cache, shape, stream, living, batch, tokens: 0, pages_peak: 0 })
    }

    fn rows(&self, view: View<'_>) -> CudaSlice<f32> {
        let [heads, tokens, dim] = view.shape();
        let mut rows = vec![0.0; heads * tokens * dim];
        for (i, row) in rows.chunks_exact_mut(dim).enumerate() {
            view.read(i / tokens, i % tokens, row);
        }
        self.upload(&rows)
    }

    /// Also of nothing, which cudarc does not copy.
    fn upload<T: Copy + paged_kernels::cudarc::driver::DeviceRepr>(
        &self,
        data: &[T],
    ) -> CudaSlice<T> {
        self.stream.clone_htod(data).unwrap()
    }

    fn used(&self) -> usize {
        self.shape.pages - self.cache.borrow().free_pages().unwrap()
    }
}

impl PagedAttention for OnCard {
    fn shape(&self) -> &CacheShape {
        &self.shape
    }

    fn allocate(&mut self) -> Result<Sequence> {
        let sequence = self.cache.borrow_mut().allocate()?;
        self.living.push(sequence);
        Ok(sequence)
    }

    fn fork(&mut self, sequence: Sequence) -> Result<Sequence> {
        let fork = self.cache.get_mut().fork(sequence)?;
        self.living.push(fork);
        Ok(fork)
    }

    fn fill(
        &mut self,
        sequence: Sequence,
        layer: usize,
        keys: View<'_>,
        values: View<'_>,
        drops: &[bool],
    ) -> Result<()> {
        let [heads, tokens, _] = keys.shape();
        let (shape, stream) = (keys.shape(), &self.stream);
        if tokens == 0 {
            return Ok(());
        }
        let (keys, values) = (self.rows(keys), self.rows(values));
        let bits = self.upload(&pack(drops, heads));
        let (keys, values) = (
            DeviceView::of(&keys, shape, stream).unwrap(),
            DeviceView::of(&values, shape, stream).unwrap(),
        );
        let bits = DeviceBits::of(&bits, [heads, tokens], stream).unwrap();
        self.cache.borrow_mut().fill(sequence, layer, keys, values, bits)?;
        self.pages_peak = self.pages_peak.max(self.used());
        Ok(())
    }

    fn begin_step(&mut self, step: &[(Sequence, usize)]) -> Result<()> {
        let cache = self.cache.get_mut();
        if step.iter().all(|text| text.1 == 1) {
            let batch = step.iter().map(|text| Some(text.0)).collect::<Vec<_>>();
            if self.batch.as_ref() != Some(&batch) {
                cache.batch(&batch)?;
                self.batch = Some(batch);
            }
            cache.begin_step()?;
        } else {
            self.batch = None;
            cache.begin_pass(step)?;
        }
        self.tokens = step.iter().map(|text| text.1).sum();
        self.pages_peak = self.pages_peak.max(self.used());
        Ok(())
    }

    fn append(
        &mut self,
        layer: usize,
        keys: View<'_>,
        values: View<'_>,
        drops: &[bool],
    ) -> Result<()> {
        let (shape, stream) = (keys.shape(), &self.stream);
        if self.tokens == 0 {
            return Ok(());
        }
        let (keys, values) = (self.rows(keys), self.rows(values));
        let bits = self.upload(&pack(drops, shape[0]));
        let (keys, values) = (
            DeviceView::of(&keys, shape, stream).unwrap(),
            DeviceView::of(&values, shape, stream).unwrap(),
        );
        let bits = DeviceBits::of(&bits, [shape[0], shape[1]], stream).unwrap();
        self.cache.borrow_mut().append(layer, keys, values, Some(bits))
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: View<'_>,
        scale: f32,
        mut out: ViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let [heads, tokens, dim] = queries.shape();
        if tokens == 0 {
            return Ok(());
        }
        let (shape, stream) = (queries.shape(), &self.stream);
        let queries = self.rows(queries);
        let mut to = self.upload(&vec![f32::NAN; heads * tokens * dim]);
        let mut sums = self.upload(&vec![f32::NAN; heads * tokens]);
        self.cache.borrow_mut().attend(
            layer,
            DeviceView::of(&queries, shape, stream).unwrap(),
            scale,
            DeviceViewMut::of(&mut to, shape, stream).unwrap(),
            Some(DeviceViewMut::of(&mut sums, [heads, tokens, 1], stream).unwrap()),
        )?;
        let rows = self.stream.clone_dtoh(&to).unwrap();
        for (i, row) in rows.chunks_exact(dim).enumerate() {
            out.write(i / tokens, i % tokens, row.iter().copied());
        }
        if let Some(lse) = lse {
            lse.copy_from_slice(&self.stream.clone_dtoh(&sums).unwrap());
        }
        Ok(())
    }

    fn release(&mut self, sequence: Sequence) -> Result<()> {
        self.living.retain(|&living| living != sequence);
        self.batch = None;
        self.cache.get_mut().release(sequence)
    }

    fn stats(&self) -> Stats {
        let used = self.used();
        let lengths = self.living.iter().flat_map(|&text| self.lengths(text).unwrap());
        assert_eq!(self.cache.borrow().missing().unwrap(), 0);
        Stats {
            pages_used: used,
            pages_free: self.shape.pages - used,
            pages_peak: self.pages_peak,
            bytes: used * self.shape.page_bytes(),
            peak_bytes: self.pages_peak * self.shape.page_bytes(),
            reserved_bytes: self.shape.pages * self.shape.page_bytes(),
            rows: lengths.sum(),
        }
    }

    fn lengths(&self, sequence: Sequence) -> Result<Vec<usize>> {
        self.cache.borrow_mut().lengths(sequence)
    }
}
