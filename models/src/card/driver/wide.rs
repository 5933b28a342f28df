//! The launch of kernels/wide.cu: products by wgmma, on Hopper alone.

use super::{GATED, ProductCall, WIDTHS, failed, function, load};
use crate::error::Result;
use cudarc::driver::{CudaStream, result, sys};

const PTX: &str = concat!(include_str!("../../../kernels/wide.compute_90a.ptx"), "\0");
/// Rows of a tile; of a gated product half of each.
const TILE: usize = 64;
/// Elements of the inner dimension in a stage.
const PIECE: usize = 64;
/// Groups of four warps, and a block's threads.
const TEAMS: usize = 2;
const THREADS: u32 = 256;
/// Bytes of shared memory that leave room for a block of attention, and the most stages of a team's ring in them.
const ROOM: usize = 148 << 10;
const MOST_STAGES: usize = 8;
/// Blocks of a cluster that share a tile, at most: a sixteenth of rows each.
const MOST_SPLITS: usize = 4;

/// The kernels, on a card.
pub(super) struct Wide {
    pub module: sys::CUmodule,
    /// By width.
    products: [sys::CUfunction; WIDTHS.len()],
}

impl Wide {
    pub fn load() -> Result<Self> {
        let module = load(PTX)?;
        let mut products = [std::ptr::null_mut(); WIDTHS.len()];
        for (product, width) in products.iter_mut().zip(WIDTHS) {
            *product = function(module, &format!("wide_product_{width}"))?;
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            let bytes = shared(width) as i32;
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(*product, SHARED, bytes) }
                .map_err(failed("cuFuncSetAttribute"))?;
        }
        Ok(Self { module, products })
    }

    /// Launches the kernel of a `width`. What a sum is made of hangs on the product's rows and the card alone.
    pub fn launch(
        &self,
        stream: &CudaStream,
        multiprocessors: usize,
        width: usize,
        call: &mut ProductCall,
    ) -> Result<()> {
        let tiles = match call.kind {
            GATED => (call.rows as usize / 2).div_ceil(TILE / 2),
            _ => (call.rows + call.more_rows).div_ceil(TILE as u32) as usize,
        };
        let mut splits = 1;
        while splits < MOST_SPLITS && tiles * splits * 2 <= multiprocessors {
            splits *= 2;
        }
        (call.tiles, call.splits) = (tiles as u32, splits as u32);
        call.stages = stages(WIDTHS[width]) as u32;
        if call.next_squares != 0 {
            call.next_parts = (tiles * splits).next_multiple_of(4) as u32;
        }
        let blocks = if splits > 1 { tiles * splits } else { tiles.min(multiprocessors) };

        stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        use sys::CUlaunchAttributeID as Id;
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let cluster =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: splits as u32, y: 1, z: 1 };
        let mut attributes = [
            attribute(
                Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            ),
            attribute(
                Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue { clusterDim: cluster },
            ),
        ];
        let config = sys::CUlaunchConfig {
            gridDimX: blocks as u32,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared(WIDTHS[width]) as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: if splits > 1 { 2 } else { 1 },
        };
        let mut arguments = [std::ptr::from_mut(call).cast()];
        let (arguments, extra) = (arguments.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: `call` is the kernel's argument, which the driver copies before it returns; its addresses are of tensors
        // that hold what the kernel reads and writes, as the caller has checked, and live as it says.
        unsafe { sys::cuLaunchKernelEx(&raw const config, self.products[width], arguments, extra) }
            .result()
            .map_err(failed("cuLaunchKernelEx"))
    }
}

/// Stages of a team's ring.
fn stages(columns: usize) -> usize {
    ((ROOM - sums(columns)) / (TEAMS * (TILE + columns) * PIECE * 2)).min(MOST_STAGES)
}

/// Bytes of the teams' sums.
fn sums(columns: usize) -> usize {
    TEAMS * TILE * (columns + 8) * 4
}

/// Bytes of shared memory: the rings, and the sums.
fn shared(columns: usize) -> usize {
    stages(columns) * TEAMS * (TILE + columns) * PIECE * 2 + sums(columns)
}
