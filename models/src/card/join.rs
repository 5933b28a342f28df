//! The kernel that adds a sum over the ranks to the residual stream.
#![allow(unsafe_code)]

use super::driver::{PARTS, Stream, failed, function, load};
use super::memory::{address, after_torch, before_torch, device};
use crate::error::Result;
use cudarc::driver::{CudaStream, result, sys};
use std::ffi::c_void;
use std::sync::Arc;
use tch::{Kind, Tensor};

const PTX: &str = concat!(include_str!("../../kernels/ranks.compute_80.ptx"), "\0");
const PTX_HOPPER: &str = concat!(include_str!("../../kernels/ranks.compute_90.ptx"), "\0");
const THREADS: u32 = 512;

/// Mirrors kernels/ranks.cu.
#[repr(C)]
struct JoinCall {
    sums: u64,
    residual: u64,
    norm: u64,
    normed: u64,
    squares: u64,
    width: u32,
    unused: u32,
}

/// The kernel on a card, launched on one stream.
pub(super) struct Join {
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    join: sys::CUfunction,
}

// SAFETY: the handles name a module and its function, which any thread may use once the context is bound to it, as every
// method here does first.
unsafe impl Send for Join {}

impl Join {
    pub fn load(stream: Arc<CudaStream>) -> Result<Self> {
        let context = stream.context();
        let capability = context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?;
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let module = load(if capability >= (9, 0) { PTX_HOPPER } else { PTX })?;
        let join = Self { join: function(module, "ranks_join")?, module, stream };
        let size = Tensor::f_zeros([1], (Kind::Int, device(&join.stream)))?;
        after_torch(&join.stream)?;
        join.launch(function(module, "ranks_sizes")?, 1, 1, &address(&size, Kind::Int, 1)?)?;
        before_torch(&join.stream)?;
        let size = size.f_int64_value(&[0])?;
        assert_eq!(size as usize, size_of::<JoinCall>(), "the kernel's struct is as mirrored here");
        Ok(join)
    }

    /// Adds `sums`, f32 `[columns, width]`, to the residual stream, and readies that for a norm of weight `norm`, whose parts
    /// of a column's squares are those of one tile.
    pub fn run(
        &self,
        sums: &Tensor,
        stream: Stream<'_>,
        norm: &Tensor,
        [columns, width]: [usize; 2],
    ) -> Result<()> {
        let Stream { residual, normed, squares } = stream;
        let call = JoinCall {
            sums: address(sums, Kind::Float, columns * width)?,
            residual: address(residual, Kind::Float, columns * width)?,
            norm: address(norm, Kind::BFloat16, width)?,
            normed: address(normed, Kind::BFloat16, columns * width)?,
            squares: address(squares, Kind::Float, columns * PARTS)?,
            width: width as u32,
            unused: 0,
        };
        self.launch(self.join, columns as u32, THREADS, &call)
    }

    fn launch<T>(
        &self,
        kernel: sys::CUfunction,
        blocks: u32,
        threads: u32,
        call: &T,
    ) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let argument = std::ptr::from_ref(call).cast_mut().cast::<c_void>();
        let (grid, block) = ((blocks, 1, 1), (threads, 1, 1));
        // SAFETY: `call` is the kernel's argument, which the driver copies before it returns; its addresses are of tensors
        // that hold what the kernel reads and writes, as `run` has checked, and live as long as the graph.
        unsafe {
            let stream = self.stream.cu_stream();
            result::launch_kernel(kernel, grid, block, 0, stream, &mut [argument])
        }
        .map_err(failed("cuLaunchKernel"))
    }
}

impl Drop for Join {
    fn drop(&mut self) {
        let context = self.stream.context();
        if context.bind_to_thread().is_ok() {
            // SAFETY: nothing else names the module's functions, and unloading waits for what still runs.
            context.record_err(unsafe { result::module::unload(self.module) });
        }
    }
}
