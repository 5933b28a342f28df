//! Tensors on the card as kernels see them, streams that wait for each other, and what the card hands to the host.
#![allow(unsafe_code)]

use super::driver::{MOST_COLUMNS, failed};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, PinnedHostSlice, result};
use paged_kernels::{DeviceBits, DeviceView, DeviceViewMut, Dtype};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// What can be uploaded.
///
/// # Safety
/// The type is as libtorch's, without padding.
pub(super) unsafe trait Element: Copy {
    const KIND: Kind;
}
// SAFETY: numbers.
unsafe impl Element for i32 {
    const KIND: Kind = Kind::Int;
}
// SAFETY: numbers.
unsafe impl Element for f32 {
    const KIND: Kind = Kind::Float;
}
// SAFETY: numbers.
unsafe impl Element for f64 {
    const KIND: Kind = Kind::Double;
}

/// Where a contiguous tensor of at least `elements` begins.
pub(super) fn address(tensor: &Tensor, kind: Kind, elements: usize) -> Result<u64> {
    let fits = tensor.device().is_cuda() && tensor.kind() == kind && tensor.is_contiguous();
    if fits && tensor.numel() >= elements {
        Ok(tensor.data_ptr() as u64)
    } else {
        Err(layout(tensor, "a contiguous tensor on the card, of the kernel's type and size"))
    }
}

pub(super) fn optional(tensor: Option<&Tensor>, kind: Kind, elements: usize) -> Result<u64> {
    tensor.map_or(Ok(0), |tensor| address(tensor, kind, elements))
}

pub(super) fn layout(tensor: &Tensor, wanted: &'static str) -> Error {
    Error::TensorLayout { wanted, found: format!("{tensor:?}, strides {:?}", tensor.stride()) }
}

/// libtorch's name for the card of a stream.
pub(super) fn device(stream: &CudaStream) -> Device {
    Device::Cuda(stream.context().ordinal())
}

/// A stream of our own on the card that libtorch uses, which must be there.
pub(super) fn stream(device: Device) -> Result<Arc<CudaStream>> {
    context(device)?.new_stream().map_err(failed("cuStreamCreate"))
}

fn context(device: Device) -> Result<Arc<CudaContext>> {
    let Device::Cuda(ordinal) = device else {
        return Err(Error::NoCuda { reason: format!("the model lies on {device:?}") });
    };
    CudaContext::new(ordinal).map_err(failed("cuDevicePrimaryCtxRetain"))
}

/// The stream on which libtorch works on a card.
pub(super) fn torch_stream(device: Device) -> Result<Arc<CudaStream>> {
    Ok(context(device)?.default_stream())
}

/// Lets what comes on our stream wait for what libtorch has been asked so far.
pub(super) fn after_torch(stream: &CudaStream) -> Result<()> {
    let torch = stream.context().default_stream();
    stream.join(&torch).map_err(failed("cuStreamWaitEvent"))
}

/// Lets what libtorch is asked from now on wait for what our stream has.
pub(super) fn before_torch(stream: &CudaStream) -> Result<()> {
    let torch = stream.context().default_stream();
    torch.join(stream).map_err(failed("cuStreamWaitEvent"))
}

/// `[heads, tokens, dim]` of a tensor on the card, from an element on, whose heads and tokens lie `strides` elements apart.
pub(super) fn view(
    tensor: &Tensor,
    first: usize,
    shape: [usize; 3],
    strides: [usize; 2],
) -> Result<DeviceView<'_>> {
    let last = first + (0..2).map(|i| (shape[i] - 1) * strides[i]).sum::<usize>() + shape[2];
    let room = tensor.is_contiguous() && last <= tensor.numel();
    let (dtype, bytes) = dtype(tensor)?;
    if !room {
        return Err(layout(tensor, "a contiguous tensor that holds all of the view"));
    }
    let start = tensor.data_ptr() as u64 + (first * bytes) as u64;
    // SAFETY: the tensor is the card's and holds what the view names; it is borrowed as long as the view, and lives as the
    // module says.
    Ok(unsafe { DeviceView::at(start, dtype, shape, strides) }?)
}

/// A `[1, heads, tokens, dim]` tensor on the card, or a slice or transpose of one, with contiguous rows.
pub(super) fn rows(tensor: &Tensor) -> Result<DeviceView<'_>> {
    let (size, strides) = (tensor.size(), tensor.stride());
    let (&[1, heads, tokens, dim], &[_, head, token, 1]) = (&size[..], &strides[..]) else {
        return Err(layout(tensor, "[1, heads, tokens, dim] on the card with contiguous rows"));
    };
    let shape = [heads, tokens, dim].map(|n| n as usize);
    // SAFETY: `size` and `strides` are the tensor's own, so all that they name is in its storage; the rest as in `view`.
    Ok(unsafe {
        DeviceView::at(
            tensor.data_ptr() as u64,
            dtype(tensor)?.0,
            shape,
            [head as usize, token as usize],
        )
    }?)
}

/// A contiguous tensor on the card as `shape`, to write to. Its maker hands out no other tensor over the same storage.
pub(super) fn view_mut(tensor: &Tensor, shape: [usize; 3]) -> Result<DeviceViewMut<'_>> {
    if !tensor.is_contiguous() || tensor.numel() < shape.iter().product() {
        return Err(layout(tensor, "a contiguous tensor that holds all of the view"));
    }
    // SAFETY: as in `view`; what writes is ordered by streams.
    Ok(unsafe { DeviceViewMut::at(tensor.data_ptr() as u64, dtype(tensor)?.0, shape) }?)
}

/// Packed drop bits, i32 `[heads, words]`, of `tokens` tokens.
pub(super) fn bits(words: &Tensor, tokens: usize) -> Result<DeviceBits<'_>> {
    let heads = words.size()[0] as usize;
    let start = address(words, Kind::Int, DeviceBits::words([heads, tokens]))?;
    // SAFETY: as in `view`.
    Ok(unsafe { DeviceBits::at(start, [heads, tokens]) }?)
}

fn dtype(tensor: &Tensor) -> Result<(Dtype, usize)> {
    match tensor.kind() {
        Kind::BFloat16 if tensor.device().is_cuda() => Ok((Dtype::Bf16, 2)),
        Kind::Float if tensor.device().is_cuda() => Ok((Dtype::F32, 4)),
        _ => Err(layout(tensor, "f32 or bf16 on the card")),
    }
}

/// Host memory that the card writes a step's tokens to, a slot for each of the last steps.
pub(super) struct Mailbox {
    slots: Vec<(PinnedHostSlice<u32>, Option<Posted>)>,
    next: usize,
}

/// What says that a copy is done, and how many tokens it holds.
type Posted = (CudaEvent, usize);

/// Steps whose tokens may be on their way.
const SLOTS: usize = 8;

impl Mailbox {
    pub fn new(stream: &CudaStream) -> Result<Self> {
        let slot = |_| {
            // SAFETY: what is not written is not read: an event says when it is.
            let memory =
                unsafe { stream.context().alloc_pinned_with_flags::<u32>(MOST_COLUMNS + 2, 0) };
            Ok((memory.map_err(failed("cuMemHostAlloc"))?, None))
        };
        Ok(Self { slots: (0..SLOTS).map(slot).collect::<Result<_>>()?, next: 0 })
    }

    /// Queues a copy of `tokens` and of the two numbers at `counters` on the card, and gives it a number. At most so many as
    /// there are slots may not have been read.
    pub fn post(
        &mut self,
        stream: &CudaStream,
        tokens: &Tensor,
        columns: usize,
        counters: u64,
    ) -> Result<usize> {
        let number = self.next;
        let (memory, event) = &mut self.slots[number % SLOTS];
        let memory = memory.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        let from = address(tokens, Kind::Int, columns)?;
        let (numbers, places) = memory.split_at_mut(2);
        for (to, from) in [(numbers, counters), (&mut places[..columns], from)] {
            // SAFETY: the tensor holds as many, the cache has two counters, and the memory is pinned and ours.
            unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) }
                .map_err(failed("cuMemcpyDtoHAsync"))?;
        }
        *event = Some((stream.record_event(None).map_err(failed("cuEventRecord"))?, columns));
        self.next += 1;
        Ok(number)
    }

    /// What has come under a number, counters first; `None` while it is under way, unless `wait`.
    pub fn read(&self, number: usize, wait: bool) -> Result<Option<Vec<u32>>> {
        let (memory, event) = &self.slots[number % SLOTS];
        let Some((event, columns)) = event else { return Ok(None) };
        if wait {
            event.synchronize().map_err(failed("cuEventSynchronize"))?;
        } else if !event.try_is_complete().map_err(failed("cuEventQuery"))? {
            return Ok(None);
        }
        let memory = memory.as_slice().map_err(failed("cuEventSynchronize"))?;
        Ok(Some(memory[..2 + columns].to_vec()))
    }
}

/// Seconds that the card takes for what `work` queues on a stream. Waits for it.
pub(super) fn timed(stream: &CudaStream, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT as TIMED;
    let mark = || stream.record_event(Some(TIMED)).map_err(failed("cuEventRecord"));
    let start = mark()?;
    work()?;
    let end = mark()?;
    wait(stream)?;
    Ok(f64::from(start.elapsed_ms(&end).map_err(failed("cuEventElapsedTime"))?) / 1e3)
}

/// Waits for what a stream was asked.
pub(super) fn wait(stream: &CudaStream) -> Result<()> {
    stream.synchronize().map_err(failed("cuStreamSynchronize"))
}

/// Waits for all that a card was asked.
pub(super) fn wait_for_torch(device: Device) {
    if let Device::Cuda(card) = device {
        tch::Cuda::synchronize(card as i64);
    }
}

/// Bytes of a card that nobody uses.
pub(super) fn free(device: Device) -> Result<usize> {
    let (free, _) = context(device)?.mem_get_info().map_err(failed("cuMemGetInfo"))?;
    Ok(free)
}

/// Bytes of the card in use, by whomever.
pub(super) fn used(stream: &CudaStream) -> Result<usize> {
    let (free, total) = stream.context().mem_get_info().map_err(failed("cuMemGetInfo"))?;
    Ok(total - free)
}

/// Bytes of a stream's card.
pub(super) fn total(stream: &CudaStream) -> Result<usize> {
    Ok(stream.context().mem_get_info().map_err(failed("cuMemGetInfo"))?.1)
}

/// The name of a stream's card.
pub(super) fn name(stream: &CudaStream) -> Result<String> {
    stream.context().name().map_err(failed("cuDeviceGetName"))
}

/// Bytes a second of a copy of 2 GiB on the card, read and written.
pub(super) fn copies(stream: &Arc<CudaStream>) -> Result<f64> {
    const BYTES: usize = 2 << 30;
    let room = || stream.alloc_zeros::<u8>(BYTES).map_err(failed("cuMemAlloc"));
    let (from, mut to) = (room()?, room()?);
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let copy = || stream.memcpy_dtod(&from, &mut to).map_err(failed("cuMemcpyDtoDAsync"));
        best = best.min(timed(stream, copy)?);
    }
    Ok(2.0 * BYTES as f64 / best)
}
