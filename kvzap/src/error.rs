use std::io;
use std::path::PathBuf;

/// What this crate's fallible calls return.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with the settings, files and tensors given to this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A threshold that nothing is below.
    #[error(
        "the threshold is NaN, which would keep every token; give a number, or -inf to keep all"
    )]
    Threshold,

    /// A share to remove that is no share.
    #[error("the share to remove is {0}; give a number from 0 to 1")]
    Share(f64),

    /// A constant of an allocation's rule that it has no use for.
    #[error("{name} of the rule is {found}; give {expected}")]
    Rule {
        /// The constant.
        name: &'static str,
        /// What would do.
        expected: &'static str,
        /// What is there.
        found: f64,
    },

    /// A share that the window does not leave room for.
    #[error(
        "{remove} of {tokens} tokens is more than can go, as the newest {window} stay; \
         give a smaller share, a longer text or a smaller window"
    )]
    TooMuch {
        /// The share.
        remove: f64,
        /// Of the text.
        tokens: usize,
        /// The newest that stay.
        window: usize,
    },

    /// A calibration that cannot be used.
    #[error("{}: {reason}; make it anew with `longctx calibrate`", path.display())]
    Calibration {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// A ridge penalty that is NaN, infinite or negative.
    #[error("the ridge penalty alpha is {0}; give a finite number from 0 up, KVzap has 1")]
    Alpha(f64),

    /// An array or tensor has another shape than its neighbours ask for.
    #[error("{name} has shape {found:?}, expected {expected}; check that all come from one model")]
    Shape {
        /// The argument.
        name: &'static str,
        /// The expected shape in words, with what fixed its numbers.
        expected: String,
        /// The shape given.
        found: Vec<usize>,
    },

    /// A layer that the surrogate, or the fit, does not have.
    #[error("layer {layer} was asked for, there are {layers}; use a surrogate made for this model")]
    Layer {
        /// The layer asked for, from 0.
        layer: usize,
        /// How many there are.
        layers: usize,
    },

    /// A file could not be read or written.
    #[error("{}: {cause}; {}", path.display(), advice(cause))]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },

    /// A config.json that is no JSON, or lacks a field.
    #[error("{}: {cause}; it must be the config.json of a KVzap surrogate", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        cause: serde_json::Error,
    },

    /// A field of config.json with a value that we can't use.
    #[error(
        "{}: {field} is {found}, expected {expected}; use a surrogate in the published layout",
        path.display()
    )]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What would do.
        expected: &'static str,
        /// What is there.
        found: String,
    },

    /// A file that is not in the safetensors format.
    #[error("{}: {cause}; the file is damaged or incomplete, fetch it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: safetensors::SafeTensorError,
    },

    /// A tensor that config.json promises is not there.
    #[error(
        "{}: no tensor {tensor}; take it and config.json from one surrogate",
        path.display()
    )]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },

    /// A tensor has another shape than config.json says.
    #[error(
        "{}: {tensor} has shape {found:?}, config.json says {expected:?}; \
         take both from one surrogate",
        path.display()
    )]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// From config.json.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },

    /// A tensor has a dtype that no surrogate is published in.
    #[error("{}: {tensor} is {found}, expected F32, F16 or BF16; convert it", path.display())]
    TensorDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: String,
    },

    /// A weight is NaN or infinite. NaN scores are never forgotten, so the cache would silently
    /// stay whole.
    #[error(
        "{}: {tensor} holds {value} at {index}; train or fetch the surrogate again",
        path.display()
    )]
    Weight {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Place in the row-major numbers.
        index: usize,
        /// The number.
        value: f32,
    },

    /// A surrogate made for another model.
    #[error(
        "surrogate of another model: it has {field} {found}, the model {expected}; \
         use the one made for this model"
    )]
    OtherModel {
        /// `layers`, `hidden size` or `kv heads`.
        field: &'static str,
        /// The model's.
        expected: usize,
        /// The surrogate's.
        found: usize,
    },

    /// Layers of one surrogate that do not fit together.
    #[error("layer {layer} of the surrogate {problem}; build all layers alike from one model")]
    Build {
        /// The first layer that is wrong.
        layer: usize,
        /// What is wrong.
        problem: &'static str,
    },

    /// Rows for a fit, or their targets, that are NaN or infinite.
    #[error(
        "layer {layer}: rows or scores hold NaN or infinity; none were added, leave such rows out"
    )]
    Rows {
        /// The layer.
        layer: usize,
    },

    /// A layer for which no rows were added.
    #[error("layer {layer} has no rows to fit; add some for each layer")]
    NoRows {
        /// The layer.
        layer: usize,
    },

    /// Rows that do not determine the weights.
    #[error(
        "layer {layer}: its rows do not determine the weights; \
         add more rows, or raise alpha above {alpha}"
    )]
    Singular {
        /// The layer.
        layer: usize,
        /// The penalty.
        alpha: f64,
    },

    /// A file of samples or of a fit under way that is cut off or no such file.
    #[error("{}: damaged or incomplete; remove it, and it is made again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },

    /// Samples that were collected with other settings: another model, other texts, another seed.
    #[error(
        "{}: samples of other settings, {found}; this run has {expected}; give it a folder of its own",
        path.display()
    )]
    OtherSamples {
        /// The shard.
        path: PathBuf,
        /// This run's settings.
        expected: String,
        /// The shard's.
        found: String,
    },

    /// Two copies of a text that do not stand one after the other in the sequence.
    #[error(
        "copies of the text at {original:?} and {repeat:?} in {tokens} tokens; \
         neither may be empty, and the repeat must start after the original and end inside"
    )]
    #[cfg(feature = "tch")]
    Spans {
        /// The first copy.
        original: std::ops::Range<usize>,
        /// The second.
        repeat: std::ops::Range<usize>,
        /// Of the sequence.
        tokens: usize,
    },

    /// A chunk to score that is not of the context.
    #[error(
        "the chunk to score is {chunk:?} of {tokens} tokens of context; \
         call `Kvzip::context` for each layer, then `begin` before each pass"
    )]
    #[cfg(feature = "tch")]
    Chunk {
        /// The chunk.
        chunk: std::ops::Range<usize>,
        /// Of the context.
        tokens: usize,
    },

    /// A collector was run before it was told where the text stands.
    #[cfg(feature = "tch")]
    #[error("no text was announced; call `Collector::begin` before each forward pass")]
    NoText,

    /// Hidden states in another dtype than the surrogate was cast to.
    #[cfg(feature = "tch")]
    #[error(
        "hidden states are {found:?}, the surrogate is {expected:?}; \
         build it with the model's dtype"
    )]
    Kind {
        /// The surrogate's.
        expected: tch::Kind,
        /// The hidden states'.
        found: tch::Kind,
    },

    /// libtorch refused an operation.
    #[cfg(feature = "tch")]
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

/// What to do where a file could not be read or written.
fn advice(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room, or give another place"
        }
        _ => "check that it is there and that you may use it",
    }
}

impl Error {
    pub(crate) fn shape(name: &'static str, expected: String, found: &[usize]) -> Self {
        Self::Shape { name, expected, found: found.to_vec() }
    }
}
