use crate::{Error, Frequencies, Precision, Result};

impl Frequencies {
    /// Turns heads in place by the angles of their tokens' real-valued positions.
    ///
    /// `x` is `[heads, tokens, head_dim]`, queries or keys; `positions` is `[position_heads, tokens]`.
    /// Each run of `heads / position_heads` heads shares one row of positions: one row for all heads
    /// is plain rotary embedding, one row a kv head is RePo under grouped-query attention. A batch is
    /// rotated in one call, as batch and heads together form the first dimension of both.
    ///
    /// Dimension `i` is paired with `i + head_dim / 2`. The angle is the product of position and
    /// frequency, rounded as [`Precision`](crate::Precision) says; its sine and cosine are libm's
    /// with full range reduction. A position that is not finite makes its row NaN.
    ///
    /// # Errors
    /// `positions` is not a multiple of `tokens`, or `x` not a multiple of `positions` times
    /// `head_dim`.
    pub fn rotate(&self, x: &mut [f32], positions: &[f32], tokens: usize) -> Result<()> {
        let head_dim = self.head_dim();
        if x.is_empty() && positions.is_empty() {
            return Ok(());
        }
        if tokens == 0 || positions.is_empty() || !positions.len().is_multiple_of(tokens) {
            return Err(Error::Shape {
                name: "positions",
                expected: format!("[heads * {tokens} tokens]"),
                found: vec![positions.len() as i64],
            });
        }
        if !x.len().is_multiple_of(positions.len() * head_dim) {
            return Err(Error::Shape {
                name: "x",
                expected: format!(
                    "a multiple of {} positions * head dim {head_dim}",
                    positions.len()
                ),
                found: vec![x.len() as i64],
            });
        }
        let group = x.len() / (positions.len() * head_dim);
        let heads = x.chunks_exact_mut(tokens * head_dim);
        for (head, x) in heads.enumerate() {
            let positions = &positions[head / group * tokens..][..tokens];
            for (row, &position) in x.chunks_exact_mut(head_dim).zip(positions) {
                let (first, second) = row.split_at_mut(head_dim / 2);
                for ((a, b), &inverse) in first.iter_mut().zip(second).zip(self.inverse()) {
                    let (sin, cos) = self.sin_cos(position, inverse);
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
        Ok(())
    }

    /// Cosines and sines of `positions`, each `[positions, head_dim / 2]`, as [`rotate`](Self::rotate) multiplies by them.
    pub fn angles(&self, positions: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let angles = positions.iter().flat_map(|&position| {
            self.inverse().iter().map(move |&inverse| self.sin_cos(position, inverse))
        });
        angles.map(|(sin, cos)| (cos, sin)).unzip()
    }

    /// Sine and cosine of the angle of a position, times the [`scale`](Self::scale).
    fn sin_cos(&self, position: f32, inverse: f32) -> (f32, f32) {
        let (sin, cos) = match self.precision() {
            Precision::Parity => (position * inverse).sin_cos(),
            Precision::Wide => {
                let (sin, cos) = (f64::from(position) * f64::from(inverse)).sin_cos();
                (sin as f32, cos as f32)
            }
        };
        (sin * self.scale(), cos * self.scale())
    }
}
