//! Random arrivals, lengths, cancellations and shortage of pages, for a while: no wrong token, no leak, no stall.

use crate::cpu::{alone, half, load, machine, requests};
use anyhow::Result;
use models::engine::{Event, Request, RequestId, Scheduler, Settings};
use models::{CausalLm, Decoder, Stop};
use paged_kernels::PagedAttention;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What a request wrote so far, and which of the kinds it is.
struct Under {
    kind: usize,
    tokens: Vec<u32>,
    last_heard: usize,
}

/// Resident bytes of this process.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}

/// One machine's life, `until` it ends; says how many requests it answered and how often texts made room.
fn life(
    seed: u64,
    kinds: &[(Request, (Vec<u32>, Stop))],
    until: &mut dyn FnMut(usize) -> bool,
) -> Result<[usize; 3]> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let contexts = random.random_range(0..3);
    let settings = Settings {
        slice: random.random_range(1..80),
        patience: Duration::from_millis(20),
        contexts,
        ..Settings::default()
    };
    let hooks = |lm: &Decoder| half(lm, true);
    let mut scheduler =
        Scheduler::new(machine("kvzap/model", &hooks, random.random_range(120..260))?, settings);
    let pages = scheduler.machine().backend().shape().pages;
    let mut under = BTreeMap::<RequestId, Under>::new();
    let (mut answered, mut cancelled, mut tick) = (0, 0, 0);
    let mut more = true;
    while more || !scheduler.is_idle() {
        more = more && until(answered);
        let now = Duration::from_millis(tick as u64);
        // In bursts, so that it is idle at times and crowded at others.
        if more
            && under.len() < 30
            && random.random_bool(if tick / 200 % 3 == 2 { 0.01 } else { 0.3 })
        {
            let kind = random.random_range(0..kinds.len());
            let request = Request { priority: random.random_range(-1..2), ..kinds[kind].0.clone() };
            let id = scheduler.submit(request, now)?;
            under.insert(id, Under { kind, tokens: Vec::new(), last_heard: tick });
        }
        if random.random_bool(0.02)
            && let Some(&id) = under.keys().nth(random.random_range(0..30))
        {
            assert!(scheduler.cancel(id, now));
            cancelled += 1;
        }
        for (id, event) in scheduler.tick(now) {
            match event {
                Event::Token(token) => {
                    let under = under.get_mut(&id).expect("a token of nobody");
                    under.tokens.push(token);
                    under.last_heard = tick;
                }
                Event::End(end) => {
                    let Under { kind, tokens, .. } = under.remove(&id).expect("an end of nobody");
                    let (_, (wanted, stop)) = &kinds[kind];
                    match end.stop {
                        Ok(Stop::Caller) => assert!(wanted.starts_with(&tokens)),
                        Ok(found) => assert_eq!((&tokens, &found), (wanted, stop), "kind {kind}"),
                        Err(error) => panic!("kind {kind}: {error}"),
                    }
                    answered += 1;
                }
            }
        }
        let stats = scheduler.machine().backend().stats();
        assert_eq!(stats.pages_used + stats.pages_free, pages);
        // Whoever waits behind 30 others of up to 60 tokens has been heard of by then.
        assert!(under.values().all(|under| tick - under.last_heard < 5000), "it stalls");
        tick += 1;
    }
    assert!(under.is_empty());
    let held = scheduler.machine().backend().stats();
    assert!(contexts > 0 || held.pages_used == 0, "{held:?}");
    let totals = scheduler.totals();
    Ok([answered, cancelled, totals.preemptions])
}

/// Lives one after the other, each of them dropped with its machine.
fn soak(until: &mut dyn FnMut(usize) -> bool, each: usize) -> Result<usize> {
    let lm = load("kvzap/model")?;
    let requests = requests(lm.config().vocab_size, 30, 60);
    let kinds = requests.into_iter().map(|request| {
        let wanted = alone(&lm, half(&lm, true)?, &request)?;
        Ok((request, wanted))
    });
    let kinds = kinds.collect::<Result<Vec<_>>>()?;
    let (mut total, mut moved, mut memory) = ([0; 3], 0, None);
    for seed in 0.. {
        if !until(total[0]) {
            break;
        }
        let before = total[0];
        let found =
            life(seed, &kinds, &mut |answered| answered < each && until(before + answered))?;
        total = [total[0] + found[0], total[1] + found[1], total[2] + found[2]];
        moved += usize::from(found[2] > 0);
        // The first lives fill libtorch's and the allocator's own stores.
        if seed == 3 {
            memory = Some(resident());
        }
    }
    let [answered, cancelled, preemptions] = total;
    println!("{answered} answered, {cancelled} of them cancelled, {preemptions} preemptions");
    assert!(cancelled > 0 && preemptions > 0 && moved > 0);
    if let Some(memory) = memory {
        let grown = resident().saturating_sub(memory);
        assert!(grown < 48 << 20, "{grown} bytes more than after four lives");
    }
    Ok(answered)
}

#[test]
fn a_short_soak() -> Result<()> {
    soak(&mut |answered| answered < 150, 60)?;
    Ok(())
}

#[test]
#[ignore = "takes five minutes, or SOAK_SECONDS"]
fn a_long_soak() -> Result<()> {
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok());
    let (start, length) = (Instant::now(), Duration::from_secs(seconds.unwrap_or(300)));
    soak(&mut |_| start.elapsed() < length, 1000)?;
    Ok(())
}
