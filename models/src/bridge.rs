//! The one place for `unsafe`: memory that Rust cannot see the owner of.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use half::bf16;
use memmap2::{Mmap, UncheckedAdvice};
use paged_kernels::{View, ViewMut};
use std::{fs::File, io};
use tch::{Device, Kind, Tensor};

/// Maps a file for reading.
pub(crate) fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is read-only and outlives `file`. Its bytes change only if someone writes to the file or
    // truncates it meanwhile, which no reader of a model file can survive or prevent; they are read as plain numbers, and
    // every length taken from them is checked where it is read, so that a change gives wrong weights at worst, or SIGBUS.
    unsafe { Mmap::map(file) }
}

/// Gives back the memory in which the system holds `bytes` of a map. They are read from the file again if they are asked for.
pub(crate) fn forget(map: &Mmap, bytes: &[u8]) {
    let start = (bytes.as_ptr() as usize).wrapping_sub(map.as_ptr() as usize);
    if start.checked_add(bytes.len()).is_some_and(|end| end <= map.len()) {
        // SAFETY: the map is one of `map_file`, read-only and of a file, so that nothing is lost.
        let forgotten =
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, bytes.len()) };
        drop(forgotten); // what is not forgotten is only held longer
    }
}

/// A `[1, heads, tokens, dim]` tensor, or a slice or transpose of one, as a view of its own memory.
///
/// Its last dimension must be contiguous, its dtype f32 or bf16, its device the CPU.
pub(crate) fn view(tensor: &Tensor) -> Result<View<'_>> {
    let (shape, strides) = parts(tensor)?;
    let length = if shape.contains(&0) {
        0
    } else {
        (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + shape[2]
    };
    Ok(match tensor.kind() {
        // SAFETY: `parts` has checked that the tensor is a strided CPU tensor of this dtype. The last element of
        // `[heads, tokens, dim]` lies `length - 1` elements after `data_ptr`, so all are in its storage. The view
        // borrows the tensor, which keeps the storage alive, and nothing in this crate writes to a tensor in place
        // while a view of it lives.
        Kind::Float => View::strided(unsafe { slice::<f32>(tensor, length) }, shape, strides)?,
        // SAFETY: as above; `parts` lets only f32 and bf16 through.
        _ => View::strided(unsafe { slice::<bf16>(tensor, length) }, shape, strides)?,
    })
}

/// A contiguous `[1, heads, tokens, dim]` tensor that nothing else shares, to write to.
pub(crate) fn view_mut(tensor: &mut Tensor) -> Result<ViewMut<'_>> {
    let (shape, _) = parts(tensor)?;
    if !tensor.is_contiguous() {
        return Err(layout(tensor, "contiguous memory"));
    }
    let (data, length) = (tensor.data_ptr(), tensor.numel());
    Ok(match tensor.kind() {
        Kind::Float => {
            // SAFETY: as in `view`; besides, the tensor is contiguous and borrowed mutably, and its maker has given
            // out no other tensor over the same storage.
            let data = unsafe { std::slice::from_raw_parts_mut(data.cast::<f32>(), length) };
            ViewMut::new(data, shape)?
        }
        _ => {
            // SAFETY: as above; `parts` lets only f32 and bf16 through.
            let data = unsafe { std::slice::from_raw_parts_mut(data.cast::<bf16>(), length) };
            ViewMut::new(data, shape)?
        }
    })
}

/// The elements of a contiguous f32 tensor on the CPU; `None` for any other.
pub(crate) fn floats(tensor: &Tensor) -> Option<&[f32]> {
    // SAFETY: a contiguous tensor's elements are its first `numel`; it is on the CPU and f32, and as in `view`
    // nothing writes to it meanwhile.
    is_floats(tensor).then(|| unsafe { slice::<f32>(tensor, tensor.numel()) })
}

/// The elements of a contiguous f32 tensor on the CPU that nothing else shares, to write to.
pub(crate) fn floats_mut(tensor: &mut Tensor) -> Option<&mut [f32]> {
    let (data, length) = (tensor.data_ptr().cast::<f32>(), tensor.numel());
    // SAFETY: as in `floats` and `view_mut`.
    is_floats(tensor).then(|| unsafe { std::slice::from_raw_parts_mut(data, length) })
}

/// What a gradient is wanted of stays with libtorch, which sees nothing of work done here.
fn is_floats(tensor: &Tensor) -> bool {
    !tensor.requires_grad()
        && tensor.device() == Device::Cpu
        && tensor.kind() == Kind::Float
        && tensor.is_contiguous()
}

/// # Safety
/// The first `length` elements from the tensor's `data_ptr` must be in its storage and of type `E`.
unsafe fn slice<E>(tensor: &Tensor, length: usize) -> &[E] {
    // SAFETY: the caller's promise; libtorch aligns its storage to 64 bytes and offsets are whole elements.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<E>(), length) }
}

/// `[heads, tokens, dim]` and the strides of the first two, in elements.
fn parts(tensor: &Tensor) -> Result<([usize; 3], [usize; 2])> {
    if tensor.device() != Device::Cpu || !matches!(tensor.kind(), Kind::Float | Kind::BFloat16) {
        return Err(layout(tensor, "f32 or bf16 on the CPU"));
    }
    let (size, strides) = (tensor.size(), tensor.stride());
    let (&[1, heads, tokens, dim], &[_, head, token, 1]) = (size.as_slice(), strides.as_slice())
    else {
        return Err(layout(tensor, "[1, heads, tokens, dim] with contiguous rows"));
    };
    Ok(([heads as usize, tokens as usize, dim as usize], [head as usize, token as usize]))
}

fn layout(tensor: &Tensor, wanted: &'static str) -> Error {
    Error::TensorLayout { wanted, found: format!("{tensor:?}, strides {:?}", tensor.stride()) }
}
