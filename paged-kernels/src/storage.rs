//! Memory of pages on the host, grown as pages come into use and given back when they leave it.

use crate::e4m3::{self, E4m3};
use crate::page::{Move, PageId, Place};
use crate::pool::PagePool;
use crate::shape::{CacheShape, Dtype};
use half::{bf16, f16};

/// Bytes of a chunk, about: large enough that the system hands it out and takes it back page by page.
const CHUNK: usize = 1 << 20;

/// What can be stored.
pub trait Element: Copy + Default + Send + Sync {
    /// Whether each row of keys or values has a scale, by which its elements are multiplied.
    const SCALED: bool = false;

    fn widen(self) -> f32;
    fn narrow(x: f32) -> Self;
    /// For whoever wants it out of memory, whatever it is.
    fn bits(self) -> u32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Element for bf16 {
    /// Without `half`'s branch on NaN, so that loops over it vectorise.
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }

    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Element for f16 {
    /// Without `half`'s call for every eight elements, which costs more than all the rest of a loop, without branches,
    /// and without arithmetic on subnormal floats, which takes some hundred cycles on many CPUs.
    #[inline(always)]
    fn widen(self) -> f32 {
        let power = |n: i32| f32::from_bits((127 + n).cast_unsigned() << 23);
        let bits = u32::from(self.to_bits());
        // 2^112 too large, so that f16's largest exponent, that of infinities and NaN, becomes f32's.
        let large = f32::from_bits(((bits & 0x7fff) << 13) + ((255 - 31) << 23));
        let normal = large * power(-112);
        // A subnormal 2^-14 m was read as 2^-15 (1 + m), so this is what it is; for all others this is no less.
        let subnormal = normal + normal - power(-14);
        let wide = if subnormal < normal { subnormal } else { normal };
        f32::from_bits(wide.to_bits() | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }

    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Element for E4m3 {
    const SCALED: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        self.widen()
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::narrow(x)
    }

    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.0)
    }
}

/// A page in use.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a, E> {
    pub keys: &'a [E],
    pub values: &'a [E],
    /// Of the keys' rows, then of the values'; empty where elements have none.
    scales: &'a [f32],
}

impl<'a, E: Element> Page<'a, E> {
    /// Of the rows of its keys.
    #[inline(always)]
    pub fn key_scales(self) -> &'a [f32] {
        &self.scales[..self.scales.len() / 2]
    }

    /// Of the rows of its values.
    #[inline(always)]
    pub fn value_scales(self) -> &'a [f32] {
        &self.scales[self.scales.len() / 2..]
    }
}

/// Some pages, whose memory is taken and given back together, or a copy of some, one after the other.
#[derive(Debug, Clone)]
pub struct Chunk<E> {
    elements: Vec<E>,
    scales: Vec<f32>,
}

impl<E> Chunk<E> {
    fn bytes(&self) -> usize {
        size_of_val(&*self.elements) + size_of_val(&*self.scales)
    }
}

/// Pages of one element type: keys, then values, each `page_size` rows of `dim`.
///
/// `lanes` keys are interleaved, `[page_size / lanes, dim, lanes]`, so that a dot product can run over several keys at
/// once without a horizontal sum. One lane is plain `[page_size, dim]`. Values are always `[page_size, dim]`.
#[derive(Debug)]
pub struct Storage<E> {
    page_size: usize,
    pub dim: usize,
    lanes: usize,
    /// Pages of a chunk.
    span: usize,
    /// `None` where no page is in use.
    chunks: Vec<Option<Chunk<E>>>,
}

impl<E: Element> Storage<E> {
    fn new(shape: &CacheShape, lanes: usize) -> Self {
        let span = (CHUNK / shape.page_bytes()).max(1);
        let (page_size, dim) = (shape.page_size, shape.head_dim);
        Self { page_size, dim, lanes, span, chunks: Vec::new() }
    }

    fn page_len(&self) -> usize {
        2 * self.page_size * self.dim
    }

    /// Scales of a page.
    fn scales(&self) -> usize {
        if E::SCALED { 2 * self.page_size } else { 0 }
    }

    /// Keys and values of a page in use.
    #[inline(always)]
    pub fn page(&self, page: PageId) -> Page<'_, E> {
        let (chunk, page) = (page.index() / self.span, page.index() % self.span);
        let (len, scales) = (self.page_len(), self.scales());
        let chunk = self.chunks[chunk].as_ref().expect("the page is in use");
        let (keys, values) = chunk.elements[page * len..][..len].split_at(len / 2);
        Page { keys, values, scales: &chunk.scales[page * scales..][..scales] }
    }

    /// Its elements and its scales.
    fn page_mut(&mut self, page: PageId) -> (&mut [E], &mut [f32]) {
        let (chunk, page) = (page.index() / self.span, page.index() % self.span);
        let (len, scales, span) = (self.page_len(), self.scales(), self.span);
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let chunk = self.chunks[chunk].get_or_insert_with(|| Chunk {
            elements: vec![E::default(); span * len],
            scales: vec![0.0; span * scales],
        });
        (&mut chunk.elements[page * len..][..len], &mut chunk.scales[page * scales..][..scales])
    }

    /// Where element 0 of a key lies in its page; the next ones are `lanes` apart.
    fn key_start(&self, row: usize) -> usize {
        row / self.lanes * self.lanes * self.dim + row % self.lanes
    }

    /// Where element 0 of a value lies in its page; the next ones follow.
    fn value_start(&self, row: usize) -> usize {
        (self.page_size + row) * self.dim
    }

    fn write(&mut self, place: Place, key: &[f32], value: &[f32]) {
        let starts = [self.key_start(place.row), self.value_start(place.row)];
        let (steps, page_size) = ([self.lanes, 1], self.page_size);
        let (elements, scales) = self.page_mut(place.page);
        for (i, row) in [key, value].into_iter().enumerate() {
            let slots = elements[starts[i]..].iter_mut().step_by(steps[i]).zip(row);
            if E::SCALED {
                let scale = e4m3::scale(row);
                scales[i * page_size + place.row] = scale;
                let inverse = scale.recip();
                slots.for_each(|(to, &x)| *to = E::narrow(x * inverse));
            } else {
                slots.for_each(|(to, &x)| *to = E::narrow(x));
            }
        }
    }

    fn read(&self, place: Place, key: &mut [f32], value: &mut [f32]) {
        let page = self.page(place.page);
        let scales = [page.key_scales(), page.value_scales()]
            .map(|scales| scales.get(place.row).copied().unwrap_or(1.0));
        let slots = page.keys[self.key_start(place.row)..].iter().step_by(self.lanes);
        key.iter_mut().zip(slots).for_each(|(to, x)| *to = x.widen() * scales[0]);
        let slots = &page.values[place.row * self.dim..];
        value.iter_mut().zip(slots).for_each(|(to, x)| *to = x.widen() * scales[1]);
    }

    /// A row as it is, without rounding it again.
    fn copy(&mut self, step: Move) {
        let starts = [step.from, step.to]
            .map(|place| [self.key_start(place.row), self.value_start(place.row)]);
        let (steps, dim, page_size) = ([self.lanes, 1], self.dim, self.page_size);
        let mut row = Vec::with_capacity(2 * dim);
        let (elements, scales) = self.page_mut(step.from.page);
        for (start, step) in starts[0].into_iter().zip(steps) {
            row.extend(elements[start..].iter().step_by(step).take(dim));
        }
        let scale = |half: usize| scales.get(half * page_size + step.from.row).copied();
        let scale = [scale(0), scale(1)];
        let (elements, scales) = self.page_mut(step.to.page);
        for (half, row) in row.chunks_exact(dim).enumerate() {
            let slots = elements[starts[1][half]..].iter_mut().step_by(steps[half]);
            slots.zip(row).for_each(|(to, &x)| *to = x);
            if let Some(scale) = scale[half] {
                scales[half * page_size + step.to.row] = scale;
            }
        }
    }

    /// Pages in use.
    fn pack(&self, pages: impl Iterator<Item = PageId>) -> Chunk<E> {
        let mut packed = Chunk { elements: Vec::new(), scales: Vec::new() };
        for page in pages {
            let page = self.page(page);
            packed.elements.extend_from_slice(page.keys);
            packed.elements.extend_from_slice(page.values);
            packed.scales.extend_from_slice(page.scales);
        }
        packed
    }

    fn unpack(&mut self, packed: &Chunk<E>, pages: impl Iterator<Item = PageId>) {
        let (len, scales) = (self.page_len(), self.scales());
        for (i, page) in pages.enumerate() {
            let (own, own_scales) = self.page_mut(page);
            own.copy_from_slice(&packed.elements[i * len..][..len]);
            own_scales.copy_from_slice(&packed.scales[i * scales..][..scales]);
        }
    }

    fn trim(&mut self, pool: &PagePool) {
        let span = self.span;
        for (i, chunk) in self.chunks.iter_mut().enumerate().filter(|(_, chunk)| chunk.is_some()) {
            let mut pages = (i * span..(i + 1) * span).map(|page| PageId(page as u32));
            if pages.all(|page| pool.holders(page) == 0) {
                *chunk = None;
            }
        }
    }

    fn bytes(&self) -> usize {
        self.chunks.iter().flatten().map(Chunk::bytes).sum()
    }
}

/// Pages of the cache's dtype.
#[derive(Debug)]
pub enum Memory {
    F32(Storage<f32>),
    Bf16(Storage<bf16>),
    F16(Storage<f16>),
    F8(Storage<E4m3>),
}

/// Pages that were copied out of a [`Memory`].
#[derive(Debug, Clone)]
pub enum Packed {
    F32(Chunk<f32>),
    Bf16(Chunk<bf16>),
    F16(Chunk<f16>),
    F8(Chunk<E4m3>),
}

/// Does the same for every type of a [`Memory`], or of what was copied out of one.
macro_rules! each {
    ($memory:expr, $storage:ident => $does:expr) => {
        match $memory {
            Self::F32($storage) => $does,
            Self::Bf16($storage) => $does,
            Self::F16($storage) => $does,
            Self::F8($storage) => $does,
        }
    };
}

impl Packed {
    pub fn bytes(&self) -> usize {
        each!(self, packed => packed.bytes())
    }
}

impl Memory {
    pub fn new(shape: &CacheShape, lanes: usize) -> Self {
        match shape.dtype {
            Dtype::F32 => Self::F32(Storage::new(shape, lanes)),
            Dtype::Bf16 => Self::Bf16(Storage::new(shape, lanes)),
            Dtype::F16 => Self::F16(Storage::new(shape, lanes)),
            Dtype::F8 => Self::F8(Storage::new(shape, lanes)),
        }
    }

    pub fn write(&mut self, place: Place, key: &[f32], value: &[f32]) {
        each!(self, storage => storage.write(place, key, value));
    }

    pub fn read(&self, place: Place, key: &mut [f32], value: &mut [f32]) {
        each!(self, storage => storage.read(place, key, value));
    }

    pub fn copy(&mut self, step: Move) {
        each!(self, storage => storage.copy(step));
    }

    /// Copies pages in use out.
    pub fn pack(&self, pages: impl Iterator<Item = PageId>) -> Packed {
        match self {
            Self::F32(storage) => Packed::F32(storage.pack(pages)),
            Self::Bf16(storage) => Packed::Bf16(storage.pack(pages)),
            Self::F16(storage) => Packed::F16(storage.pack(pages)),
            Self::F8(storage) => Packed::F8(storage.pack(pages)),
        }
    }

    /// Copies them back into as many pages of a memory of the same dtype.
    pub fn unpack(&mut self, packed: &Packed, pages: impl Iterator<Item = PageId>) {
        match (self, packed) {
            (Self::F32(storage), Packed::F32(packed)) => storage.unpack(packed, pages),
            (Self::Bf16(storage), Packed::Bf16(packed)) => storage.unpack(packed, pages),
            (Self::F16(storage), Packed::F16(packed)) => storage.unpack(packed, pages),
            (Self::F8(storage), Packed::F8(packed)) => storage.unpack(packed, pages),
            _ => {}
        }
    }

    /// Gives memory back of which no page is in use.
    pub fn trim(&mut self, pool: &PagePool) {
        each!(self, storage => storage.trim(pool));
    }

    /// Bytes taken from the system.
    pub fn bytes(&self) -> usize {
        each!(self, storage => storage.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_to_its_value() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            let (found, expected) = (x.widen(), x.to_f32());
            assert_eq!(found.is_nan(), expected.is_nan(), "{bits:#06x}");
            assert!(found.is_nan() || found.to_bits() == expected.to_bits(), "{bits:#06x}");
        }
    }

    /// Past 2^32 elements, where a 32-bit product of page and page length would come back to page 0.
    #[test]
    fn far_pages_are_not_near_ones() {
        let shape = CacheShape {
            layers: 1,
            kv_heads: 1,
            query_heads: 1,
            head_dim: 128,
            page_size: 16,
            window: 128,
            pages: 1 << 24,
            dtype: Dtype::Bf16,
        };
        let mut storage = Storage::<bf16>::new(&shape, 1);
        let place = |page| Place { page: PageId(page), row: 0 };
        let far = [0, 524_288, 1_048_576, 1_048_577, 2_097_152];
        for (i, page) in far.into_iter().enumerate() {
            storage.write(place(page), &[i as f32; 128], &[-(i as f32); 128]);
        }
        for (i, page) in far.into_iter().enumerate() {
            let (mut key, mut value) = ([9.0; 128], [9.0; 128]);
            storage.read(place(page), &mut key, &mut value);
            assert_eq!((key, value), ([i as f32; 128], [-(i as f32); 128]));
        }
        assert!(storage.bytes() <= 5 * CHUNK, "only chunks in use take memory");
    }
}
