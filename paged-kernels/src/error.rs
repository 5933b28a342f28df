//! What can go wrong, and what to do about it.

use crate::page::PageId;
#[cfg(feature = "cuda")]
use crate::shape::Dtype;

/// What can go wrong in this crate. Nothing has changed when an error comes back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The pool cannot give what a call needs.
    #[error(
        "wanted {wanted} pages, {free} are free; release a sequence or build the cache with more pages"
    )]
    OutOfPages {
        /// Pages that the call needs beyond those already held.
        wanted: usize,
        /// Pages that are free.
        free: usize,
    },
    /// A page was shared or released that nobody holds.
    #[error("page {page} is not in use; release each page as often as it was taken or shared")]
    PageNotInUse {
        /// The page.
        page: PageId,
    },
    /// A field of [`CacheShape`](crate::CacheShape) that no cache can have.
    #[error("cache shape: {field} is {found}; {advice}")]
    CacheShape {
        /// The field.
        field: &'static str,
        /// Its value.
        found: usize,
        /// What it must be.
        advice: &'static str,
    },
    /// A handle whose sequence was released.
    #[error("the sequence is not in this cache; do not use a handle after its release")]
    UnknownSequence,
    /// A layer that the cache does not have.
    #[error("layer {found} of {layers}; count layers from 0")]
    Layer {
        /// The layer asked for.
        found: usize,
        /// Layers of the cache.
        layers: usize,
    },
    /// A tensor of another shape than the call needs.
    #[error(
        "{tensor} has shape {found:?}, expected {expected:?}; check heads, tokens and head dim"
    )]
    Shape {
        /// The argument.
        tensor: &'static str,
        /// The shape that the call needs.
        expected: [usize; 3],
        /// The shape that it got.
        found: [usize; 3],
    },
    /// A flat argument of another length than the call needs.
    #[error(
        "{argument} holds {found} elements, expected {expected}; check heads, tokens and strides"
    )]
    Length {
        /// The argument.
        argument: &'static str,
        /// The length that the call needs.
        expected: usize,
        /// The length that it got.
        found: usize,
    },
    /// A sequence's layer was filled before.
    #[error("layer {layer} is already filled; fill each layer once, before the first step")]
    FilledTwice {
        /// The layer.
        layer: usize,
    },
    /// A sequence has already taken a step without its layers being filled.
    #[error("the sequence has already taken a step; fill before the first step or not at all")]
    FilledLate,
    /// A layer was filled with another number of tokens than the layers before it.
    #[error(
        "layer {layer} is filled with {found} tokens, the layers before it with {expected}; fill all alike"
    )]
    TokensDiffer {
        /// The layer.
        layer: usize,
        /// Tokens of the layers before.
        expected: usize,
        /// Tokens of this layer.
        found: usize,
    },
    /// A step of a sequence of which some layers are filled and some are not.
    #[error("layer {layer} is not filled but others are; fill every layer before the first step")]
    NotFilled {
        /// The first layer without tokens.
        layer: usize,
    },
    /// A sequence stands twice in one step.
    #[error("a sequence stands twice in the step; ask for all of its tokens in one entry")]
    SequenceTwice,
    /// The step before has not reached every layer.
    #[error(
        "the step before is not appended to layer {layer}; append every layer or release its sequences"
    )]
    StepUnfinished {
        /// The first layer without the step's tokens.
        layer: usize,
    },
    /// There is no step to append to or attend from.
    #[error("no step has begun; call begin_step first")]
    NoStep,
    /// A layer was given the step's tokens before.
    #[error("layer {layer} already has the tokens of this step; append each layer once a step")]
    AppendedTwice {
        /// The layer.
        layer: usize,
    },
    /// A text that was taken out of a cache of another shape.
    #[error(
        "the text comes from a cache of another shape; resume it in one that differs in pages at most"
    )]
    OtherShape,
    /// Every seat of a cache is taken.
    #[cfg(feature = "cuda")]
    #[error("all {seats} seats are taken; release a sequence or build the cache with more seats")]
    NoSeat {
        /// Seats of the cache.
        seats: usize,
    },
    /// More tokens of a text in a pass than its cache has places for.
    #[cfg(feature = "cuda")]
    #[error(
        "a pass of {found} tokens, at most {most} fit; give it in chunks or build the cache with longer passes"
    )]
    PassTooLong {
        /// Tokens of the text.
        found: usize,
        /// Tokens that fit.
        most: usize,
    },
    /// A step after a pass, whose texts are not those that step.
    #[cfg(feature = "cuda")]
    #[error("a pass came since the batch was named; call batch before the next step")]
    NoBatch,
    /// A text that was taken out of a cache of another shape.
    #[cfg(feature = "cuda")]
    #[error(
        "the text comes from a cache of another shape; resume it in one that differs in pages and texts at most"
    )]
    OtherCache,
    /// No CUDA driver on this machine.
    #[cfg(feature = "cuda")]
    #[error(
        "no CUDA driver: libcuda was not found; install NVIDIA driver 580 or newer, or use Cpu"
    )]
    NoDriver,
    /// A CUDA driver from before the kernels' instructions.
    #[cfg(feature = "cuda")]
    #[error(
        "the CUDA driver offers version {found}, wanted {wanted}; install NVIDIA driver 580 or newer, or use Cpu"
    )]
    OldDriver {
        /// The driver's version, 1000 · major + 10 · minor; 0 if it does not say.
        found: i32,
        /// The least version that will do.
        wanted: i32,
    },
    /// A CUDA driver without a card.
    #[cfg(feature = "cuda")]
    #[error("the CUDA driver sees no card; check CUDA_VISIBLE_DEVICES, or use Cpu")]
    NoCard,
    /// A card without the kernels' instructions.
    #[cfg(feature = "cuda")]
    #[error(
        "{card} has compute capability {major}.{minor}, wanted 8.0 or newer; use another card, or Cpu"
    )]
    Card {
        /// Its name.
        card: String,
        /// The first number of its compute capability.
        major: i32,
        /// The second.
        minor: i32,
    },
    /// The card's memory is full.
    #[cfg(feature = "cuda")]
    #[error(
        "wanted {wanted} bytes on the card, {free} are free; build the cache with fewer pages or free other memory"
    )]
    DeviceMemory {
        /// Bytes that were asked for at once.
        wanted: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// A call of the driver failed. What the cache holds is not known after that.
    #[cfg(feature = "cuda")]
    #[error(
        "{call}: {error}; build the cache anew, and run under compute-sanitizer if it happens again"
    )]
    Cuda {
        /// The driver's function.
        call: &'static str,
        /// What the driver says.
        error: String,
    },
    /// An address that no tensor can have.
    #[cfg(feature = "cuda")]
    #[error("{address:#x} is no address of {dtype:?} elements; hand over a tensor on the card")]
    Address {
        /// The address.
        address: u64,
        /// The type of the elements.
        dtype: Dtype,
    },
    /// A view of a type that only caches store.
    #[cfg(feature = "cuda")]
    #[error(
        "tensors on the card have no type {dtype:?}, only caches do; hand over F32, Bf16 or F16"
    )]
    StoredOnly {
        /// The type.
        dtype: Dtype,
    },
    /// A slice that belongs to another stream than the cache works on.
    #[cfg(feature = "cuda")]
    #[error("the slice belongs to another stream; allocate it on the stream of the cache")]
    OtherStream,
    /// A tensor of another type than the call needs.
    #[cfg(feature = "cuda")]
    #[error("{tensor} is {found:?}, wanted {expected:?}; give it a view of that type")]
    Type {
        /// The argument.
        tensor: &'static str,
        /// The type that the call needs.
        expected: Dtype,
        /// The type that it got.
        found: Dtype,
    },
    /// Rows that lie apart where the call reads them as one.
    #[cfg(feature = "cuda")]
    #[error("the rows of {tensor} lie apart; hand over a contiguous tensor")]
    Rows {
        /// The argument.
        tensor: &'static str,
    },
    /// A surrogate that no kernel can score with.
    #[cfg(feature = "cuda")]
    #[error(
        "a surrogate with {found} {field}, wanted 1 to {most}; check the weights and their dim"
    )]
    Surrogate {
        /// What is counted.
        field: &'static str,
        /// How many there are.
        found: usize,
        /// How many there may be.
        most: usize,
    },
    /// An address that no drop bits can have.
    #[cfg(feature = "cuda")]
    #[error("{address:#x} is no address of 32-bit words; hand over memory on the card")]
    BitsAddress {
        /// The address.
        address: u64,
    },
    /// A layer was attended before it was given the step's tokens.
    #[error("layer {layer} has no tokens of this step yet; append before you attend")]
    NotAppended {
        /// The layer.
        layer: usize,
    },
}

/// This crate's results.
pub type Result<T> = std::result::Result<T, Error>;
