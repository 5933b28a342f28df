/// What this crate's fallible calls return.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with the settings, weights and tensors given to this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Rotation pairs dimension `i` with `i + head_dim / 2`, so there must be an even number.
    #[error("head dim {0} cannot be halved into pairs; give an even number above zero")]
    HeadDim(usize),

    /// A number of a rope configuration is NaN, infinite or outside its range.
    #[error("rope setting {name} is {value}; it must be {wanted}")]
    Setting {
        /// The constructor's argument.
        name: &'static str,
        /// What was given.
        value: f64,
        /// What it must be.
        wanted: &'static str,
    },

    /// A list of divisors is not one for each pair of dimensions.
    #[error(
        "{found} frequency divisors for {expected} pairs; \
         check that `rope_freqs` and the head dim belong to the same model"
    )]
    DivisorCount {
        /// Half of the head dim.
        expected: usize,
        /// The number given.
        found: usize,
    },

    /// One divisor is NaN, infinite, zero or negative.
    #[error("frequency divisor {index} is {value}; it must be finite and above zero")]
    Divisor {
        /// Its place in the list.
        index: usize,
        /// What was given.
        value: f32,
    },

    /// A tensor or slice has another shape than its neighbours ask for.
    #[error("{name} has shape {found:?}, expected {expected}")]
    Shape {
        /// The argument.
        name: &'static str,
        /// The expected shape in words, with what fixed its numbers.
        expected: String,
        /// The shape given; a slice has one dimension.
        found: Vec<i64>,
    },

    /// A layer's position maps have other sizes than those of the layers before it.
    #[error(
        "layer {layer} maps {found:?} (hidden, heads), the layers before it {expected:?}; \
         take all maps from one model"
    )]
    Layers {
        /// The first layer that differs.
        layer: usize,
        /// Hidden size and heads of the layers before.
        expected: (i64, i64),
        /// Hidden size and heads of this layer.
        found: (i64, i64),
    },

    /// Positions came in another dtype than f32: bf16 knows no integer between 256 and 258.
    #[cfg(feature = "tch")]
    #[error("positions are {0:?}, which rounds them; make them as f32 from the start")]
    PositionKind(tch::Kind),

    /// libtorch refused an operation.
    #[cfg(feature = "tch")]
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}
