//! Borrowed drop bits on the card.

#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::view::check_length;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use std::marker::PhantomData;
use std::sync::Arc;

/// Borrowed drop bits `[heads, tokens]` on the card, to be written: 32 tokens a word, token `t` in bit `t % 32`, each
/// head beginning a word. Bits past the last token are written too, as zeros.
#[derive(Debug)]
pub struct DeviceBits<'a> {
    address: u64,
    shape: [usize; 2],
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> DeviceBits<'a> {
    /// Words that bits of `[heads, tokens]` take.
    pub fn words(shape: [usize; 2]) -> usize {
        shape[0].saturating_mul(shape[1].div_ceil(32))
    }

    /// Bits of `shape`, to be written on `stream`.
    ///
    /// # Errors
    /// [`Error::Length`] unless `slice` holds exactly their words; [`Error::OtherStream`] if it belongs to another
    /// stream, on which its memory could go before it is written.
    pub fn of(
        slice: &'a mut CudaSlice<u32>,
        shape: [usize; 2],
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        check_length("bits", slice.len(), Self::words(shape))?;
        if slice.stream() != stream {
            return Err(Error::OtherStream);
        }
        let (address, _) = slice.device_ptr_mut(stream);
        // SAFETY: the slice holds the words and is borrowed alone for `'a`; it is freed on the stream that writes it.
        unsafe { Self::at(address, shape) }
    }

    /// Bits of `shape` at an address on the card.
    ///
    /// # Errors
    /// [`Error::BitsAddress`] for a null or unaligned address of bits that there are.
    ///
    /// # Safety
    /// While `'a` lasts and until the stream that the bits are handed to has done its work, the memory must be the card's,
    /// hold [`words`](Self::words) words, and not be read or written elsewhere.
    pub unsafe fn at(address: u64, shape: [usize; 2]) -> Result<Self> {
        if Self::words(shape) > 0 && (address == 0 || !address.is_multiple_of(4)) {
            return Err(Error::BitsAddress { address });
        }
        Ok(Self { address, shape, borrowed: PhantomData })
    }

    /// `[heads, tokens]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}
