use super::lowest;
use crate::torch::{dims, expect};
use crate::{Error, Policy, Result, judged};
use tch::{Kind, Tensor};

/// A fixed share of a whole model's cache: from the scores of all layers, which tokens go.
///
/// Like [`Budget`](crate::Budget) it judges only tokens older than the newest `window`, and besides
/// spares the first `protected` ones, but counts all: `round(remove * N)` of N go, and never more
/// than are judged. Equal scores go oldest first, then by layer, then by head; NaN counts as the
/// largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allocation {
    remove: f64,
    window: usize,
    protected: usize,
    rule: Rule,
}

/// Among which scores an [`Allocation`] looks for the lowest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Each kv head on its own.
    Head,
    /// All kv heads of a layer together.
    Layer,
    /// All kv heads of all layers together, as KVzip does (arXiv 2505.23416).
    Model,
    /// As [`Model`](Self::Model) but in the way of KVzip's own repository: N is the judged tokens
    /// alone, the score of rank `floor((1 - remove) * N)` is a threshold, and it and all that equal
    /// it go.
    ModelThreshold,
    /// AdaKV (arXiv 2407.11550): a layer together, but each head's `floor(safe * kept)` highest, at
    /// least one, stay, where `kept` is a head's even share; the paper's and kvpress's `safe` is
    /// 0.2. What is not judged counts among the highest.
    AdaKv {
        /// 0 to 1.
        safe: f64,
    },
    /// PyramidKV (arXiv 2406.02069): each kv head on its own, and the number that stays falls
    /// linearly from the first layer to the last, the steeper the larger `beta`, kvpress's is 20.
    /// Where the last layer would keep less than the window all layers keep alike.
    PyramidKv {
        /// 1 or more.
        beta: f64,
    },
}

impl Allocation {
    /// Forgets a share `remove`, 0 to 1, of all tokens. Shares outside, and constants of the rule
    /// that it has no use for, are an error.
    pub fn new(remove: f64, window: usize, protected: usize, rule: Rule) -> Result<Self> {
        if !(0.0..=1.0).contains(&remove) {
            return Err(Error::Share(remove));
        }
        match rule {
            Rule::AdaKv { safe } if !(0.0..=1.0).contains(&safe) => {
                Err(Error::Rule { name: "safe", expected: "a number from 0 to 1", found: safe })
            }
            Rule::PyramidKv { beta } if !(1.0..f64::INFINITY).contains(&beta) => {
                Err(Error::Rule { name: "beta", expected: "a finite number from 1", found: beta })
            }
            _ => Ok(Self { remove, window, protected, rule }),
        }
    }

    /// For `scores`, `[1, kv_heads, tokens]` for each layer, as many bools, on their device: true, it
    /// goes.
    pub fn drops(&self, scores: &[Tensor]) -> Result<Vec<Tensor>> {
        let Some(first) = scores.first() else { return Ok(Vec::new()) };
        let [_, heads, tokens] = dims(first, "scores", "[1, kv_heads, tokens]")?;
        let old = judged(tokens as usize, self.window).len() as i64;
        let spared = old.min(self.protected as i64);
        let judged = old - spared;
        for scores in scores {
            expect(scores, "scores", &[1, heads, tokens])?;
        }
        // All layers in one tensor, as on a card each launch costs what all of them do.
        let rows = Tensor::f_cat(scores, 0)?.f_narrow(2, spared, judged)?;
        let rows = rows.f_transpose(1, 2)?; // [layers, judged, kv_heads]
        let share = |rows: i64| self.round(rows * tokens).min(rows * judged);
        let of_layers = |rows: &Tensor| -> Result<Tensor> {
            let layers = rows.f_reshape([rows.size()[0], -1, 1])?;
            Ok(lowest(&layers, share(heads))?.f_view_as(rows)?)
        };
        let of_model = |goes: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Tensor> {
            let by_age = rows.f_transpose(0, 1)?; // [judged, layers, kv_heads]
            let all = goes(&by_age.f_reshape([1, -1, 1])?)?;
            Ok(all.f_view_as(&by_age)?.f_transpose(0, 1)?)
        };
        let goes = match self.rule {
            Rule::Head => lowest(&rows, share(1))?,
            Rule::Layer => of_layers(&rows)?,
            Rule::Model => {
                let count = heads * scores.len() as i64;
                of_model(&|all| lowest(all, share(count)))?
            }
            Rule::ModelThreshold => of_model(&|all| self.threshold(all))?,
            Rule::AdaKv { safe } => {
                let kept = tokens - self.round(tokens);
                let least = if safe > 0.0 && kept > 0 { 1 } else { 0 };
                let safe = ((kept as f64 * safe) as i64).max(least);
                let safe = (safe - (tokens - judged)).clamp(0, judged);
                let exposed = lowest(&rows, judged - safe)?;
                of_layers(&rows.f_where_self(&exposed, &rows.f_full_like(f64::INFINITY)?)?)?
            }
            Rule::PyramidKv { beta } => {
                let kept = self.pyramid(beta, tokens as usize, scores.len());
                let goes = rows
                    .f_split(1, 0)?
                    .into_iter()
                    .zip(kept)
                    .map(|(layer, kept)| lowest(&layer, (tokens - kept).clamp(0, judged)));
                Tensor::f_cat(&goes.collect::<Result<Vec<_>>>()?, 0)?
            }
        };
        let goes = goes.f_transpose(1, 2)?.f_constant_pad_nd([spared, tokens - old])?;
        Ok(goes.f_split(1, 0)?)
    }

    fn round(&self, count: i64) -> i64 {
        (self.remove * count as f64).round() as i64
    }

    /// KVzip's `_threshold` over `[1, N, 1]`.
    fn threshold(&self, all: &Tensor) -> Result<Tensor> {
        let count = all.numel() as i64;
        if count == 0 || self.remove == 0.0 {
            return Ok(all.f_zeros_like()?.f_to_kind(Kind::Bool)?);
        }
        let rank = (((1.0 - self.remove) * count as f64) as i64 - 1).max(0);
        let sorted = all.f_sort(1, true)?.0;
        Ok(all.f_le_tensor(&sorted.f_narrow(1, rank, 1)?)?)
    }

    /// How many tokens of a head stay in each of `layers` layers, as kvpress counts.
    fn pyramid(&self, beta: f64, tokens: usize, layers: usize) -> Vec<i64> {
        let (window, whole) = (self.window as f64, tokens as f64);
        let even = whole * (1.0 - self.remove);
        let (mut last, mut first) = (even / beta, 2.0 * even - even / beta);
        if first >= whole - window {
            first = whole - window;
            last = 2.0 * even - first;
        }
        if !(first >= last && last >= window) {
            return vec![(even.round_ties_even() as i64).max(1); layers];
        }
        let step = if layers > 1 { (first - last) / (layers - 1) as f64 } else { 0.0 };
        (0..layers).map(|layer| (first - layer as f64 * step).round_ties_even() as i64).collect()
    }
}

/// For one layer as it comes, so for the rules that look at no other: [`Head`](Rule::Head),
/// [`Layer`](Rule::Layer) and [`AdaKv`](Rule::AdaKv). Under the others a layer is a whole model.
impl Policy<Tensor> for Allocation {
    type Drops = Tensor;

    fn drops(&self, scores: &Tensor) -> Result<Tensor> {
        self.drops(std::slice::from_ref(scores))?.pop().ok_or(Error::Layer { layer: 0, layers: 0 })
    }
}
