//! Borrowed tensors on the card, whoever owns them.

#![allow(unsafe_code)]

use crate::cuda::driver::RawView;
use crate::error::{Error, Result};
use crate::shape::Dtype;
use crate::view::{check_end, check_length};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use std::marker::PhantomData;
use std::sync::Arc;

impl Dtype {
    /// As the kernels number types.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 1,
            Self::F16 => 2,
            Self::F8 => 3,
        }
    }
}

/// What a [`CudaSlice`] may hold to be viewed.
pub trait DeviceElement {
    /// Its type.
    const DTYPE: Dtype;
}

impl DeviceElement for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl DeviceElement for half::bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

impl DeviceElement for half::f16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// A borrowed `[heads, tokens, dim]` on the card. Rows of `dim` elements are contiguous; the first two strides are
/// free. Made of a cudarc slice, or of the address of any framework's tensor.
#[derive(Debug, Clone, Copy)]
pub struct DeviceView<'a> {
    raw: RawView,
    dtype: Dtype,
    shape: [usize; 3],
    borrowed: PhantomData<&'a ()>,
}

impl<'a> DeviceView<'a> {
    /// A contiguous tensor of `shape`, to be read on `stream`.
    ///
    /// # Errors
    /// [`Error::Length`] unless `slice` holds exactly that many elements; [`Error::OtherStream`] if it belongs to
    /// another stream, on which its memory could go before it is read.
    pub fn of<T: DeviceElement>(
        slice: &'a CudaSlice<T>,
        shape: [usize; 3],
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        check_length("view", slice.len(), elements(shape))?;
        check_stream(slice.stream(), stream)?;
        let (address, _) = slice.device_ptr(stream);
        // SAFETY: the slice holds `shape` and is borrowed for `'a`; it is freed on the stream that reads it.
        unsafe { Self::at(address, T::DTYPE, shape, [shape[1] * shape[2], shape[2]]) }
    }

    /// A tensor of `shape` in a slice, whose heads and tokens lie `strides` elements apart, to be read on `stream`.
    ///
    /// # Errors
    /// [`Error::Length`] if the last row ends beyond the slice; [`Error::OtherStream`] as for [`of`](Self::of).
    pub fn strided<T: DeviceElement>(
        slice: &'a CudaSlice<T>,
        shape: [usize; 3],
        strides: [usize; 2],
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        check_end(slice.len(), shape, strides)?;
        check_stream(slice.stream(), stream)?;
        let (address, _) = slice.device_ptr(stream);
        // SAFETY: as above; the last element that shape and strides name is in the slice.
        unsafe { Self::at(address, T::DTYPE, shape, strides) }
    }

    /// A tensor of `shape` at an address on the card, whose heads and tokens lie `strides` elements apart; for a tch
    /// tensor `tensor.data_ptr() as u64`.
    ///
    /// # Errors
    /// [`Error::Address`] for a null or unaligned address of a tensor that has elements; [`Error::StoredOnly`] for
    /// [`Dtype::F8`].
    ///
    /// # Safety
    /// While `'a` lasts and until the stream of the cache has done what the view is handed to, the memory must be the
    /// card's, hold elements of `dtype` up to the last that shape and strides name, and not be written elsewhere.
    pub unsafe fn at(
        address: u64,
        dtype: Dtype,
        shape: [usize; 3],
        strides: [usize; 2],
    ) -> Result<Self> {
        if dtype == Dtype::F8 {
            return Err(Error::StoredOnly { dtype });
        }
        let empty = shape.contains(&0);
        if !empty && (address == 0 || !address.is_multiple_of(dtype.bytes() as u64)) {
            return Err(Error::Address { address, dtype });
        }
        let [head_stride, token_stride] = strides.map(|stride| stride as i64);
        let raw =
            RawView { data: address, head_stride, token_stride, dtype: dtype.code(), unused: 0 };
        Ok(Self { raw, dtype, shape, borrowed: PhantomData })
    }

    /// `[heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(crate) fn raw(&self) -> RawView {
        self.raw
    }
}

/// A borrowed, contiguous `[heads, tokens, dim]` on the card to write to.
#[derive(Debug)]
pub struct DeviceViewMut<'a> {
    view: DeviceView<'a>,
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> DeviceViewMut<'a> {
    /// A contiguous tensor of `shape`, to be written on `stream`.
    ///
    /// # Errors
    /// Those of [`DeviceView::of`].
    pub fn of<T: DeviceElement>(
        slice: &'a mut CudaSlice<T>,
        shape: [usize; 3],
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        check_length("view", slice.len(), elements(shape))?;
        check_stream(slice.stream(), stream)?;
        let (address, _) = slice.device_ptr_mut(stream);
        // SAFETY: the slice holds `shape` and is borrowed alone for `'a`; it is freed on the stream that writes it.
        unsafe { Self::at(address, T::DTYPE, shape) }
    }

    /// A contiguous tensor of `shape` at an address on the card.
    ///
    /// # Errors
    /// Those of [`DeviceView::at`].
    ///
    /// # Safety
    /// As for [`DeviceView::at`]; and nobody else may read or write the memory meanwhile.
    pub unsafe fn at(address: u64, dtype: Dtype, shape: [usize; 3]) -> Result<Self> {
        // SAFETY: the caller's promise.
        let view =
            unsafe { DeviceView::at(address, dtype, shape, [shape[1] * shape[2], shape[2]]) }?;
        Ok(Self { view, borrowed: PhantomData })
    }

    /// `[heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 3] {
        self.view.shape
    }

    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.view.dtype
    }

    pub(crate) fn raw(&self) -> RawView {
        self.view.raw
    }
}

/// Borrowed drop bits `[heads, tokens]` on the card: that of token `t` is bit `t % 32` of word `t / 32` of its head,
/// whose words, `tokens / 32` rounded up, lie before the next head's.
#[derive(Debug, Clone, Copy)]
pub struct DeviceBits<'a> {
    address: u64,
    shape: [usize; 2],
    borrowed: PhantomData<&'a ()>,
}

impl<'a> DeviceBits<'a> {
    /// Words that bits of `[heads, tokens]` take.
    pub fn words(shape: [usize; 2]) -> usize {
        shape[0].saturating_mul(shape[1].div_ceil(32))
    }

    /// Bits of `shape`, to be read on `stream`.
    ///
    /// # Errors
    /// Those of [`DeviceView::of`].
    pub fn of(
        slice: &'a CudaSlice<u32>,
        shape: [usize; 2],
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        check_length("bits", slice.len(), Self::words(shape))?;
        check_stream(slice.stream(), stream)?;
        let (address, _) = slice.device_ptr(stream);
        // SAFETY: as for `DeviceView::of`.
        unsafe { Self::at(address, shape) }
    }

    /// Bits of `shape` at an address on the card.
    ///
    /// # Errors
    /// [`Error::BitsAddress`] for a null or unaligned address of bits that there are.
    ///
    /// # Safety
    /// As for [`DeviceView::at`], for [`words`](Self::words) words.
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

    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

/// Borrowed drop bits on the card to write to, as [`DeviceBits`] has them. Those past the last token are written too, as
/// zeros.
#[derive(Debug)]
pub struct DeviceBitsMut<'a> {
    bits: DeviceBits<'a>,
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> DeviceBitsMut<'a> {
    /// Bits of `shape`, to be written on `stream`.
    ///
    /// # Errors
    /// Those of [`DeviceBits::of`].
    pub fn of(
        slice: &'a mut CudaSlice<u32>,
        shape: [usize; 2],
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        check_length("bits", slice.len(), DeviceBits::words(shape))?;
        check_stream(slice.stream(), stream)?;
        let (address, _) = slice.device_ptr_mut(stream);
        // SAFETY: the slice holds the words and is borrowed alone for `'a`; it is freed on the stream that writes it.
        unsafe { Self::at(address, shape) }
    }

    /// Bits of `shape` at an address on the card.
    ///
    /// # Errors
    /// Those of [`DeviceBits::at`].
    ///
    /// # Safety
    /// As for [`DeviceBits::at`]; and nobody else may read or write the memory meanwhile.
    pub unsafe fn at(address: u64, shape: [usize; 2]) -> Result<Self> {
        // SAFETY: the caller's promise.
        let bits = unsafe { DeviceBits::at(address, shape) }?;
        Ok(Self { bits, borrowed: PhantomData })
    }

    /// The same bits, to be read by what is queued after their writer.
    pub fn bits(&self) -> DeviceBits<'_> {
        self.bits
    }
}

pub(crate) fn check_type(tensor: &'static str, found: Dtype, expected: Dtype) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Type { tensor, expected, found }) }
}

fn check_stream(found: &Arc<CudaStream>, expected: &Arc<CudaStream>) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::OtherStream) }
}

fn elements(shape: [usize; 3]) -> usize {
    shape.iter().fold(1, |product: usize, &n| product.saturating_mul(n))
}
