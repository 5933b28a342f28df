//! The published layout: a folder of config.json and model.safetensors, as kvpress's `KVzapModel`
//! saves it.

use super::{Affine, Surrogate};
use crate::{Error, Result, file};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The dtype of a surrogate's numbers in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Dtype {
    /// `float32`
    #[serde(rename = "float32")]
    F32,
    /// `float16`
    #[serde(rename = "float16")]
    F16,
    /// `bfloat16`
    #[serde(rename = "bfloat16")]
    Bf16,
}

/// The keys that matter; the file may hold more.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    n_modules: usize,
    input_dim: usize,
    output_dim: usize,
    hidden_dim: Option<usize>, // none: linear
    dtype: Option<Dtype>,
    torch_dtype: Option<Dtype>, // its older name
}

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

impl Surrogate {
    /// Reads the folder of a published surrogate: config.json and model.safetensors in F32, F16 or
    /// BF16.
    ///
    /// Unknown keys of config.json are ignored, and the dtype it names is what the numbers are
    /// rounded to, as transformers does. Errors name file, field or tensor; NaN and infinite
    /// weights are refused.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let config: Config = serde_json::from_slice(&file::read(&path)?)
            .map_err(|cause| Error::Config { path: path.clone(), cause })?;
        if config.model_type != "kvzap" {
            let found = format!("{:?}", config.model_type);
            return Err(Error::Field { path, field: "model_type", expected: "\"kvzap\"", found });
        }
        let sizes = [
            ("n_modules", config.n_modules),
            ("input_dim", config.input_dim),
            ("output_dim", config.output_dim),
            ("hidden_dim", config.hidden_dim.unwrap_or(1)),
        ];
        for (field, size) in sizes {
            if size == 0 {
                return Err(Error::Field {
                    path,
                    field,
                    expected: "a number above zero",
                    found: "0".into(),
                });
            }
        }

        let path = folder.join(WEIGHTS);
        let bytes = file::read(&path)?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|cause| Error::Safetensors { path: path.clone(), cause })?;
        let mut file = File { path, tensors, dtype: config.dtype.or(config.torch_dtype) };
        let (inputs, outputs) = (config.input_dim, config.output_dim);
        let mut modules = Vec::new();
        for layer in 0..config.n_modules {
            modules.push(match config.hidden_dim {
                None => vec![file.affine(&format!("layers.{layer}"), outputs, inputs)?],
                Some(width) => vec![
                    file.affine(&format!("layers.{layer}.0"), width, inputs)?,
                    file.affine(&format!("layers.{layer}.2"), outputs, width)?,
                ],
            });
        }
        Self::new(modules, file.dtype.unwrap_or(Dtype::F32))
    }

    /// Writes the folder that [`load`](Self::load) and kvpress's `KVzapModel.from_pretrained` read,
    /// making it if need be.
    ///
    /// Each file is written beside its place and renamed into it, so that no reader sees half a
    /// file and a failure leaves what was there.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|cause| Error::File { path: folder.into(), cause })?;

        let mut tensors = Vec::new();
        for (layer, module) in self.modules.iter().enumerate() {
            for (map, affine) in module.iter().enumerate() {
                let name = match module.len() {
                    1 => format!("layers.{layer}"),
                    _ => format!("layers.{layer}.{}", 2 * map), // GELU is the module's entry 1
                };
                let shape = vec![affine.outputs(), affine.inputs()];
                tensors.push((format!("{name}.weight"), shape, self.dtype.encode(affine.weight())));
                tensors.push((
                    format!("{name}.bias"),
                    vec![affine.outputs()],
                    self.dtype.encode(affine.bias()),
                ));
            }
        }
        let path = folder.join(WEIGHTS);
        let wrong = |cause| Error::Safetensors { path: path.clone(), cause };
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((name, TensorView::new(self.dtype.stored(), shape.clone(), bytes)?))
            })
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(wrong)?;
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let weights = safetensors::serialize(views, Some(metadata)).map_err(wrong)?;

        let config = serde_json::json!({
            "architectures": ["KVzapModel"],
            "dtype": self.dtype,
            "hidden_dim": self.modules[0].get(1).map(Affine::inputs),
            "input_dim": self.hidden(),
            "model_type": "kvzap",
            "n_modules": self.layers(),
            "output_dim": self.kv_heads(),
        });
        file::write(&folder.join(WEIGHTS), &weights)?;
        file::write(&folder.join(CONFIG), format!("{config:#}\n").as_bytes())
    }
}

struct File<'a> {
    path: PathBuf,
    tensors: SafeTensors<'a>,
    dtype: Option<Dtype>, // config.json's, else that of the first tensor read
}

impl File<'_> {
    fn affine(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Affine> {
        let weight = self.tensor(format!("{name}.weight"), &[outputs, inputs])?;
        Affine::new(weight, self.tensor(format!("{name}.bias"), &[outputs])?)
    }

    fn tensor(&mut self, tensor: String, shape: &[usize]) -> Result<Vec<f32>> {
        let path = || self.path.clone();
        let Ok(view) = self.tensors.tensor(&tensor) else {
            return Err(Error::NoTensor { path: path(), tensor });
        };
        if view.shape() != shape {
            let (expected, found) = (shape.to_vec(), view.shape().to_vec());
            return Err(Error::TensorShape { path: path(), tensor, expected, found });
        }
        let stored = match view.dtype() {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            other => {
                return Err(Error::TensorDtype {
                    path: path(),
                    tensor,
                    found: format!("{other:?}"),
                });
            }
        };
        let rounded = *self.dtype.get_or_insert(stored);
        let mut numbers = stored.decode(view.data());
        if rounded != stored {
            numbers = rounded.rounded(&numbers);
        }
        match numbers.iter().position(|number| !number.is_finite()) {
            Some(index) => {
                Err(Error::Weight { path: path(), tensor, index, value: numbers[index] })
            }
            None => Ok(numbers),
        }
    }
}

impl Dtype {
    fn stored(self) -> safetensors::Dtype {
        match self {
            Self::F32 => safetensors::Dtype::F32,
            Self::F16 => safetensors::Dtype::F16,
            Self::Bf16 => safetensors::Dtype::BF16,
        }
    }

    /// The nearest numbers that it has.
    pub(super) fn rounded(self, numbers: &[f32]) -> Vec<f32> {
        self.decode(&self.encode(numbers))
    }

    fn encode(self, numbers: &[f32]) -> Vec<u8> {
        let numbers = numbers.iter();
        match self {
            Self::F32 => numbers.flat_map(|x| x.to_le_bytes()).collect(),
            Self::F16 => numbers.flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Self::Bf16 => numbers.flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }

    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
            Self::F16 => {
                bytes.as_chunks().0.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect()
            }
            Self::Bf16 => {
                bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect()
            }
        }
    }
}
