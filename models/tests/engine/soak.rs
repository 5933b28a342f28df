//! The CPU's machine in random traffic, for a while.

#[path = "../common/soak.rs"]
mod traffic;

use crate::cpu::{alone, half, load, machine, requests};
use anyhow::Result;
use models::engine::CpuExecutor;
use models::{CausalLm, Decoder};
use paged_kernels::PagedAttention;
use rand::Rng;
use traffic::{Soak, Totals, resident};

fn soak(run: &dyn Fn(&Soak<'_, CpuExecutor>) -> Result<Totals>) -> Result<()> {
    let lm = load("kvzap/model")?;
    let requests = requests(lm.config().vocab_size, 30, 60);
    let kinds = requests.into_iter().map(|request| {
        let wanted = alone(&lm, half(&lm, true)?, &request)?;
        Ok((request, wanted))
    });
    run(&Soak {
        kinds: &kinds.collect::<Result<Vec<_>>>()?,
        machine: &|random| {
            let hooks = |lm: &Decoder| half(lm, true);
            machine("kvzap/model", &hooks, random.random_range(120..260))
        },
        pages: &|machine, nothing| {
            let stats = machine.backend().stats();
            assert_eq!(stats.pages_used + stats.pages_free, machine.backend().shape().pages);
            assert!(!nothing || stats.pages_used == 0, "{stats:?}");
        },
        memory: (&resident, 48 << 20),
    })?;
    Ok(())
}

#[test]
fn a_short_soak() -> Result<()> {
    soak(&|soak| soak.run(&mut |answered| answered < 150, 60))
}

#[test]
#[ignore = "takes five minutes, or SOAK_SECONDS"]
fn a_long_soak() -> Result<()> {
    soak(&|soak| soak.long(1000))
}
