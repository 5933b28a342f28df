//! What the copy engine is told of a matrix.

use super::failed;
use crate::error::Result;
use crate::shape::Dtype;
use cudarc::driver::sys;
use std::ffi::c_void;

/// Columns that lie together in shared memory: 128 bytes, the width of its swizzle.
pub const COLUMNS: usize = 64;

/// A matrix as the copy engine knows it: the driver's `CUtensorMap`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(128))]
pub struct Map([u64; 16]);

/// `[rows, columns]` of 16 bits, rows `stride` elements apart, fetched `box_rows` of [`COLUMNS`] at once. Only writes down
/// what it is told.
pub fn encode(
    dtype: Dtype,
    address: u64,
    [columns, rows]: [usize; 2],
    stride: usize,
    box_rows: usize,
) -> Result<Map> {
    use sys::CUtensorMapDataType_enum as Type;
    let mut map = Map([0; 16]);
    let sizes = [columns as u64, rows as u64];
    let (strides, boxes) = ([stride as u64 * 2], [COLUMNS as u32, box_rows as u32]);
    let dtype = match dtype {
        Dtype::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    // SAFETY: `map` is as large and as aligned as a CUtensorMap, and the arrays are of the rank's lengths.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            dtype,
            2,
            address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            [1, 1].as_ptr(),
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
