//! The one place that asks libtorch for CUDA, and loads its CUDA half first.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::error::Error as _;
use std::mem::ManuallyDrop;
use std::sync::OnceLock;
use tch::{Cuda, Device};

/// The first CUDA card.
///
/// Programs are linked to the CPU half of libtorch alone; where the other half lies beside it, or on `LD_LIBRARY_PATH`, it
/// is loaded here, so that the same program runs on machines with and without a card.
///
/// # Errors
/// [`Error::NoCuda`] where the library, the driver or the card is missing.
pub fn cuda() -> Result<Device> {
    let reason = match cuda_half() {
        None if Cuda::is_available() => return Ok(Device::Cuda(0)),
        None => "libtorch finds no driver or no card".to_owned(),
        Some(reason) => reason.clone(),
    };
    Err(Error::NoCuda { reason })
}

/// Loads libtorch's CUDA half, once, and says what went wrong. Whatever makes libtorch ask itself whether there is CUDA, as its
/// random seed does, comes after this: it keeps its first answer for ever.
pub(crate) fn cuda_half() -> &'static Option<String> {
    static WRONG: OnceLock<Option<String>> = OnceLock::new();
    WRONG.get_or_init(load)
}

/// The first `count` CUDA cards.
///
/// # Errors
/// Those of [`cuda`]; [`Error::Cards`] where there are fewer.
#[cfg(feature = "cuda")]
pub(crate) fn cards(count: usize) -> Result<Vec<Device>> {
    cuda()?;
    let found = Cuda::device_count().max(0) as usize;
    if count == 0 || count > found {
        return Err(Error::Cards { wanted: count, found });
    }
    Ok((0..count).map(Device::Cuda).collect())
}

fn load() -> Option<String> {
    // SAFETY: the library is libtorch's own, made to be loaded beside the half that runs already; what it does when it is
    // loaded is to register its kernels there. It is never unloaded.
    match unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(library) => {
            let _kept = ManuallyDrop::new(library);
            None
        }
        Err(error) => {
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            Some(format!("libtorch's CUDA half cannot be loaded ({cause})"))
        }
    }
}
