//! Weights that no file holds: drawn from a seed for the shapes of a config, so that a model of any size runs without its
//! download. Speed and memory are those of real weights; what it writes means nothing.

use crate::config::Config;
use crate::device;
use crate::error::Result;
use crate::folder;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// Deviation of matrices and biases: transformers' `initializer_range`.
const DEVIATION: f64 = 0.02;
/// Of norms, about 1.
const NORM_DEVIATION: f64 = 0.1;
/// Tensors of at most as many elements are drawn on the CPU, so that small models are the same on every device.
const SMALL: i64 = 1 << 20;

/// A folder whose config.json counts, and a seed.
#[derive(Debug)]
pub struct Random {
    path: PathBuf,
    config: Config,
    seed: i64,
}

impl Random {
    /// Reads the config of `folder`.
    pub fn open(folder: &Path, seed: i64) -> Result<Self> {
        let config = folder::config(folder)?;
        Ok(Self { path: folder.to_owned(), config, seed })
    }

    /// The model's shapes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensor of a name, normal with the usual deviation; the same for the same seed, name, shape and device.
    pub(crate) fn tensor(
        &self,
        name: &str,
        shape: &[i64],
        kind: Kind,
        device: Device,
    ) -> Result<Tensor> {
        // The generator that is seeded is the process's: parts of a model are drawn on several threads.
        static DRAWING: Mutex<()> = Mutex::new(());
        let _drawing = DRAWING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hasher = DefaultHasher::new();
        (self.seed, name).hash(&mut hasher);
        // A seed asks for CUDA: without its half at hand, no card would be found later.
        device::cuda_half();
        tch::manual_seed(hasher.finish() as i64);
        let small = shape.iter().product::<i64>() <= SMALL;
        let on = if small { Device::Cpu } else { device };
        let (mean, deviation) =
            if name.contains("norm") { (1.0, NORM_DEVIATION) } else { (0.0, DEVIATION) };
        // Rounded before it becomes what it shall be: one model, whatever the dtype.
        let mut drawn = Tensor::f_empty(shape, (Kind::BFloat16, on))?;
        Ok(drawn.f_normal_(mean, deviation)?.f_to_kind(kind)?.f_to_device(device)?)
    }
}
