//! What is a rank's of a model's tensors.

use super::Rank;
use crate::config::{Architecture, Config};
use crate::error::{Error, Result};
use crate::weights::{Cut, Tensors, Weights};
use tch::{Device, Kind, Tensor};

/// Maps whose outputs are cut: a head's, or an MLP unit's, rows.
const BY_ROWS: [&str; 5] = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"];
/// Maps that read these outputs: their columns are cut, and their results summed.
const BY_COLUMNS: [&str; 2] = ["o_proj", "down_proj"];

/// The weights of a model as a rank sees them: a smaller model.
pub(crate) struct Part<'a> {
    weights: &'a Weights,
    rank: &'a Rank,
    config: Config,
}

impl<'a> Part<'a> {
    pub fn new(weights: &'a Weights, rank: &'a Rank) -> Result<Self> {
        let whole = weights.config();
        let parts = rank.of();
        let uncut = |what, found, advice| Err(Error::Uncut { what, found, parts, advice });
        if whole.architecture == Architecture::Olmo2 {
            let advice = "run OLMo 2, whose norms go over all heads together, on one device";
            return uncut("a norm over all heads", whole.query_heads, advice);
        }
        if whole.positions.iter().any(|positions| positions.learned()) {
            return uncut("learned positions", whole.kv_heads, "run them on one device");
        }
        for (what, found) in
            [("kv heads", whole.kv_heads), ("the MLP's width", whole.intermediate_size)]
        {
            if parts == 0 || found % parts != 0 {
                return uncut(what, found, "ask for a number of cards that divides it");
            }
        }
        let config = Config {
            query_heads: whole.query_heads / parts,
            kv_heads: whole.kv_heads / parts,
            intermediate_size: whole.intermediate_size / parts,
            ..whole.clone()
        };
        Ok(Self { weights, rank, config })
    }

    /// Bytes of its matrices.
    pub fn bytes(&self) -> u64 {
        let Config { tied_embeddings, vocab_size, hidden_size, .. } = self.config;
        let embedding = if tied_embeddings { 0 } else { vocab_size * hidden_size };
        let elements = self.config.matrix_elements() + embedding;
        (elements * self.kind().elt_size_in_bytes()) as u64
    }

    /// Which dimension of a tensor is cut.
    fn dimension(name: &str) -> Option<usize> {
        let mut words = name.rsplit('.');
        let (tensor, map) = (words.next()?, words.next()?);
        if BY_ROWS.contains(&map) {
            return Some(0);
        }
        (BY_COLUMNS.contains(&map) && tensor == "weight").then_some(1)
    }
}

impl Tensors for Part<'_> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn kind(&self) -> Kind {
        self.weights.kind()
    }

    fn device(&self) -> Device {
        self.rank.device()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.weights.shape(name)
    }

    fn tensor_as(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let mut whole = shape.to_vec();
        let cut = Self::dimension(name).map(|dimension| {
            whole[dimension] *= self.rank.of() as i64;
            Cut { dimension, range: self.rank.share(whole[dimension] as usize) }
        });
        let part = self.weights.part(name, &whole, cut.as_ref(), kind, self.device())?;
        // What is added to a sum must be added once.
        let added = BY_COLUMNS.iter().any(|map| name.ends_with(&format!("{map}.bias")));
        if added && self.rank.index() > 0 { Ok(part.f_zeros_like()?) } else { Ok(part) }
    }
}
