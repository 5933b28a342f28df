use tch::{Device, Kind, Tensor};

use crate::{Error, Frequencies, Module, Precision, Repo, Repositioner, Result, module::agree};

/// Rotary embedding at real-valued positions, on tch.
#[derive(Debug)]
pub struct Rotary {
    inverse: Tensor, // [head_dim / 2], f32 or, for wide angles, f64
    scale: f32,
}

impl Rotary {
    /// Puts the frequencies on `device`.
    pub fn new(frequencies: &Frequencies, device: Device) -> Result<Self> {
        let kind = match frequencies.precision() {
            Precision::Parity => Kind::Float,
            Precision::Wide => Kind::Double,
        };
        let inverse = Tensor::f_from_slice(frequencies.inverse())?.f_to_kind(kind)?;
        Ok(Self { inverse: inverse.f_to_device(device)?, scale: frequencies.scale() })
    }

    /// Cosine and sine for [`rotate`], both f32 `[batch, heads, tokens, head_dim / 2]`, of
    /// `positions`, f32 `[batch, heads, tokens]`; one head where all heads stand alike.
    ///
    /// The angle is the product of position and frequency, rounded as the frequencies'
    /// [`Precision`] says; its cosine and sine are reduced in full.
    ///
    /// # Errors
    /// Positions that are not f32.
    pub fn angles(&self, positions: &Tensor) -> Result<(Tensor, Tensor)> {
        let kind = positions.f_kind()?;
        if kind != Kind::Float {
            return Err(Error::PositionKind(kind));
        }
        let positions = positions.f_to_kind(self.inverse.f_kind()?)?;
        let angles = positions.f_unsqueeze(-1)?.f_mul(&self.inverse)?;
        let scaled = |x: Tensor| -> Result<Tensor> {
            let x = x.f_to_kind(Kind::Float)?;
            Ok(if self.scale == 1.0 { x } else { x.f_mul_scalar(f64::from(self.scale))? })
        };
        Ok((scaled(angles.f_cos()?)?, scaled(angles.f_sin()?)?))
    }

    /// The same, rounded to `kind`: that of the model, for else [`rotate`] rounds them whenever it is called.
    ///
    /// # Errors
    /// As [`angles`](Self::angles).
    pub fn angles_in(&self, positions: &Tensor, kind: Kind) -> Result<(Tensor, Tensor)> {
        let narrow = kind == Kind::BFloat16 || kind == Kind::Half;
        if !narrow
            || self.inverse.kind() != Kind::Float
            || self.scale != 1.0
            || positions.requires_grad()
        {
            let (cos, sin) = self.angles(positions)?;
            return Ok((cos.f_to_kind(kind)?, sin.f_to_kind(kind)?));
        }
        if positions.kind() != Kind::Float {
            return Err(Error::PositionKind(positions.kind()));
        }
        // Nothing f32 is written but the angles themselves.
        let angles = positions.f_unsqueeze(-1)?.f_mul(&self.inverse)?;
        let out = || Tensor::f_empty(angles.size(), (kind, angles.device()));
        Ok((angles.f_cos_out(&out()?)?, angles.f_sin_out(&out()?)?))
    }
}

/// Rotates `x` `[batch, heads, tokens, head_dim]`, queries or keys, by the angles that
/// [`Rotary::angles`] gave; dimension `i` is paired with `i + head_dim / 2`.
///
/// `cos` and `sin` hold one row for all heads, one for each head, or one for each run of heads
/// (a kv head's queries), and one batch or as many as `x`. In bf16 cosine and sine are rounded to
/// x's dtype, which the result has, as in transformers; the sum of the products is rounded once.
///
/// # Errors
/// Shapes that do not fit so.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (shape, angles) = (x.size(), cos.size());
    if sin.size() != angles {
        return refuse("sine", format!("the cosine's {angles:?}"), sin);
    }
    let (&[batch, heads, tokens, head_dim], &[angle_batch, rows, angle_tokens, pairs]) =
        (shape.as_slice(), angles.as_slice())
    else {
        return refuse("x", format!("four dimensions, as the angles' {angles:?}"), x);
    };
    let fits = (angle_batch == 1 || angle_batch == batch)
        && (angle_tokens, 2 * pairs) == (tokens, head_dim)
        && rows > 0
        && heads % rows == 0;
    if !fits {
        return refuse("angles", format!("one to rotate {shape:?}"), cos);
    }
    if rows == 1 || rows == heads {
        return turn(x, cos, sin);
    }
    let grouped = x.f_unflatten(1, [rows, heads / rows])?; // [B, rows, group, T, D]
    Ok(turn(&grouped, &cos.f_unsqueeze(2)?, &sin.f_unsqueeze(2)?)?.f_flatten(1, 2)?)
}

fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let (cos, sin) = (cos.f_to_kind(kind)?, sin.f_to_kind(kind)?);
    let halves = x.f_chunk(2, -1)?;
    let [first, second] = &halves[..] else { return refuse("x", "an even head dim".into(), x) };
    let a = first.f_mul(&cos)?.f_addcmul_(second, &sin.f_neg()?)?;
    let b = second.f_mul(&cos)?.f_addcmul_(first, &sin)?;
    Ok(Tensor::f_cat(&[a, b], -1)?)
}

/// What positions are computed in, and rounded to: the dtype of a [`TorchModule`]'s maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RoundZ {
    /// Not at all: f32 in any model. The accurate choice.
    #[default]
    None,
    /// The dtype of the model, as the published code does. In bf16 that is up to 0.125 near 50, as many radians in the
    /// fastest pair.
    ModelDtype,
}

impl RoundZ {
    /// The dtype of the maps in a model of dtype `model`.
    pub fn kind(self, model: Kind) -> Kind {
        match self {
            Self::None => Kind::Float,
            Self::ModelDtype => model,
        }
    }
}

/// RePo's position module of one layer (see [`Module`]) on tch.
#[derive(Debug)]
pub struct TorchModule {
    gate_content: Tensor, // [2 * width, hidden], fused as both read the same state
    last: Tensor,         // [heads, width]
}

impl TorchModule {
    /// Takes `gate` and `content` `[width, hidden]` and `last` (the checkpoints' `final_map`)
    /// `[heads, width]` on one device, `heads` being kv heads as in [`Module::new`]. Maps of
    /// several dtypes become what torch promotes the first two to.
    ///
    /// # Errors
    /// Shapes that disagree.
    pub fn new(gate: &Tensor, content: &Tensor, last: &Tensor) -> Result<Self> {
        let shape = gate.size();
        if shape.len() != 2 || shape.contains(&0) {
            return refuse("gate map", "[width, hidden], neither zero".into(), gate);
        }
        if content.size() != shape {
            return refuse("content map", format!("the gate map's {shape:?}"), content);
        }
        if !matches!(last.size()[..], [heads, width] if heads > 0 && width == shape[0]) {
            return refuse("final map", format!("[heads, {} width]", shape[0]), last);
        }
        let gate_content = Tensor::f_cat(&[gate, content], 0)?;
        Ok(Self { last: last.f_to_kind(gate_content.f_kind()?)?, gate_content })
    }

    /// Positions, f32 `[batch, heads, tokens]`, of `hidden` `[batch, tokens, hidden]`.
    ///
    /// Computed in the dtype of the maps, which [`RoundZ`] chooses: `hidden` is converted to it.
    ///
    /// # Errors
    /// A hidden size that is not the maps'.
    pub fn positions(&self, hidden: &Tensor) -> Result<Tensor> {
        let (size, _) = self.hidden_and_heads();
        if !matches!(hidden.size()[..], [_, _, found] if found == size) {
            let expected = format!("[batch, tokens, {size}], as the maps read");
            return refuse("hidden", expected, hidden);
        }
        let hidden = hidden.f_to_kind(self.gate_content.f_kind()?)?;
        let mapped = hidden.f_linear(&self.gate_content, None::<&Tensor>)?; // [B, T, 2 * width]
        let width = self.last.size()[1];
        let (gate, content) = (mapped.f_narrow(-1, 0, width)?, mapped.f_narrow(-1, width, width)?);
        let positions = gate.f_silu()?.f_mul(&content)?.f_linear(&self.last, None::<&Tensor>)?;
        Ok(positions.f_to_kind(Kind::Float)?.f_transpose(1, 2)?) // [B, heads, T]
    }

    fn hidden_and_heads(&self) -> (i64, i64) {
        (self.gate_content.size()[1], self.last.size()[0])
    }
}

/// [`Repo`] on tch.
#[derive(Debug)]
pub struct TorchRepo(Vec<Option<TorchModule>>);

impl TorchRepo {
    /// Copies plain modules to `device` in `kind`; see [`RoundZ`] for the choice.
    pub fn new(repo: &Repo, kind: Kind, device: Device) -> Result<Self> {
        let tensor = |map: &[f32], rows: usize| -> Result<Tensor> {
            let map = Tensor::f_from_slice(map)?.f_reshape([rows as i64, -1])?;
            Ok(map.f_to_device(device)?.f_to_kind(kind)?)
        };
        let module = |module: &Module| {
            let ([gate, content, last], width) = (module.maps(), module.width());
            let (gate, content) = (tensor(gate, width)?, tensor(content, width)?);
            TorchModule::new(&gate, &content, &tensor(last, module.heads())?)
        };
        let layers = repo.layers().iter().map(|layer| layer.as_ref().map(module).transpose());
        Ok(Self(layers.collect::<Result<_>>()?))
    }

    /// Takes modules already on tch, one entry a layer of the model.
    ///
    /// # Errors
    /// Two layers disagree about the hidden size or the number of heads.
    pub fn from_layers(layers: Vec<Option<TorchModule>>) -> Result<Self> {
        agree(layers.iter().map(|layer| layer.as_ref().map(TorchModule::hidden_and_heads)))?;
        Ok(Self(layers))
    }
}

impl Repositioner<Tensor> for TorchRepo {
    fn positions(&self, layer: usize, hidden: &Tensor) -> Result<Option<Tensor>> {
        self.0
            .get(layer)
            .and_then(Option::as_ref)
            .map(|module| module.positions(hidden))
            .transpose()
    }
}

fn refuse<T>(name: &'static str, expected: String, tensor: &Tensor) -> Result<T> {
    Err(Error::Shape { name, expected, found: tensor.size() })
}
