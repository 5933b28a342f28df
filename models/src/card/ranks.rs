//! A model's parts on cards of one machine.

use super::driver::Stream;
use super::join::Join;
use super::memory;
use super::nccl::Clique;
use crate::config::Config;
use crate::decoder::Decoder;
use crate::device;
use crate::error::{Error, Result};
use crate::ranks::{Rank, Sum, on_each};
use cudarc::driver::CudaStream;
use paged_kernels::{CacheShape, Resident, Seats};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// A card's side of the sums over cards: all of them on one stream, so that they come in the same order on each card.
#[derive(Debug)]
pub(crate) struct CardSum {
    clique: Arc<Clique>,
    rank: usize,
    stream: Arc<CudaStream>,
}

impl Rank {
    /// A part on each of the first `count` cards, whose sums NCCL adds. Parts of one model at a time: sums of two that are on
    /// their way over the same cards may wait for each other for ever.
    ///
    /// # Errors
    /// Cards that are not there or not alike; [`Error::Nccl`] and [`Error::NcclCall`].
    pub fn on_cards(count: usize) -> Result<Vec<Self>> {
        let devices = device::cards(count)?;
        let streams = devices.iter().map(|&device| memory::stream(device));
        let streams = streams.collect::<Result<Vec<_>>>()?;
        let bytes = streams.iter().map(|stream| memory::total(stream));
        let bytes = bytes.collect::<Result<Vec<_>>>()?;
        if let Some(card) = bytes.iter().position(|&found| found != bytes[0]) {
            return Err(Error::UnlikeCards { first: bytes[0], card, found: bytes[card] });
        }
        let clique = Arc::new(Clique::new(count)?);
        let rank = |(index, (device, stream))| {
            let sums = Arc::new(CardSum { clique: clique.clone(), rank: index, stream });
            Self::new(index, count, device, sums)
        };
        let ranks: Vec<_> = devices.into_iter().zip(streams).enumerate().map(rank).collect();
        // NCCL takes its memory when cards first meet, for few bytes and for many: before anyone counts what is free.
        for (elements, kind) in MEETINGS {
            on_each(&ranks, |rank| -> Result<()> {
                rank.sum(Tensor::f_zeros([elements], (kind, rank.device()))?).map(drop)
            })?;
        }
        Ok(ranks)
    }
}

/// Elements of the smallest sum of a step, and of a long prompt's.
const MEETINGS: [(i64, Kind); 2] = [(1 << 10, Kind::Float), (1 << 25, Kind::BFloat16)];

impl Sum for CardSum {
    fn sum(&self, part: Tensor) -> Result<Tensor> {
        let part = part.f_contiguous()?;
        memory::after_torch(&self.stream)?;
        self.clique.sum(self.rank, &part, part.numel(), &self.stream)?;
        memory::before_torch(&self.stream)?;
        Ok(part)
    }

    fn give_up(&self) {
        self.clique.give_up();
    }

    fn on_card(&self) -> Option<&CardSum> {
        Some(self)
    }
}

/// A cache for `model` on its card; on the stream of its sums, where it is a part.
///
/// # Errors
/// Those of [`resident`](super::resident).
pub fn resident_for(model: &Decoder, shape: CacheShape, seats: Seats) -> Result<Resident> {
    match model.rank.as_ref().and_then(|rank| rank.sums().on_card()) {
        Some(sums) => Ok(Resident::on(sums.stream.clone(), shape, seats)?),
        None => super::resident(model.embedding.device(), shape, seats),
    }
}

/// What a step of a part does where that of a whole model adds to the residual stream.
pub(super) struct Across {
    join: Join,
    /// What a branch of this part adds, f32 `[columns, hidden]`: in f32 a sum is rounded no more than that of one card, and
    /// so few bytes take no longer than half of them.
    pub part: Tensor,
    width: usize,
    rank: Rank,
}

impl Across {
    /// That of `model`, if it is a part; steps run on the stream of `cache`.
    pub fn new(model: &Decoder, cache: &Resident, columns: usize) -> Result<Option<Self>> {
        let Some(rank) = &model.rank else { return Ok(None) };
        let Config { hidden_size: width, output_bias, .. } = model.config;
        let on_card = rank.sums().on_card();
        if !on_card.is_some_and(|sums| Arc::ptr_eq(&sums.stream, cache.stream())) {
            let what = "sums on another stream than its cache's";
            return Err(Error::Step { what, advice: "make the cache with resident_for" });
        }
        if output_bias {
            let what = "biases of attention's output where a model is cut";
            return Err(Error::Step { what, advice: "run it on one card" });
        }
        let part = Tensor::f_zeros([(columns * width) as i64], (Kind::Float, rank.device()))?;
        let join = Join::load(cache.stream().clone())?;
        Ok(Some(Self { join, part, width, rank: rank.clone() }))
    }

    /// Sums the parts of all ranks, of `columns` texts.
    pub fn sum(&self, columns: usize) -> Result<()> {
        let Some(CardSum { clique, rank, stream }) = self.rank.sums().on_card() else {
            unreachable!("asked when this was made")
        };
        clique.sum(*rank, &self.part, columns * self.width, stream)
    }

    /// Sums them, adds that to the residual stream, and readies it for `norm`.
    pub fn add(&self, stream: Stream<'_>, norm: &Tensor, columns: usize) -> Result<()> {
        self.sum(columns)?;
        self.join.run(&self.part, stream, norm, [columns, self.width])
    }
}
