//! The launch of kernels/wide.cu: products by the copy engine and wgmma, on Hopper alone.

use super::{ProductCall, WIDTHS, failed, function, load};
use crate::error::Result;
use cudarc::driver::{CudaStream, result, sys};
use std::ffi::c_void;

const PTX: &str = concat!(include_str!("../../../kernels/wide.compute_90a.ptx"), "\0");
/// Rows of a tile, and how many of them are fetched at once.
const TILE: usize = 64;
const HALF: usize = 32;
/// Elements of the inner dimension that are fetched at once: 128 bytes, the width of the copy engine's swizzle.
const PIECE: usize = 64;
/// Groups of four warps that multiply, and a block's threads with the warp that fetches.
const TEAMS: usize = 2;
const THREADS: u32 = 288;
/// Bytes of a ring: more would leave no room for a block of attention.
const RING: usize = 112 << 10;
/// Blocks of a cluster that share a tile, at most.
const MOST_SPLITS: usize = 4;

/// The kernels, on a card.
pub(super) struct Wide {
    pub module: sys::CUmodule,
    /// By width.
    products: [sys::CUfunction; 4],
}

/// A matrix as the copy engine knows it: the driver's `CUtensorMap`.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Map([u64; 16]);

impl Wide {
    pub fn load() -> Result<Self> {
        let module = load(PTX)?;
        let product = |width: usize| -> Result<_> {
            let product = function(module, &format!("wide_product_{width}"))?;
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            let bytes = room(width, RING / stage_bytes(width)) as i32;
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(product, SHARED, bytes) }
                .map_err(failed("cuFuncSetAttribute"))?;
            Ok(product)
        };
        let [a, b, c, d] = WIDTHS.map(product);
        Ok(Self { module, products: [a?, b?, c?, d?] })
    }

    /// Whether the kernels are made for it.
    pub fn takes(call: &ProductCall) -> bool {
        let whole = call.run == call.inner || (call.run as usize).is_multiple_of(PIECE);
        let joined = call.more_rows == 0 || (call.rows as usize).is_multiple_of(HALF);
        let aligned = [call.weight, call.more, call.input].iter().all(|at| at.is_multiple_of(16));
        let strides = [call.inner, call.run_stride, call.column_stride];
        whole && joined && aligned && strides.iter().all(|stride| stride.is_multiple_of(8))
    }

    /// Launches it for the kernel of `width`.
    pub fn launch(
        &self,
        stream: &CudaStream,
        multiprocessors: usize,
        width: usize,
        call: &mut ProductCall,
    ) -> Result<()> {
        let gated = call.kind == 1;
        let rows = (call.rows + call.more_rows) as usize;
        let tiles = if gated { (rows / 2).div_ceil(HALF) } else { rows.div_ceil(TILE) };
        let mut splits = 1;
        while splits < MOST_SPLITS && tiles * splits * 2 <= multiprocessors {
            splits *= 2;
        }
        let inner = call.inner as usize;
        let columns = WIDTHS[width];
        let stages = RING / stage_bytes(columns);
        (call.tiles, call.splits, call.stages) = (tiles as u32, splits as u32, stages as u32);
        if call.next_squares != 0 {
            call.next_parts = (tiles * splits).next_multiple_of(4) as u32;
        }
        let weights = |address, rows: u32| {
            encode(address, &[inner, rows as usize], &[inner * 2], &[PIECE, HALF])
        };
        let weight = weights(call.weight, call.rows)?;
        let more = if call.more_rows > 0 { weights(call.more, call.more_rows)? } else { weight };
        let run = call.run as usize;
        let input = encode(
            call.input,
            &[run, call.columns as usize, inner / run],
            &[call.column_stride as usize * 2, (call.run_stride as usize * 2).max(16)],
            &[PIECE, columns, 1],
        )?;

        stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let mut attributes = [
            sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            },
            sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue {
                    clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                        x: splits as u32,
                        y: 1,
                        z: 1,
                    },
                },
            },
        ];
        let blocks = if splits > 1 { tiles * splits } else { tiles.min(multiprocessors) };
        let config = sys::CUlaunchConfig {
            gridDimX: blocks as u32,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: room(columns, stages) as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: if splits > 1 { 2 } else { 1 },
        };
        let call: &ProductCall = call;
        let mut arguments = [argument(call), argument(&weight), argument(&more), argument(&input)];
        let (arguments, extra) = (arguments.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the arguments are the kernel's, which the driver copies before it returns; addresses and maps are of
        // tensors that hold what the kernel reads and writes, as the caller has checked, and live as it says.
        unsafe { sys::cuLaunchKernelEx(&raw const config, self.products[width], arguments, extra) }
            .result()
            .map_err(failed("cuLaunchKernelEx"))
    }
}

fn argument<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

fn stage_bytes(columns: usize) -> usize {
    (TILE + columns) * PIECE * 2
}

/// Bytes of shared memory: the ring, the teams' sums, and a pair of barriers for each stage.
fn room(columns: usize, stages: usize) -> usize {
    stages * (stage_bytes(columns) + 16) + TEAMS * TILE * (columns + 8) * 4
}

/// bf16 of `sizes`, the fastest first, whose `strides` from the second on are in bytes; fetched a box at a time.
fn encode(address: u64, sizes: &[usize], strides: &[usize], boxes: &[usize]) -> Result<Map> {
    let mut map = Map([0; 16]);
    let sizes = sizes.iter().map(|&size| size as u64).collect::<Vec<_>>();
    let strides = strides.iter().map(|&stride| stride as u64).collect::<Vec<_>>();
    let boxes = boxes.iter().map(|&size| size as u32).collect::<Vec<_>>();
    // SAFETY: `map` is as large and as aligned as a CUtensorMap, and the arrays are of the rank's lengths.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            sizes.len() as u32,
            address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            [1, 1, 1].as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(failed("cuTensorMapEncodeTiled"))?;
    Ok(map)
}
