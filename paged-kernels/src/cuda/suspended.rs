//! Texts that leave the card for host memory, and come back.

use crate::book::Sequence;
use crate::cuda::driver::swap::Packed;
use crate::cuda::resident::Resident;
use crate::error::{Error, Result};
use crate::filled::Filled;
use crate::shape::CacheShape;

/// A text in host memory: see [`Resident::suspend`].
#[derive(Debug, Clone)]
pub struct Suspended {
    shape: CacheShape,
    rows: Packed,
    /// Of a ring.
    places: usize,
    filled: Filled,
    /// As of a text in the cache.
    recent: usize,
}

impl Suspended {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}

impl Resident {
    /// Takes a text out of the cache into host memory, and gives its pages and its seat back, as
    /// [`release`](Self::release) does. Waits for the card.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::StepUnfinished`] in the middle of a step; [`Error::DeviceMemory`], since its
    /// pages are gathered on the card first.
    pub fn suspend(&mut self, sequence: Sequence) -> Result<Suspended> {
        self.check_finished()?;
        let text = self.text(sequence)?;
        let (filled, recent) = (text.filled.clone(), text.recent);
        let lens = self.lens(sequence)?;
        let rows = self.device.pack(&self.state, sequence.index(), lens)?;
        self.release(sequence)?;
        let places = self.state.places();
        Ok(Suspended { shape: self.shape.clone(), rows, places, filled, recent })
    }

    /// Brings a text back, into another seat and other pages: what it gives from then on is the same, bit for bit in
    /// [`Mode::BatchInvariant`](crate::Mode::BatchInvariant). Waits for the card.
    ///
    /// # Errors
    /// [`Error::NoSeat`]; [`Error::OutOfPages`]; [`Error::OtherCache`] if it comes from a cache of another shape or
    /// with passes of another length.
    pub fn resume(&mut self, suspended: &Suspended) -> Result<Sequence> {
        let Suspended { shape, rows, places, filled, recent } = suspended;
        let other = (CacheShape { pages: self.shape.pages, ..shape.clone() }) != self.shape;
        if other || *places != self.state.places() {
            return Err(Error::OtherCache);
        }
        let page_size = self.shape.page_size;
        let pages = rows.lens().iter().map(|&len| (len as usize).div_ceil(page_size));
        let most = rows.lens().iter().max().map_or(0, |&len| len as usize);
        let (wanted, free) = (pages.sum::<usize>(), self.free_pages()?);
        if wanted > free {
            return Err(Error::OutOfPages { wanted, free });
        }
        if most > self.state.most_rows() {
            return Err(Error::OtherCache);
        }
        let sequence = self.allocate()?;
        let text = self.text(sequence)?;
        (text.filled, text.recent) = (filled.clone(), *recent);
        self.device.unpack(&self.state, sequence.index(), rows)?;
        Ok(sequence)
    }
}
