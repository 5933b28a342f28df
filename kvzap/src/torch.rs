use crate::{Affine, Error, LayerInput, Result, Scorer, Surrogate};
use tch::{Device, Kind, Tensor};

/// A [`Surrogate`] on libtorch: `Scorer<Tensor>`, in the model's dtype on the model's device.
///
/// As in kvpress the weights are cast to the dtype of the hidden states, so bf16 in is bf16 scores
/// out, spaced 1/32 apart between 4 and 8.
#[derive(Debug)]
pub struct TorchSurrogate {
    modules: Vec<Vec<(Tensor, Tensor)>>, // weights [outputs, inputs], biases [outputs]
    aligned: Vec<Vec<(Tensor, Tensor)>>, // the same, with rows of zeros
    hidden: i64,
    kind: Kind,
}

/// Rows of 16-bit weights come to a multiple of this: products whose rows of outputs aren't aligned read hidden states slowly
/// on a card (65,536 of 576 to 3 outputs in 80 µs, to 8 in 32 µs, on an H100).
const ALIGNED: i64 = 8;

impl TorchSurrogate {
    /// Casts and moves the weights: `kind` is the dtype of the hidden states to come.
    pub fn new(surrogate: &Surrogate, kind: Kind, device: Device) -> Result<Self> {
        let tensor =
            |numbers: &[f32]| Tensor::f_from_slice(numbers)?.f_to_kind(kind)?.f_to_device(device);
        let affine = |map: &Affine| -> Result<_> {
            let shape = [map.outputs() as i64, map.inputs() as i64];
            Ok((tensor(map.weight())?.f_reshape(shape)?, tensor(map.bias())?))
        };
        let maps = (0..surrogate.layers()).filter_map(|layer| surrogate.maps(layer));
        let modules: Vec<Vec<_>> =
            maps.map(|maps| maps.iter().map(affine).collect()).collect::<Result<_>>()?;
        let half = matches!(kind, Kind::Half | Kind::BFloat16);
        let align = |(weight, bias): &(Tensor, Tensor)| -> Result<_> {
            let more = if half { -weight.size()[0] & (ALIGNED - 1) } else { 0 };
            Ok(match more {
                0 => (weight.shallow_clone(), bias.shallow_clone()),
                _ => {
                    (weight.f_constant_pad_nd([0, 0, 0, more])?, bias.f_constant_pad_nd([0, more])?)
                }
            })
        };
        let aligned = modules.iter().map(|maps| maps.iter().map(align).collect());
        let aligned = aligned.collect::<Result<_>>()?;
        Ok(Self { modules, aligned, hidden: surrogate.hidden() as i64, kind })
    }

    /// The same tensors once more.
    pub fn shallow_clone(&self) -> Self {
        let twice =
            |(weight, bias): &(Tensor, Tensor)| (weight.shallow_clone(), bias.shallow_clone());
        let all = |modules: &[Vec<_>]| {
            modules.iter().map(|maps| maps.iter().map(twice).collect()).collect()
        };
        Self { modules: all(&self.modules), aligned: all(&self.aligned), ..*self }
    }

    /// Of each layer, its maps: weights `[outputs, inputs]` and biases `[outputs]`.
    pub fn modules(&self) -> &[Vec<(Tensor, Tensor)>] {
        &self.modules
    }
}

impl Scorer<Tensor> for TorchSurrogate {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let LayerInput { layer, hidden, .. } = input;
        let maps =
            self.modules.get(layer).ok_or(Error::Layer { layer, layers: self.modules.len() })?;
        let [batch, tokens, _] = dims(hidden, "hidden", "[batch, tokens, hidden]")?;
        expect(hidden, "hidden", &[batch, tokens, self.hidden])?;
        if hidden.f_kind()? != self.kind {
            return Err(Error::Kind { expected: self.kind, found: hidden.f_kind()? });
        }
        let (weight, bias) = &self.aligned[layer][0];
        let rows = |map: &(Tensor, Tensor)| map.1.size()[0];
        let mut scores = hidden.f_linear(weight, Some(bias))?.f_narrow(2, 0, rows(&maps[0]))?;
        for (map, (weight, bias)) in maps.iter().zip(&self.aligned[layer]).skip(1) {
            scores =
                scores.f_gelu("none")?.f_linear(weight, Some(bias))?.f_narrow(2, 0, rows(map))?;
        }
        Ok(scores.f_transpose(1, 2)?) // [batch, kv_heads, tokens]
    }

    fn maps(&self, layer: usize) -> &[(Tensor, Tensor)] {
        self.aligned.get(layer).map_or(&[], Vec::as_slice)
    }
}

/// The shape of `tensor`, if it has `N` dimensions; else an error that calls it `name` and wants
/// `expected`.
pub(crate) fn dims<const N: usize>(
    tensor: &Tensor,
    name: &'static str,
    expected: &str,
) -> Result<[i64; N]> {
    let size = tensor.size();
    size.as_slice().try_into().map_err(|_| shape(name, expected.to_owned(), &size))
}

/// An error unless `tensor` has the shape `expected`.
pub(crate) fn expect(tensor: &Tensor, name: &'static str, expected: &[i64]) -> Result<()> {
    let size = tensor.size();
    if size == expected { Ok(()) } else { Err(shape(name, format!("{expected:?}"), &size)) }
}

fn shape(name: &'static str, expected: String, found: &[i64]) -> Error {
    Error::Shape { name, expected, found: found.iter().map(|&dim| dim as usize).collect() }
}
