//! The card's machine in random traffic, for a while.

#[path = "../../common/soak.rs"]
mod traffic;

use super::engine::{ROOM, alone, machine, requests};
use crate::wide;
use anyhow::Result;
use cudarc::driver::CudaContext;
use models::CardRoom;
use models::engine::Executor;
use rand::Rng;
use traffic::{Soak, resident};

/// Bytes in use on the card and of this process's on the host.
fn used() -> usize {
    let info = CudaContext::new(0).and_then(|card| card.mem_get_info());
    let (free, total) = info.expect("a card");
    total - free + resident()
}

#[test]
#[ignore = "needs a CUDA device; takes five minutes, or SOAK_SECONDS"]
fn a_long_soak() -> Result<()> {
    let folder = tempfile::tempdir()?;
    wide(folder.path())?;
    let requests = requests(30);
    let alone = alone(machine(folder.path(), ROOM)?, &requests)?;
    let kinds: Vec<_> = requests.into_iter().zip(alone).collect();
    let soak = Soak {
        kinds: &kinds,
        machine: &|random| {
            let pages = random.random_range(330..900);
            machine(folder.path(), CardRoom { pages, ..ROOM })
        },
        pages: &|machine, nothing| {
            let (free, all) = (machine.free_pages(), machine.limits().pages);
            assert!(free <= all && (!nothing || free == all), "{free} of {all} pages are free");
        },
        memory: (&used, 256 << 20),
    };
    soak.long(1000)?;
    Ok(())
}
