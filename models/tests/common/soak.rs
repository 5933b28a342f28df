//! Random arrivals, lengths, cancellations, shortage of pages, and machines that are gone with work under way: no wrong token,
//! no leak, no stall.

use anyhow::Result;
use models::Stop;
use models::engine::{Event, Executor, Request, RequestId, Scheduler, Settings};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What is asked, and of what machines.
pub struct Soak<'a, E> {
    /// Requests, and what each gets alone.
    pub kinds: &'a [(Request, (Vec<u32>, Stop))],
    /// A machine of some size.
    pub machine: &'a dyn Fn(&mut ChaCha8Rng) -> Result<E>,
    /// After each tick, and whether nothing is held any more: what must hold of its pages.
    pub pages: &'a dyn Fn(&E, bool),
    /// Bytes in use by now, where the machine's memory is, and by how many they may grow.
    pub memory: (&'a dyn Fn() -> usize, usize),
}

/// What a request wrote so far, and which of the kinds it is.
struct Under {
    kind: usize,
    tokens: Vec<u32>,
    last_heard: usize,
}

/// Sums over lives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub answered: usize,
    pub cancelled: usize,
    pub preemptions: usize,
    pub killed: usize,
    pub lives: usize,
}

impl<E: Executor> Soak<'_, E> {
    /// One machine's life, `until` it ends: each third is dropped where it stands, with all that it was doing.
    fn life(&self, seed: u64, until: &mut dyn FnMut(usize) -> bool) -> Result<Totals> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // Where none is kept for others to come, all pages are free at the end: in every other life.
        let contexts = [0, 1, 0, 2][seed as usize % 4];
        let settings = Settings {
            slice: random.random_range(1..80),
            patience: Duration::from_millis(20),
            contexts,
            ..Settings::default()
        };
        let mut scheduler = Scheduler::new((self.machine)(&mut random)?, settings);
        let mut under = BTreeMap::<RequestId, Under>::new();
        let mut totals = Totals { lives: 1, ..Totals::default() };
        let (mut tick, mut more) = (0, true);
        while more || !scheduler.is_idle() {
            more = more && until(totals.answered);
            if !more && seed % 3 == 2 && !scheduler.is_idle() {
                totals.killed = 1;
                break;
            }
            let now = Duration::from_millis(tick as u64);
            // In bursts, so that it is idle at times and crowded at others.
            let often = if tick / 200 % 3 == 2 { 0.01 } else { 0.3 };
            if more && under.len() < 30 && random.random_bool(often) {
                let kind = random.random_range(0..self.kinds.len());
                let priority = random.random_range(-1..2);
                let request = Request { priority, ..self.kinds[kind].0.clone() };
                let id = scheduler.submit(request, now)?;
                under.insert(id, Under { kind, tokens: Vec::new(), last_heard: tick });
            }
            if random.random_bool(0.02)
                && let Some(&id) = under.keys().nth(random.random_range(0..30))
            {
                assert!(scheduler.cancel(id, now));
                totals.cancelled += 1;
            }
            for (id, event) in scheduler.tick(|| now) {
                match event {
                    Event::Token(token) => {
                        let under = under.get_mut(&id).expect("a token of nobody");
                        under.tokens.push(token);
                        under.last_heard = tick;
                    }
                    Event::End(end) => {
                        let Under { kind, tokens, .. } =
                            under.remove(&id).expect("an end of nobody");
                        let (_, (wanted, stop)) = &self.kinds[kind];
                        match end.stop {
                            Ok(Stop::Caller) => assert!(wanted.starts_with(&tokens)),
                            Ok(found) => {
                                assert_eq!((&tokens, &found), (wanted, stop), "kind {kind}");
                            }
                            Err(error) => panic!("kind {kind}: {error}"),
                        }
                        totals.answered += 1;
                    }
                }
            }
            let nothing = contexts == 0 && scheduler.is_idle();
            (self.pages)(scheduler.machine(), nothing);
            // Whoever waits behind 30 others has been heard of by then.
            assert!(under.values().all(|under| tick - under.last_heard < 5000), "it stalls");
            tick += 1;
        }
        assert!(totals.killed == 1 || under.is_empty());
        totals.preemptions = scheduler.totals().preemptions;
        Ok(totals)
    }

    /// Lives one after the other, of about `each` answers, each of them dropped with its machine.
    pub fn run(&self, until: &mut dyn FnMut(usize) -> bool, each: usize) -> Result<Totals> {
        let (mut total, mut first) = (Totals::default(), None);
        for seed in 0.. {
            if !until(total.answered) {
                break;
            }
            let before = total.answered;
            let until = &mut |answered| answered < each && until(before + answered);
            let found = self.life(seed, until)?;
            total.answered += found.answered;
            total.cancelled += found.cancelled;
            total.preemptions += found.preemptions;
            total.killed += found.killed;
            total.lives += 1;
            // The first lives fill libtorch's and the allocator's own stores.
            if seed == 5 {
                first = Some((self.memory.0)());
            }
        }
        let now = (self.memory.0)();
        println!("{total:?}; {first:?} bytes after six lives, {now} at the end");
        assert!(total.cancelled > 0 && total.preemptions > 0);
        if let Some(first) = first {
            let grown = now.saturating_sub(first);
            assert!(grown < self.memory.1, "{grown} bytes more than after six lives");
            assert!(total.killed > 0);
        }
        Ok(total)
    }

    /// The same for five minutes, or SOAK_SECONDS.
    pub fn long(&self, each: usize) -> Result<Totals> {
        let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok());
        let (start, length) = (Instant::now(), Duration::from_secs(seconds.unwrap_or(300)));
        self.run(&mut |_| start.elapsed() < length, each)
    }
}

/// Resident bytes of this process.
pub fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}
