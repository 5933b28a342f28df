//! What can go wrong, and what to do about it.

use std::path::PathBuf;

/// What this crate's fallible calls return.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in this crate. A variant's text says all of it: nothing hides in a source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be read.
    #[error("cannot read {}: {cause}; {advice}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
        /// What to do.
        advice: &'static str,
    },

    /// A file cannot be written.
    #[error("cannot write {}: {cause}; does its folder exist, and may you write there?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },

    /// A file is not what its format asks for.
    #[error("{}: {what} is {found}, wanted {wanted}; {advice}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The field, key or part that is wrong.
        what: String,
        /// What it must be.
        wanted: String,
        /// What it is.
        found: String,
        /// What to do.
        advice: &'static str,
    },

    /// A file is well formed and asks for what this crate does not have.
    #[error("{}: {field} {found} is not supported, only {supported}; {advice}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key that asks for it.
        field: String,
        /// What it asks for.
        found: String,
        /// What there is.
        supported: &'static str,
        /// What to do.
        advice: &'static str,
    },

    /// A model of a family that this crate does not know.
    #[error(
        "{}: architecture {found:?} is unknown, supported: {SUPPORTED}; \
         choose a model of these",
        path.display()
    )]
    UnknownArchitecture {
        /// The file that names it.
        path: PathBuf,
        /// Its name there.
        found: String,
    },

    /// A tensor that the config asks for is not in the files.
    #[error("{}: tensor {tensor} is missing; {advice}", path.display())]
    MissingTensor {
        /// The file that should hold it.
        path: PathBuf,
        /// Its name in that file.
        tensor: String,
        /// What to do.
        advice: &'static str,
    },

    /// A layer has a position map that the config gives to others.
    #[error(
        "{}: tensor {tensor} is there, but the config gives position maps to layers {planned:?}; \
         take pe_config and weights of the same model", path.display()
    )]
    StrayMap {
        /// The config.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The layers that have learned positions after the config, from 0.
        planned: Vec<usize>,
    },

    /// An overlay was made for another model.
    #[error(
        "{}: made for the model with fingerprint {wanted}, not for {} with {found}; \
         give the very file or folder it was made for", path.display(), base.display()
    )]
    OtherBase {
        /// The overlay.
        path: PathBuf,
        /// The model it was to be laid over.
        base: PathBuf,
        /// The fingerprint that the overlay names.
        wanted: String,
        /// The model's.
        found: String,
    },

    /// An overlay holds a tensor that its model does not have.
    #[error("{}: tensor {tensor} is none of the model's; write the overlay again", path.display())]
    StrayTensor {
        /// The overlay.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },

    /// A tensor has other dimensions than the config says.
    #[error(
        "{}: tensor {tensor} has shape {found:?}, the config asks for {wanted:?}; \
         check that config and weights belong to the same model", path.display()
    )]
    WrongShape {
        /// The file that holds it.
        path: PathBuf,
        /// Its name in that file.
        tensor: String,
        /// The shape after the config.
        wanted: Vec<i64>,
        /// The shape in the file, outermost dimension first.
        found: Vec<usize>,
    },

    /// A tensor is stored in a type that cannot be read.
    #[error(
        "{}: tensor {tensor} is stored as {found}, readable: {}; convert it to one of these",
        path.display(), crate::weights::READABLE
    )]
    WrongDtype {
        /// The file that holds it.
        path: PathBuf,
        /// Its name in that file.
        tensor: String,
        /// Its type there.
        found: String,
    },

    /// A weight is NaN or infinite.
    #[error(
        "{}: tensor {tensor} holds NaN or infinity; fetch or convert the file again",
        path.display()
    )]
    NotFinite {
        /// The file that holds it.
        path: PathBuf,
        /// Its name in that file.
        tensor: String,
    },

    /// Two weight files hold one tensor, and no index says which counts.
    #[error(
        "tensor {tensor} is in both {} and {}; \
         remove the stray file or add model.safetensors.index.json",
        first.display(), second.display()
    )]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },

    /// An index names a weight file that is not inside its own folder.
    #[error(
        "{}: weight file {file:?} lies outside the folder; \
         put the files beside the index and name them so",
        path.display()
    )]
    OutsideFolder {
        /// The index.
        path: PathBuf,
        /// The name it gives.
        file: String,
    },

    /// Weights were asked for in another dtype than f32 or bf16.
    #[error("weights in {0} are not supported; ask for f32 or bf16")]
    WeightKind(String),

    /// The cache was asked to hold another dtype than f32 or bf16.
    #[error("a cache of {found} is not supported; use f32 or bf16")]
    CacheKind {
        /// The dtype asked for.
        found: String,
    },

    /// A tokenizer cannot be built, or refuses a text.
    #[error("{}: tokenizer: {what}; {advice}", path.display())]
    Tokenizer {
        /// The file that describes it.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// What to do.
        advice: &'static str,
    },

    /// A chat template cannot be parsed, or fails on these messages.
    #[error("{}: chat template {template}, line {line}: {what}; {advice}", path.display())]
    Template {
        /// The file it comes from.
        path: PathBuf,
        /// Its name: `default`, or `tool_use` where a model has several.
        template: String,
        /// The line of the template.
        line: usize,
        /// What is wrong, as the template engine says it, or the template's own message.
        what: String,
        /// What to do.
        advice: &'static str,
    },

    /// A training was asked for in which no number would change.
    #[error(
        "nothing would be trained: the model has no position maps; give it some, or train more than the maps"
    )]
    NothingToTrain,

    /// A file holds the state of a training with other settings.
    #[error(
        "{}: it was written by a training with other settings ({found}); go on with those, or remove it to begin anew",
        path.display()
    )]
    OtherTraining {
        /// The file.
        path: PathBuf,
        /// Its settings.
        found: String,
    },

    /// There is nothing to continue.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,

    /// There is no mark to go back to.
    #[error("the cache was not marked; call mark once the text is read, then rewind")]
    NoMark,

    /// No CUDA card can be used.
    #[error(
        "no CUDA: {reason}; put the lib folder of torch 2.11.0 for CUDA on LD_LIBRARY_PATH on a machine \
         with a card, or use the CPU"
    )]
    NoCuda {
        /// What is missing.
        reason: String,
    },

    /// A model that the decode step on the card does not know.
    #[error("the card's decode step has no {what}; {advice}")]
    Step {
        /// What it does not have.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },

    /// Fewer cards than were asked for.
    #[error(
        "{wanted} cards are asked for, and there are {found}; ask for no more, or look at CUDA_VISIBLE_DEVICES"
    )]
    Cards {
        /// Cards that were asked for.
        wanted: usize,
        /// Cards that libtorch finds.
        found: usize,
    },

    /// Cards that cannot share a model evenly.
    #[error(
        "card 0 has {first} bytes and card {card} has {found}: a model is cut into equal parts, whose cards must be alike; \
         choose them with CUDA_VISIBLE_DEVICES"
    )]
    UnlikeCards {
        /// Bytes of the first.
        first: usize,
        /// The other.
        card: usize,
        /// Bytes of the other.
        found: usize,
    },

    /// A model that cannot be cut into so many parts.
    #[error("{what} ({found}) cannot be cut into {parts} equal parts; {advice}")]
    Uncut {
        /// What does not divide.
        what: &'static str,
        /// How many, or how wide.
        found: usize,
        /// Parts that were asked for.
        parts: usize,
        /// What to do.
        advice: &'static str,
    },

    /// NCCL cannot be loaded.
    #[error(
        "NCCL, which adds up what several cards have: it cannot be loaded: {reason}; torch for CUDA brings it: put the \
         lib folder of its nvidia/nccl on LD_LIBRARY_PATH, or use one card"
    )]
    Nccl {
        /// Why.
        reason: String,
    },

    /// NCCL refused a call.
    #[error(
        "NCCL, which adds up what several cards have: {call}: {reason}; leave it some of the cards' memory, and set \
         NCCL_DEBUG=WARN to see what it lacks, or use one card"
    )]
    NcclCall {
        /// The call.
        call: &'static str,
        /// What it said.
        reason: String,
    },

    /// One of the parts of a model failed while others waited for it. Nothing can be asked of them any more.
    #[error("part {rank} of the model is lost: {cause}; start the machine again")]
    RankLost {
        /// Which.
        rank: usize,
        /// What happened there.
        cause: String,
    },

    /// Drop bits of another shape than the text that they are for.
    #[error(
        "drop bits are {found:?}, expected {wanted:?}; take them from scores of this very text"
    )]
    DropBits {
        /// `[texts, kv_heads, tokens]`, or the number of layers.
        wanted: Vec<i64>,
        /// Theirs.
        found: Vec<i64>,
    },

    /// A text is longer than the model was made for.
    #[error("{wanted} tokens do not fit the model's context of {limit}; shorten the text")]
    ContextTooLong {
        /// Tokens in all.
        wanted: usize,
        /// The config's `max_positions`.
        limit: usize,
    },

    /// A token id that the model has no embedding for.
    #[error("token {id} is outside the vocabulary of {vocabulary}; use this model's own tokenizer")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocabulary: usize,
    },

    /// A request that asks for no token.
    #[error("a request for 0 tokens; ask for at least 1")]
    NothingToWrite,

    /// A question that its machine does not read in one pass.
    #[error(
        "a question of {found} tokens, at most {most} are read at once after a context; put the rest into the context"
    )]
    QuestionTooLong {
        /// Tokens of the question.
        found: usize,
        /// Tokens of a pass.
        most: usize,
    },

    /// A request that would not fit the pages if nothing of it were forgotten.
    #[error(
        "a text of {tokens} tokens takes up to {wanted} pages, of {pages} of which {free} are free; shorten it, give the \
         cache more memory, or admit it in the hope that enough is forgotten (Admission::Hopeful)"
    )]
    NeverFits {
        /// Tokens that it reads and may write.
        tokens: usize,
        /// Pages of as many tokens if none is dropped.
        wanted: usize,
        /// Pages that are free at present.
        free: usize,
        /// All pages.
        pages: usize,
    },

    /// A text that outgrew the pages when it had them for itself.
    #[error(
        "a text of {tokens} tokens holds {held} of {pages} pages and needs more than the {free} that are free, with nobody \
         left to make room; shorten it, forget more, or give the cache more memory"
    )]
    TextOutOfPages {
        /// Tokens that it has read and written.
        tokens: usize,
        /// Pages that it holds.
        held: usize,
        /// Pages that are free.
        free: usize,
        /// All pages.
        pages: usize,
    },

    /// A text that its machine has let go, or never had.
    #[error("text {text} is not on this machine; do not name a text after its release")]
    UnknownText {
        /// Its number.
        text: u64,
    },

    /// A call that does not follow from what was done with the text before.
    #[error("text {text} cannot {call} now: {state}; see the life of a text at Executor")]
    TextState {
        /// Its number.
        text: u64,
        /// What was asked.
        call: &'static str,
        /// What it is doing.
        state: &'static str,
    },

    /// A setting of a machine that no machine can have.
    #[error("an executor's {field} is {found}; {advice}")]
    Room {
        /// The setting.
        field: &'static str,
        /// Its value.
        found: usize,
        /// What it must be.
        advice: &'static str,
    },

    /// What does not fit the memory.
    #[error(
        "{what} take {wanted} bytes, of memory {free} are free; use a smaller model, dtype or cache, or a machine with more \
         memory"
    )]
    Memory {
        /// What was to be loaded or made.
        what: &'static str,
        /// Its bytes.
        wanted: u64,
        /// Bytes that are free.
        free: u64,
    },

    /// What does not fit the memory of a card.
    #[error(
        "{what} take {wanted} bytes, of the card's memory {free} are free; use a smaller model or dtype, shorten the text, \
         forget more, or use a card with more memory"
    )]
    CardMemory {
        /// What was to be loaded or made.
        what: &'static str,
        /// Its bytes.
        wanted: u64,
        /// Bytes that are free.
        free: u64,
    },

    /// The thread of an engine has ended.
    #[error("the engine has stopped; start another, and report this if it did not end by itself")]
    EngineStopped,

    /// A repositioner gave positions for a number of heads that does not fit the model.
    #[error(
        "layer {layer}: positions for {heads} heads, wanted 1 or {kv_heads}; check the repositioner"
    )]
    PositionHeads {
        /// The layer.
        layer: usize,
        /// Heads of the positions.
        heads: usize,
        /// Key/value heads of the model.
        kv_heads: usize,
    },

    /// A position is NaN or infinite.
    #[error(
        "layer {layer}: a position is NaN or infinite; the weights that positions are learned with are broken: fetch the model or overlay again, or train with a lower --map-rate"
    )]
    PositionNotFinite {
        /// The layer.
        layer: usize,
    },

    /// A sampling setting is outside its range.
    #[error("sampling setting {what} is {found}; see its documentation for the range")]
    Sampling {
        /// The setting.
        what: &'static str,
        /// Its value.
        found: String,
    },

    /// There are no logits to choose a token from, or they are NaN.
    #[error("no finite logits to choose a token from; check weights and dtype")]
    NoLogits,

    /// A scorer, policy or surrogate failed.
    #[error(transparent)]
    Score(#[from] kvzap::Error),

    /// The pool of the cache failed.
    #[error(transparent)]
    Cache(#[from] paged_kernels::Error),

    /// The repositioner or the rotary embedding failed.
    #[error(transparent)]
    Position(#[from] repo_pos::Error),

    /// A tensor cannot be handed to the cache.
    #[error(
        "the cache cannot read {found}, wanted {wanted}; make the tensor so before it is cached"
    )]
    TensorLayout {
        /// What it must be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },

    /// libtorch refused an operation. The text is its first line: what follows is a C++ backtrace.
    #[error("libtorch: {}", first_line(.0))]
    Torch(tch::TchError),
}

/// The architectures that there are, by their names in config.json and in a GGUF file.
const SUPPORTED: &str =
    "LlamaForCausalLM, Qwen3ForCausalLM, Olmo2ForCausalLM (GGUF: llama, qwen3, olmo2)";

// By hand: `#[from]` would make the error its own source as well, and a chain would print the
// backtrace after all.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error)
    }
}

fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
