/// How the positions of neighbouring tokens run in one head (arXiv 2512.14391, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All lie within 0.2 of their mean: the head hardly sees order.
    Constant,
    /// Each lies above the one before, or each below: as with plain rotary embedding.
    Monotone,
    /// Neither.
    Hybrid,
}

impl Pattern {
    /// Tokens that are judged together.
    pub const CHUNK: usize = 16;

    /// The pattern of some positions in the order of their tokens. Where both hold, [`Constant`](Self::Constant).
    pub fn of(positions: &[f32]) -> Self {
        const NEAR: f64 = 0.2;
        let mean = positions.iter().map(|&z| f64::from(z)).sum::<f64>() / positions.len() as f64;
        if positions.iter().all(|&z| (f64::from(z) - mean).abs() <= NEAR) {
            Self::Constant
        } else if positions.is_sorted_by(|a, b| a < b) || positions.is_sorted_by(|a, b| a > b) {
            Self::Monotone
        } else {
            Self::Hybrid
        }
    }

    /// The pattern of each whole [chunk](Self::CHUNK) of a head's positions; of a shorter text, of all of it.
    pub fn chunks(positions: &[f32]) -> Vec<Self> {
        let size = Self::CHUNK.min(positions.len()).max(1);
        positions.chunks_exact(size).map(Self::of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern::{self, *};

    #[test]
    fn positions_are_constant_monotone_or_neither() {
        assert_eq!(Pattern::of(&[5.0, 5.1, 4.9, 5.19]), Constant);
        assert_eq!(Pattern::of(&[0.0, 0.01, 0.02]), Constant, "order within 0.2 is none");
        assert_eq!(Pattern::of(&[-3.0, -1.0, 0.5, 9.0]), Monotone);
        assert_eq!(Pattern::of(&[3.0, 1.0, 0.5]), Monotone);
        assert_eq!(Pattern::of(&[1.0, 1.0, 2.0]), Hybrid, "a step of none is not monotone");
        assert_eq!(Pattern::of(&[0.0, 5.0, 1.0]), Hybrid);
        assert_eq!(Pattern::of(&[f32::NAN, 1.0]), Hybrid);
    }

    #[test]
    fn whole_chunks_are_judged_and_a_short_text_as_one() {
        let index: Vec<f32> = (0..40).map(|n| n as f32).collect();
        assert_eq!(Pattern::chunks(&index), [Monotone; 2]);
        assert_eq!(Pattern::chunks(&index[..5]), [Monotone]);
        assert!(Pattern::chunks(&[]).is_empty());
    }
}
