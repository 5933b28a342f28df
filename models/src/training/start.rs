//! What a training begins with: the tensors that a decoder asks for, read or drawn.

use crate::config::Config;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::positions;
use crate::weights::{Tensors, Weights};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use repo_pos::{Precision, RoundZ};
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use tch::{Device, Kind, Tensor};

/// What the published code draws weights with.
const DEVIATION: f64 = 0.02;
const CUT: f64 = 3.0;

/// Hands a decoder its first tensors, and remembers them: what there is to train is what a decoder asks for.
pub(super) struct Start<'a> {
    config: Config,
    weights: Option<&'a Weights>,
    seed: u64,
    asked: RefCell<Vec<(String, Tensor)>>,
}

impl<'a> Start<'a> {
    pub fn new(config: Config, weights: Option<&'a Weights>, seed: u64) -> Self {
        Self { config, weights, seed, asked: RefCell::new(Vec::new()) }
    }

    /// Every tensor of the model, f32 on the CPU, in the order in which it is built.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Decoder::assemble(self, RoundZ::None, Precision::Parity)?;
        Ok(self.asked.take())
    }

    /// Factors `[rank, in]` and `[out, rank]` of an update to `weight` that begins at nothing.
    pub fn factors(&self, name: &str, weight: &Tensor, rank: i64) -> Result<[Tensor; 2]> {
        let [out, input] = weight.size()[..] else { unreachable!("a projection is a matrix") };
        let a = self.draw(&format!("{name}.a"), &[rank, input])?;
        Ok([a, Tensor::f_zeros([out, rank], (Kind::Float, Device::Cpu))?])
    }

    /// Numbers that `name` and the seed decide.
    fn draw(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let mut digest = Sha256::new();
        digest.update(self.seed.to_le_bytes());
        digest.update(name.as_bytes());
        let mut random = ChaCha8Rng::from_seed(digest.finalize().into());
        let count = shape.iter().product::<i64>() as usize;
        let mut numbers = Vec::with_capacity(count + 1);
        while numbers.len() < count {
            // Box and Muller's pair of normal numbers.
            let (radius, turn) = (random.random::<f64>(), random.random::<f64>());
            let radius = (-2.0 * (1.0 - radius).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * turn).sin_cos();
            let pair = [radius * cos, radius * sin].into_iter().filter(|x| x.abs() <= CUT);
            numbers.extend(pair.map(|x| (x * DEVIATION) as f32));
        }
        numbers.truncate(count);
        Ok(Tensor::f_from_slice(&numbers)?.f_view(shape)?)
    }
}

impl Tensors for Start<'_> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn kind(&self) -> Kind {
        Kind::Float
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self.weights {
            Some(weights) if weights.has(name) => Tensors::shape(weights, name),
            _ => Ok(positions::published_map(&self.config)),
        }
    }

    fn tensor_as(&self, name: &str, shape: &[i64], _: Kind) -> Result<Tensor> {
        let options = (Kind::Float, Device::Cpu);
        let tensor = match self.weights {
            Some(weights) if weights.has(name) || !name.contains("_map.") => {
                weights.tensor_as(name, shape, Kind::Float)?
            }
            _ if name.ends_with(".bias") => Tensor::f_zeros(shape, options)?,
            _ if shape.len() == 1 => Tensor::f_ones(shape, options)?,
            _ => self.draw(name, shape)?,
        };
        self.asked.borrow_mut().push((name.to_owned(), tensor.shallow_clone()));
        Ok(tensor)
    }
}
