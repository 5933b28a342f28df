//! How large a cache is, and how much of it is in use.

use crate::e4m3::{self, E4m3};
use crate::error::{Error, Result};
use half::{bf16, f16};

/// The type in which keys and values are stored. Arithmetic is in f32 or wider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision: three more bits of precision than bfloat16, without its range. What lies beyond ±65504 is
    /// stored as an infinity.
    F16,
    /// 8-bit floats (OCP E4M3) with an f32 scale for each row of a head: half the bytes of bfloat16. An
    /// element is off by a sixteenth of itself at most, or by 2.2e-6 of its row's largest. A row with an element that is not finite is NaN. Only caches store it: views have none.
    F8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F8 => 1,
        }
    }

    /// Makes of `row`, a key or a value of one head, what is read after it was stored.
    pub fn round(self, row: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::Bf16 => row.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            Self::F16 => row.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            Self::F8 => {
                let scale = e4m3::scale(row);
                let inverse = scale.recip();
                row.iter_mut().for_each(|x| *x = E4m3::narrow(*x * inverse).widen() * scale);
            }
        }
    }
}

/// The size of a cache: what a model needs, and how many pages there may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers of the model.
    pub layers: usize,
    /// Key and value heads of a layer, H.
    pub kv_heads: usize,
    /// Query heads of a layer, Hq = H · G; query head `q` reads kv head `q / G`.
    pub query_heads: usize,
    /// Elements of one head's row, D.
    pub head_dim: usize,
    /// Tokens of a page; 16 is a good choice.
    pub page_size: usize,
    /// Newest tokens that always stay, W; KVzap's is 128 (arXiv 2601.07891, section 3).
    pub window: usize,
    /// Pages that all sequences, layers and heads share.
    pub pages: usize,
    /// The stored type.
    pub dtype: Dtype,
}

impl CacheShape {
    /// Says whether a cache can have this shape.
    ///
    /// # Errors
    /// [`Error::CacheShape`], naming the field.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
            ("query_heads", self.query_heads),
            ("head_dim", self.head_dim),
            ("page_size", self.page_size),
            ("pages", self.pages),
        ];
        let wrong = |field, found, advice| Err(Error::CacheShape { field, found, advice });
        if let Some(&(field, found)) = positive.iter().find(|(_, value)| *value == 0) {
            return wrong(field, found, "it must be at least 1");
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            return wrong("query_heads", self.query_heads, "it must be a multiple of kv_heads");
        }
        if self.pages.checked_mul(self.page_size).is_none_or(|rows| rows > u32::MAX as usize) {
            return wrong("pages", self.pages, "the rows of all pages must fit 32 bits");
        }
        let bytes = self.head_dim.checked_mul(self.page_size).and_then(|n| n.checked_mul(2 * 4));
        if bytes.and_then(|bytes| bytes.checked_mul(self.pages)).is_none() {
            return wrong("pages", self.pages, "all pages together must fit the address space");
        }
        Ok(())
    }

    /// Query heads of each kv head, G.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Elements of a page: keys and values.
    pub fn page_elements(&self) -> usize {
        2 * self.page_size * self.head_dim
    }

    /// Bytes of a page, the scales of its rows among them.
    pub fn page_bytes(&self) -> usize {
        let elements = self.page_elements() * self.dtype.bytes();
        if self.dtype == Dtype::F8 {
            elements.next_multiple_of(size_of::<f32>()) + 2 * self.page_size * size_of::<f32>()
        } else {
            elements
        }
    }
}

/// How much of a cache is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Pages in use.
    pub pages_used: usize,
    /// Pages that are free.
    pub pages_free: usize,
    /// The most pages that were ever in use at once.
    pub pages_peak: usize,
    /// Bytes of the pages in use.
    pub bytes: usize,
    /// Bytes of the most pages that were ever in use at once.
    pub peak_bytes: usize,
    /// Bytes that the backend has taken from the system for pages, those in use among them.
    pub reserved_bytes: usize,
    /// Live rows, over all sequences, layers and kv heads.
    pub rows: usize,
}
