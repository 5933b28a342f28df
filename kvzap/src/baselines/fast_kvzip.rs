use crate::torch::{dims, expect};
use crate::{Error, LayerInput, Result, Scorer};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Fast KVzip's gates (arXiv 2601.17668): a small attention module for each layer reads a token's
/// hidden state and says between 0 and 1 how much it will be needed. With q and k normed and 16 wide,
/// and 16 learned sink keys,
///
/// ```text
/// score = mean over g of  1 / (1 + Σ over sinks exp(q_g · sink / 4 - (q_g · k / 4 + b_g)))
/// ```
///
/// In f32 whatever the model's dtype; kvpress has the model's. kvpress's press then protects the
/// first 4 tokens and a window of 2 % (at least 1; from 32,000 tokens on 4,096): here those are for
/// an [`Allocation`](crate::Allocation) to say.
#[derive(Debug)]
pub struct FastKvzip {
    gates: Vec<Gate>,
    hidden: i64,
    heads: i64,
}

#[derive(Debug)]
struct Gate {
    queries: (Tensor, Tensor), // [kv_heads * group * width, hidden] and its bias
    keys: Tensor,              // [kv_heads * width, hidden]
    query_norm: Tensor,        // [width]
    key_norm: Tensor,          // [width]
    sinks: Tensor,             // [kv_heads, 1, sinks, width]
    bias: Tensor,              // [kv_heads, 1, group]
}

impl FastKvzip {
    /// Reads gates from a safetensors file with the published names, `{layer}.q_proj.weight` and so
    /// on for each layer.
    ///
    /// They are published as pickled files, which only Python reads:
    /// `save_file({f"{i}.{n}": t for i, d in enumerate(torch.load(f)["module"]) for n, t in
    /// d.items()}, …)` converts one.
    pub fn load(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(path).map_err(|cause| Error::File { path: path.into(), cause })?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|cause| Error::Safetensors { path: path.into(), cause })?;
        let layers = (0..).take_while(|i| file.tensor(&format!("{i}.k_base")).is_ok()).count();
        let mut gates = Self { gates: Vec::new(), hidden: 0, heads: 0 };
        for layer in 0..layers.max(1) {
            let tensor = |name: &str, shape: &[i64]| {
                read(&file, path, &format!("{layer}.{name}"), shape, device)
            };
            // A -1 stands for any size; what the first tensors have, the others must.
            let sinks = tensor("k_base", &[-1, 1, -1, -1])?;
            let bias = tensor("b", &[sinks.size()[0], 1, -1])?;
            let keys = tensor("k_proj.weight", &[sinks.size()[0] * sinks.size()[3], -1])?;
            let [heads, _, _, width] = dims(&sinks, "k_base", "")?;
            let (group, hidden) = (bias.size()[2], keys.size()[1]);
            let weight = tensor("q_proj.weight", &[heads * group * width, hidden])?;
            gates.gates.push(Gate {
                queries: (weight, tensor("q_proj.bias", &[heads * group * width])?),
                query_norm: tensor("q_norm.weight", &[width])?,
                key_norm: tensor("k_norm.weight", &[width])?,
                keys,
                sinks,
                bias,
            });
            (gates.hidden, gates.heads) = (hidden, heads);
        }
        Ok(gates)
    }

    /// An error that names the difference, unless they were made for a model of `layers`, `hidden`
    /// and `kv_heads`.
    pub fn check(&self, layers: usize, hidden: usize, kv_heads: usize) -> Result<()> {
        for (field, expected, found) in [
            ("layers", layers, self.gates.len()),
            ("hidden size", hidden, self.hidden as usize),
            ("kv heads", kv_heads, self.heads as usize),
        ] {
            if expected != found {
                return Err(Error::OtherModel { field, expected, found });
            }
        }
        Ok(())
    }
}

impl Scorer<Tensor> for FastKvzip {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let LayerInput { layer, hidden, .. } = input;
        let gate = self.gates.get(layer).ok_or(Error::Layer { layer, layers: self.gates.len() })?;
        let [batch, tokens, _] = dims(hidden, "hidden", "[batch, tokens, hidden]")?;
        expect(hidden, "hidden", &[batch, tokens, self.hidden])?;
        let [heads, _, _, width] = dims(&gate.sinks, "k_base", "")?;
        let scale = (width as f64).powf(-0.5);
        let hidden = hidden.f_to_kind(Kind::Float)?;
        let split = |x: Tensor| {
            x.f_view([batch, tokens, heads, -1, width])?.f_transpose(1, 2) // [batch, kv_heads, tokens, …]
        };
        let queries = split(hidden.f_linear(&gate.queries.0, Some(&gate.queries.1))?)?;
        let queries = norm(&queries, &gate.query_norm)?.f_mul_scalar(scale)?;
        let keys = norm(&split(hidden.f_linear(&gate.keys, None::<&Tensor>)?)?, &gate.key_norm)?;
        let own = queries.f_mul(&keys)?.f_sum_dim_intlist([-1].as_slice(), false, Kind::Float)?;
        let own = own.f_add(&gate.bias)?; // [batch, kv_heads, tokens, group]
        let sinks = queries.f_matmul(&gate.sinks.f_transpose(2, 3)?)?;
        let score = own.f_sub(&sinks.f_logsumexp([-1], false)?)?.f_sigmoid()?;
        Ok(score.f_mean_dim([-1].as_slice(), false, Kind::Float)?)
    }
}

/// Root-mean-square normalisation of the last dimension.
fn norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let square = x.f_square()?.f_mean_dim([-1].as_slice(), true, Kind::Float)?;
    Ok(x.f_mul(&square.f_add_scalar(1e-6)?.f_rsqrt()?)?.f_mul(weight)?)
}

/// A tensor as f32; `shape` may hold -1 for any size.
fn read(
    file: &SafeTensors<'_>,
    path: &Path,
    tensor: &str,
    shape: &[i64],
    device: Device,
) -> Result<Tensor> {
    let (path, tensor) = (path.to_owned(), tensor.to_owned());
    let Ok(view) = file.tensor(&tensor) else { return Err(Error::NoTensor { path, tensor }) };
    let found = view.shape();
    let fits = |(&wanted, &found): (&i64, &usize)| wanted < 0 || wanted as usize == found;
    if found.len() != shape.len() || found.contains(&0) || !shape.iter().zip(found).all(fits) {
        let expected = shape.iter().map(|&size| size.max(1) as usize).collect();
        return Err(Error::TensorShape { path, tensor, expected, found: found.to_vec() });
    }
    let kind = match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => return Err(Error::TensorDtype { path, tensor, found: format!("{other:?}") }),
    };
    let size: Vec<i64> = found.iter().map(|&size| size as i64).collect();
    let weight = Tensor::f_from_data_size(view.data(), &size, kind)?.f_to_kind(Kind::Float)?;
    let bad = weight.f_isfinite()?.f_logical_not()?.f_view([-1])?;
    if bad.f_any()?.f_int64_value(&[])? != 0 {
        let index = bad.f_to_kind(Kind::Int64)?.f_argmax(0, false)?.f_int64_value(&[])?;
        let value = weight.f_view([-1])?.f_double_value(&[index])? as f32;
        return Err(Error::Weight { path, tensor, index: index as usize, value });
    }
    Ok(weight.f_to_device(device)?)
}
