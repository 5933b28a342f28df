//! A text's rows out of the cache and back: `resident_swap` of kernels/resident.cu.

use super::resident::{RawState, State};
use super::{Device, Room, grid};
use crate::error::Result;

/// A text's rows in host memory.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Of all heads, `[layers, H]`, one after the other, as 32-bit words.
    pages: Vec<u32>,
    rings: Vec<u32>,
    ages: Vec<u32>,
    lens: Vec<u32>,
}

impl Packed {
    pub fn lens(&self) -> &[u32] {
        &self.lens
    }

    pub fn bytes(&self) -> usize {
        (self.pages.len() + self.rings.len() + self.ages.len() + self.lens.len()) * 4
    }
}

impl Device {
    /// A seat's rows, of `lens` `[layers, H]`, which stay where they are.
    pub fn pack(&self, state: &State, seat: usize, lens: Vec<u32>) -> Result<Packed> {
        let (starts, words) = layout(state, &lens);
        let rooms = self.swap(state, seat, &lens, &starts, words, None)?;
        let [pages, rings, ages] = &rooms;
        Ok(Packed {
            pages: self.download(pages, words)?,
            rings: self.download(rings, lens.len() * state.places())?,
            ages: self.download(ages, state.layers)?,
            lens,
        })
    }

    /// Rows that were packed into an empty seat, and pages taken for them.
    pub fn unpack(&self, state: &State, seat: usize, packed: &Packed) -> Result<()> {
        let (starts, words) = layout(state, &packed.lens);
        self.swap(state, seat, &packed.lens, &starts, words, Some(packed))?;
        self.synchronize()
    }

    fn swap(
        &self,
        state: &State,
        seat: usize,
        lens: &[u32],
        starts: &[u32],
        words: usize,
        comes: Option<&Packed>,
    ) -> Result<[Room; 3]> {
        let heads = state.layers * state.kv_heads;
        assert!(lens.len() == heads && seat < state.seats);
        let mut rooms = [
            self.room(words * 4)?,
            self.room(heads * state.places() * 4)?,
            self.room(state.layers * 4)?,
        ];
        if let Some(Packed { pages, rings, ages, .. }) = comes {
            for (data, room) in [pages, rings, ages].into_iter().zip(&mut rooms) {
                self.upload(data, room)?;
            }
        }
        let (mut lens_room, mut starts_room) = (self.room(0)?, self.room(0)?);
        self.upload(lens, &mut lens_room)?;
        self.upload(starts, &mut starts_room)?;
        let call = SwapCall {
            state: state.raw(),
            pages: rooms[0].address,
            rings: rooms[1].address,
            ages: rooms[2].address,
            lens: lens_room.address,
            starts: starts_room.address,
            seat: seat as u32,
            comes: comes.is_some().into(),
        };
        // SAFETY: the state's rooms are of its sizes and the seat exists; the other rooms hold a ring and a length for each
        // head, an age for each layer, and the pages of these lengths, which `starts` counts. They live until the stream
        // has done its work: freeing waits for the card.
        unsafe { self.launch(state.swap(), grid(heads, 0), &call) }?;
        Ok(rooms)
    }
}

/// Pages before each head's, of `lens` rows, and the words of all.
fn layout(state: &State, lens: &[u32]) -> (Vec<u32>, usize) {
    let mut pages = 0;
    let starts = lens.iter().map(|len| {
        let start = pages;
        pages += len.div_ceil(state.pool.page_size);
        start
    });
    let starts = starts.collect();
    (starts, pages as usize * state.page_bytes / 4)
}

/// Mirror of `Swap` in kernels/resident.cu.
#[repr(C)]
pub(super) struct SwapCall {
    state: RawState,
    pages: u64,
    rings: u64,
    ages: u64,
    lens: u64,
    starts: u64,
    seat: u32,
    comes: u32,
}
