use crate::{Array, Error, Repositioner, Result};

/// RePo's position module of one layer (arXiv 2512.14391, section 3.2), in plain Rust.
///
/// `position = final · (silu(gate · h) * (content · h))` for every token's hidden state `h`: one
/// real number for each head, without bias, norm or clamp, and without a look at the token's index.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    gate: Vec<f32>,
    content: Vec<f32>,
    last: Vec<f32>,
    hidden: usize,
    width: usize,
    heads: usize,
}

impl Module {
    /// Takes the three maps, row-major as checkpoints store them: `gate` and `content`
    /// `[width, hidden]`, `last` (the checkpoints' `final_map`) `[heads, width]`. The published
    /// models use a width of `hidden / 8`.
    ///
    /// `heads` is the number of kv heads: under grouped-query attention, which the paper leaves
    /// open, the queries of a kv head share its position, so that a key is rotated once and cached.
    ///
    /// # Errors
    /// `hidden` or `heads` zero, or maps whose lengths disagree.
    pub fn new(
        hidden: usize,
        heads: usize,
        gate: Vec<f32>,
        content: Vec<f32>,
        last: Vec<f32>,
    ) -> Result<Self> {
        let shape = |name, expected, map: &[f32]| {
            Err(Error::Shape { name, expected, found: vec![map.len() as i64] })
        };
        if hidden == 0 || gate.is_empty() || !gate.len().is_multiple_of(hidden) {
            return shape("gate map", format!("[width * {hidden} hidden], neither zero"), &gate);
        }
        if content.len() != gate.len() {
            return shape("content map", format!("the gate map's [{}]", gate.len()), &content);
        }
        let width = gate.len() / hidden;
        if heads == 0 || last.len() != heads * width {
            return shape("final map", format!("[{heads} heads * {width} width]"), &last);
        }
        Ok(Self { gate, content, last, hidden, width, heads })
    }

    /// Positions `[batch, heads, tokens]` of `hidden` `[batch, tokens, hidden]`.
    ///
    /// # Errors
    /// The hidden size is not the maps'.
    pub fn positions(&self, hidden: &Array) -> Result<Array> {
        let [batch, tokens, size] = hidden.shape();
        if size != self.hidden {
            return Err(Error::Shape {
                name: "hidden",
                expected: format!("[batch, tokens, {}], as the maps read", self.hidden),
                found: hidden.shape().map(|dim| dim as i64).to_vec(),
            });
        }
        let mut positions = vec![0.0; batch * self.heads * tokens];
        for (n, h) in hidden.data().chunks_exact(size).enumerate() {
            let (batch, token) = (n / tokens, n % tokens);
            let gated: Vec<f32> = self
                .gate
                .chunks_exact(size)
                .zip(self.content.chunks_exact(size))
                .map(|(gate, content)| silu(dot(gate, h)) * dot(content, h))
                .collect(); // [width]
            for (head, row) in self.last.chunks_exact(self.width).enumerate() {
                positions[(batch * self.heads + head) * tokens + token] = dot(row, &gated);
            }
        }
        Array::new(positions, [batch, self.heads, tokens])
    }

    /// Size of the hidden states it reads.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Width of the gate and content maps.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Positions a token: the kv heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Gate `[width, hidden]`, content `[width, hidden]` and final map `[heads, width]`.
    pub fn maps(&self) -> [&[f32]; 3] {
        [&self.gate, &self.content, &self.last]
    }
}

/// RePo for a model: the position module of each layer that has one, `None` for layers that keep
/// plain rotary embedding (the published models leave the lowest third so).
#[derive(Clone, Debug, PartialEq)]
pub struct Repo(Vec<Option<Module>>);

impl Repo {
    /// Takes the modules, one entry a layer of the model.
    ///
    /// # Errors
    /// Two layers disagree about the hidden size or the number of heads.
    pub fn new(layers: Vec<Option<Module>>) -> Result<Self> {
        agree(
            layers.iter().map(|layer| layer.as_ref().map(|m| (m.hidden as i64, m.heads as i64))),
        )?;
        Ok(Self(layers))
    }

    /// The modules, one entry a layer.
    pub fn layers(&self) -> &[Option<Module>] {
        &self.0
    }
}

impl Repositioner<Array> for Repo {
    fn positions(&self, layer: usize, hidden: &Array) -> Result<Option<Array>> {
        self.0
            .get(layer)
            .and_then(Option::as_ref)
            .map(|module| module.positions(hidden))
            .transpose()
    }
}

/// Refuses layers whose (hidden, heads) differ.
pub(crate) fn agree(layers: impl Iterator<Item = Option<(i64, i64)>>) -> Result<()> {
    let mut expected = None;
    for (layer, found) in layers.enumerate() {
        let Some(found) = found else { continue };
        let expected = *expected.get_or_insert(found);
        if found != expected {
            return Err(Error::Layers { layer, expected, found });
        }
    }
    Ok(())
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
