//! Memory of pages on the host, grown as pages come into use and given back when they leave it.

use crate::page::{Move, PageId, Place};
use crate::pool::PagePool;
use crate::shape::{CacheShape, Dtype};
use half::{bf16, f16};

/// Bytes of a chunk, about: large enough that the system hands it out and takes it back page by page.
const CHUNK: usize = 1 << 20;

/// What can be stored.
pub trait Element: Copy + Default + Send + Sync {
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
    /// Empty where no page is in use.
    chunks: Vec<Vec<E>>,
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

    /// Keys and values of a page in use.
    #[inline(always)]
    pub fn page(&self, page: PageId) -> (&[E], &[E]) {
        let (chunk, page) = (page.index() / self.span, page.index() % self.span);
        let len = self.page_len();
        self.chunks[chunk][page * len..][..len].split_at(len / 2)
    }

    fn page_mut(&mut self, page: PageId) -> (&mut [E], &mut [E]) {
        let (chunk, page) = (page.index() / self.span, page.index() % self.span);
        let len = self.page_len();
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, Vec::new);
        }
        let chunk = &mut self.chunks[chunk];
        if chunk.is_empty() {
            *chunk = vec![E::default(); self.span * len];
        }
        chunk[page * len..][..len].split_at_mut(len / 2)
    }

    /// Where element 0 of a key lies in its page; the next ones are `lanes` apart.
    fn key_start(&self, row: usize) -> usize {
        row / self.lanes * self.lanes * self.dim + row % self.lanes
    }

    fn write(&mut self, place: Place, key: &[f32], value: &[f32]) {
        let (start, lanes, dim) = (self.key_start(place.row), self.lanes, self.dim);
        let (keys, values) = self.page_mut(place.page);
        let slots = keys[start..].iter_mut().step_by(lanes);
        slots.zip(key).for_each(|(to, &x)| *to = E::narrow(x));
        let slots = values[place.row * dim..].iter_mut();
        slots.zip(value).for_each(|(to, &x)| *to = E::narrow(x));
    }

    fn read(&self, place: Place, key: &mut [f32], value: &mut [f32]) {
        let (keys, values) = self.page(place.page);
        let slots = keys[self.key_start(place.row)..].iter().step_by(self.lanes);
        key.iter_mut().zip(slots).for_each(|(to, x)| *to = x.widen());
        let slots = &values[place.row * self.dim..];
        value.iter_mut().zip(slots).for_each(|(to, x)| *to = x.widen());
    }

    /// The elements of pages in use, one after the other.
    fn pack(&self, pages: impl Iterator<Item = PageId>) -> Vec<E> {
        let mut packed = Vec::new();
        for page in pages {
            let (keys, values) = self.page(page);
            packed.extend_from_slice(keys);
            packed.extend_from_slice(values);
        }
        packed
    }

    fn unpack(&mut self, packed: &[E], pages: impl Iterator<Item = PageId>) {
        for (page, packed) in pages.zip(packed.chunks_exact(self.page_len())) {
            let (keys, values) = self.page_mut(page);
            let (old_keys, old_values) = packed.split_at(keys.len());
            keys.copy_from_slice(old_keys);
            values.copy_from_slice(old_values);
        }
    }

    fn trim(&mut self, pool: &PagePool) {
        let span = self.span;
        for (i, chunk) in self.chunks.iter_mut().enumerate().filter(|(_, chunk)| !chunk.is_empty())
        {
            let mut pages = (i * span..(i + 1) * span).map(|page| PageId(page as u32));
            if pages.all(|page| pool.holders(page) == 0) {
                *chunk = Vec::new();
            }
        }
    }

    fn elements(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum()
    }
}

/// Pages of the cache's dtype.
#[derive(Debug)]
pub enum Memory {
    F32(Storage<f32>),
    Bf16(Storage<bf16>),
    F16(Storage<f16>),
}

/// Pages that were copied out of a [`Memory`].
#[derive(Debug, Clone)]
pub enum Packed {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Packed {
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(packed) => size_of_val(&packed[..]),
            Self::Bf16(packed) => size_of_val(&packed[..]),
            Self::F16(packed) => size_of_val(&packed[..]),
        }
    }
}

impl Memory {
    pub fn new(shape: &CacheShape, lanes: usize) -> Self {
        match shape.dtype {
            Dtype::F32 => Self::F32(Storage::new(shape, lanes)),
            Dtype::Bf16 => Self::Bf16(Storage::new(shape, lanes)),
            Dtype::F16 => Self::F16(Storage::new(shape, lanes)),
        }
    }

    pub fn write(&mut self, place: Place, key: &[f32], value: &[f32]) {
        match self {
            Self::F32(storage) => storage.write(place, key, value),
            Self::Bf16(storage) => storage.write(place, key, value),
            Self::F16(storage) => storage.write(place, key, value),
        }
    }

    pub fn read(&self, place: Place, key: &mut [f32], value: &mut [f32]) {
        match self {
            Self::F32(storage) => storage.read(place, key, value),
            Self::Bf16(storage) => storage.read(place, key, value),
            Self::F16(storage) => storage.read(place, key, value),
        }
    }

    pub fn copy(&mut self, step: Move) {
        let dim = match self {
            Self::F32(storage) => storage.dim,
            Self::Bf16(storage) => storage.dim,
            Self::F16(storage) => storage.dim,
        };
        let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
        self.read(step.from, &mut key, &mut value);
        self.write(step.to, &key, &value);
    }

    /// Copies pages in use out.
    pub fn pack(&self, pages: impl Iterator<Item = PageId>) -> Packed {
        match self {
            Self::F32(storage) => Packed::F32(storage.pack(pages)),
            Self::Bf16(storage) => Packed::Bf16(storage.pack(pages)),
            Self::F16(storage) => Packed::F16(storage.pack(pages)),
        }
    }

    /// Copies them back into as many pages of a memory of the same dtype.
    pub fn unpack(&mut self, packed: &Packed, pages: impl Iterator<Item = PageId>) {
        match (self, packed) {
            (Self::F32(storage), Packed::F32(packed)) => storage.unpack(packed, pages),
            (Self::Bf16(storage), Packed::Bf16(packed)) => storage.unpack(packed, pages),
            (Self::F16(storage), Packed::F16(packed)) => storage.unpack(packed, pages),
            _ => {}
        }
    }

    /// Gives memory back of which no page is in use.
    pub fn trim(&mut self, pool: &PagePool) {
        match self {
            Self::F32(storage) => storage.trim(pool),
            Self::Bf16(storage) => storage.trim(pool),
            Self::F16(storage) => storage.trim(pool),
        }
    }

    /// Bytes taken from the system.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(storage) => storage.elements() * Dtype::F32.bytes(),
            Self::Bf16(storage) => storage.elements() * Dtype::Bf16.bytes(),
            Self::F16(storage) => storage.elements() * Dtype::F16.bytes(),
        }
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
        assert!(storage.elements() <= 5 * CHUNK, "only chunks in use take memory");
    }
}
