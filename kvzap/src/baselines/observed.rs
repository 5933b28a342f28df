use crate::attention::Attention;
use crate::{LayerInput, Result, Scorer};
use tch::{Kind, Tensor};

/// What was looked at will be looked at: a token's score is the attention that all tokens of the
/// pass paid to it, the mean over the group's heads.
///
/// As a mean over the tokens that could see it (kvpress's ObservedAttention), or as a sum: the heavy
/// hitters of H2O (arXiv 2306.14048), where old tokens lead by having been seen more often. kvpress
/// asks for eager attention and all of `[tokens, tokens]`; here rows are added block by block.
#[derive(Clone, Copy, Debug)]
pub struct ObservedAttention {
    sum: bool,
}

impl ObservedAttention {
    /// The mean over the tokens that could see it.
    pub fn mean() -> Self {
        Self { sum: false }
    }

    /// The sum: H2O's heavy hitters.
    pub fn sum() -> Self {
        Self { sum: true }
    }
}

impl Scorer<Tensor> for ObservedAttention {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let attention = Attention::new(input.queries, input.keys)?;
        let (batch, heads, tokens, _) = input.keys.size4()?;
        let float = (Kind::Float, input.keys.device());
        let total = Tensor::f_zeros([batch * heads, tokens], float)?;
        for rows in attention.blocks() {
            let end = rows.end;
            let paid =
                attention.weights(rows)?.f_sum_dim_intlist([2].as_slice(), false, Kind::Float)?; // [batch * kv_heads, group, end]
            let paid = paid.f_mean_dim([1].as_slice(), false, Kind::Float)?;
            let _ = total.f_narrow(1, 0, end)?.f_add_(&paid)?;
        }
        let total = total.f_reshape([batch, heads, tokens])?;
        if self.sum {
            return Ok(total);
        }
        Ok(total.f_div(&Tensor::f_arange_start_step(tokens, 0, -1, float)?)?)
    }
}
