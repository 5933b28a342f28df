use crate::{Array, Error, Policy, Result, judged};

/// A fixed share: of all tokens of a prefill, as many of the lowest scores go, so that methods can
/// be compared at equal cost.
///
/// It judges only tokens older than the newest `window`, but counts all: of T tokens `round(remove
/// * T)` go from each head, or `round(remove * heads * T)` from a layer, and never more than have
/// left the window. Equal scores go oldest first (in a layer then by head), so the same scores give
/// the same set anywhere; NaN counts as the largest. It sees one forward pass at a time: of a step
/// of `window` tokens or fewer it forgets nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    remove: f64,
    window: usize,
    scope: Scope,
}

/// Among which scores a [`Budget`] looks for the lowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Each kv head on its own: all heads keep equally many.
    Head,
    /// All kv heads of a layer together: a head that needs more keeps more.
    Layer,
}

impl Budget {
    /// Forgets a share `remove`, 0 to 1, of all tokens; NaN and shares outside are an error.
    pub fn new(remove: f64, window: usize, scope: Scope) -> Result<Self> {
        if !(0.0..=1.0).contains(&remove) {
            return Err(Error::Share(remove));
        }
        Ok(Self { remove, window, scope })
    }

    /// How many go out of `heads` heads of `tokens` tokens that are judged together, `old` of each
    /// out of the window.
    fn count(&self, heads: usize, tokens: usize, old: usize) -> usize {
        ((self.remove * (heads * tokens) as f64).round() as usize).min(heads * old)
    }
}

impl Policy<Array> for Budget {
    type Drops = Vec<bool>;

    fn drops(&self, scores: &Array) -> Result<Vec<bool>> {
        let [batch, heads, tokens] = scores.dims("scores", "[batch, kv_heads, tokens]")?;
        let old = judged(tokens, self.window).len();
        let together = match self.scope {
            Scope::Head => 1,
            Scope::Layer => heads,
        };
        let count = self.count(together, tokens, old);
        let mut drops = vec![false; scores.data().len()];
        for first in (0..batch * heads).step_by(together.max(1)) {
            let mut order: Vec<usize> = (0..old)
                .flat_map(|token| (first..first + together).map(move |row| row * tokens + token))
                .collect();
            order.sort_by(|&a, &b| {
                let (a, b) = (scores.data()[a], scores.data()[b]);
                a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
            });
            for &index in &order[..count] {
                drops[index] = true;
            }
        }
        Ok(drops)
    }
}

#[cfg(feature = "tch")]
impl Policy<tch::Tensor> for Budget {
    type Drops = tch::Tensor;

    fn drops(&self, scores: &tch::Tensor) -> Result<tch::Tensor> {
        let [batch, heads, tokens] =
            crate::torch::dims(scores, "scores", "[batch, kv_heads, tokens]")?;
        let old = judged(tokens as usize, self.window).len() as i64;
        let by_age = scores.f_narrow(2, 0, old)?.f_transpose(1, 2)?;
        let (rows, together) = match self.scope {
            Scope::Head => (by_age, 1),
            Scope::Layer => (by_age.f_reshape([batch, old * heads, 1])?, heads),
        };
        let count = self.count(together as usize, tokens as usize, old as usize) as i64;
        let goes =
            super::lowest(&rows, count)?.f_reshape([batch, old, heads])?.f_transpose(1, 2)?;
        Ok(goes.f_constant_pad_nd([0, tokens - old])?)
    }
}
