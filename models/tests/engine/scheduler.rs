//! The scheduler on a machine without a model: who gets what, when, and what never happens.

use crate::fake::{Fake, POISON, UNIT, UNREADABLE, VOCABULARY, token};
use models::engine::{Admission, End, Event, Request, RequestId, Scheduler, Settings};
use models::{Error, Sampling, Stop};
use proptest::prelude::*;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

fn at(tick: usize) -> Duration {
    Duration::from_millis(tick as u64)
}

fn request(context: &[u32], question: &[u32], limit: usize) -> Request {
    Request { question: question.to_vec(), limit, ..Request::new(context) }
}

/// What a request gets when nobody else is there.
fn alone(request: &Request) -> (Vec<u32>, Option<Stop>) {
    let prompt = [&request.context[..], &request.question].concat();
    if request.context[0] == UNREADABLE {
        return (Vec::new(), None);
    }
    let mut tokens = Vec::new();
    for index in 0..request.limit as u32 {
        if prompt.last() == Some(&POISON) && index == 3 {
            return (tokens, None);
        }
        let token = token(&prompt, request.sampling.seed, index);
        if request.stop.contains(&token) {
            return (tokens, Some(Stop::Token(token)));
        }
        tokens.push(token);
    }
    (tokens, Some(Stop::Length))
}

#[derive(Default)]
struct Log {
    tokens: BTreeMap<RequestId, Vec<u32>>,
    ends: BTreeMap<RequestId, (usize, End)>,
    ticks: usize,
}

impl Log {
    /// Ticks once, and holds the scheduler to what it promises of every tick.
    fn tick(&mut self, scheduler: &mut Scheduler<Fake>) {
        let (steps, moved) = (scheduler.machine().steps, scheduler.totals().preemptions);
        self.ticks += 1;
        for (id, event) in scheduler.tick(|| at(self.ticks)) {
            match event {
                Event::Token(token) => {
                    assert!(!self.ends.contains_key(&id), "a token after the end");
                    self.tokens.entry(id).or_default().push(token);
                }
                Event::End(end) => {
                    assert!(self.ends.insert(id, (self.ticks, end)).is_none(), "two ends");
                }
            }
        }
        assert!(scheduler.totals().preemptions - moved <= 1, "more than one preemption a tick");
        assert!(scheduler.machine().steps - steps <= 1);
    }

    fn run(&mut self, scheduler: &mut Scheduler<Fake>) {
        while !scheduler.is_idle() {
            self.tick(scheduler);
            assert!(self.ticks < 100_000, "it does not end");
        }
        assert_eq!(scheduler.machine().used(), 0, "pages are left behind");
        assert_eq!(scheduler.machine().texts(), 0, "texts are left behind");
    }

    fn check(&self, id: RequestId, request: &Request) {
        let (tokens, stop) = alone(request);
        let found = self.tokens.get(&id).cloned().unwrap_or_default();
        assert_eq!(found, tokens, "not what it gets alone");
        let (_, end) = &self.ends[&id];
        assert_eq!(end.stop.as_ref().ok(), stop.as_ref());
        assert_eq!(end.usage.written, tokens.len());
    }

    fn end(&self, id: RequestId) -> &End {
        &self.ends[&id].1
    }
}

#[derive(Clone, Debug)]
struct Arrival {
    tick: usize,
    request: Request,
    cancelled: Option<usize>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    // Few contexts, so that they are shared; of one, a failure.
    let context = (0..6u32, 1..200usize);
    let question = prop::collection::vec(0..VOCABULARY, 0..20);
    let stop = prop::collection::vec(0..VOCABULARY, 0..3);
    let cancelled = prop::option::weighted(0.2, 0..60usize);
    (0..150usize, context, question, 1..60usize, stop, 0..3u64, -1..2i8, cancelled).prop_map(
        |(tick, (kind, tokens), question, limit, stop, seed, priority, cancelled)| {
            let kind = if kind == 5 { UNREADABLE } else { kind };
            let tokens = if kind < 3 { 50 * kind as usize + 20 } else { tokens };
            let sampling = Sampling { seed, ..Sampling::default() };
            let request = Request {
                stop,
                sampling,
                priority,
                ..request(&vec![kind; tokens], &question, limit)
            };
            Arrival { tick, request, cancelled: cancelled.map(|after| tick + after) }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Arrivals, lengths, cancellations, faults and shortage of pages as they come: nothing is refused on the way, nobody
    /// stalls, each gets what it gets alone, all pages come back. What the machine takes is checked by the machine.
    #[test]
    fn everybody_gets_what_they_would_get_alone(
        arrivals in prop::collection::vec(arrival(), 1..40),
        (pages, seats, batch) in (60..200usize, 1..9usize, 1..6usize),
        keep in prop_oneof![Just(100), 20..100usize],
        late in any::<bool>(),
        (slice, contexts) in (1..300usize, 0..3usize),
    ) {
        let mut fake = Fake::new(pages);
        (fake.limits.seats, fake.limits.batch, fake.keep, fake.late) = (seats, batch, keep, late);
        let patience = at(50);
        let settings = Settings { slice, contexts, patience, ..Settings::default() };
        let mut scheduler = Scheduler::new(fake, settings);
        let mut log = Log::default();
        let mut accepted = BTreeMap::new();
        let mut work = 0;
        for tick in 0..400 {
            for arrival in arrivals.iter().filter(|arrival| arrival.tick == tick) {
                match scheduler.submit(arrival.request.clone(), at(tick)) {
                    Ok(id) => {
                        let request = &arrival.request;
                        work += request.limit + request.question.len() + request.context.len() / slice + 4;
                        accepted.insert(id, arrival);
                    }
                    Err(error) => {
                        let fits = matches!(error, Error::NeverFits { wanted, .. } if wanted > pages);
                        prop_assert!(fits, "{error}");
                    }
                }
            }
            for (&id, arrival) in &accepted {
                if arrival.cancelled == Some(tick) {
                    let held = scheduler.machine().used();
                    let living = scheduler.cancel(id, at(tick));
                    prop_assert_eq!(living, !log.ends.contains_key(&id));
                    prop_assert!(scheduler.machine().used() <= held);
                }
            }
            log.tick(&mut scheduler);
        }
        // One text at a time would take no longer than that.
        while !scheduler.is_idle() {
            log.tick(&mut scheduler);
            prop_assert!(log.ticks < 400 + 4 * work, "it stalls");
        }
        for (&id, arrival) in &accepted {
            if matches!(log.end(id).stop, Ok(Stop::Caller)) {
                prop_assert!(arrival.cancelled.is_some());
                let (tokens, _) = alone(&arrival.request);
                let found = log.tokens.get(&id).cloned().unwrap_or_default();
                prop_assert!(tokens.starts_with(&found));
            } else {
                log.check(id, &arrival.request);
            }
        }
        prop_assert!(scheduler.machine().texts() <= contexts);
        if contexts == 0 {
            prop_assert_eq!(scheduler.machine().used(), 0);
        }
    }
}

#[test]
fn what_can_never_fit_is_refused_with_its_numbers_and_holds_nobody_up() {
    let mut scheduler = Scheduler::new(Fake::new(64), Settings::default());
    // 22 pages of each of three heads: 66.
    let error = scheduler.submit(request(&[1; 300], &[], 52), at(0)).unwrap_err();
    let Error::NeverFits { tokens: 352, wanted: 66, free: 64, pages: 64 } = error else {
        panic!("{error}")
    };
    let small = request(&[1; 300], &[], 36);
    let id = scheduler.submit(small.clone(), at(0)).unwrap();
    let mut log = Log::default();
    log.run(&mut scheduler);
    log.check(id, &small);
}

#[test]
fn two_that_fit_singly_but_not_together_both_end() {
    let mut scheduler = Scheduler::new(Fake::new(64), Settings::default());
    let requests = [1, 2].map(|kind| request(&[kind; 140], &[], 180));
    let ids = requests.clone().map(|request| scheduler.submit(request, at(0)).unwrap());
    let mut log = Log::default();
    log.run(&mut scheduler);
    for (id, request) in ids.into_iter().zip(&requests) {
        log.check(id, request);
    }
    let moved = scheduler.totals().preemptions;
    assert!(
        (1..=3).contains(&moved),
        "{moved} preemptions: it must give way, and not again and again"
    );
}

/// The second is read in slices while the first writes: what the first takes meanwhile must not be what the second was
/// promised, and what is short at last is the second's.
#[test]
fn who_came_first_is_not_moved_away() {
    let settings = Settings { slice: 1, ..Settings::default() };
    let mut scheduler = Scheduler::new(Fake::new(64), settings);
    let requests = [request(&[1; 20], &[], 300), request(&[2; 220], &[], 90)];
    let ids = requests.clone().map(|request| scheduler.submit(request, at(0)).unwrap());
    let mut log = Log::default();
    log.run(&mut scheduler);
    for (id, request) in ids.iter().zip(&requests) {
        log.check(*id, request);
    }
    let moved = ids.map(|id| log.end(id).usage.preemptions);
    assert!(moved[0] == 0 && moved[1] > 0, "{moved:?}");
}

#[test]
fn who_hoped_in_vain_ends_with_the_numbers_and_the_others_go_on() {
    let settings = Settings { admission: Admission::Hopeful, ..Settings::default() };
    let mut scheduler = Scheduler::new(Fake::new(64), settings);
    let large = scheduler.submit(request(&[1; 300], &[], 100), at(0)).unwrap();
    let small = request(&[2; 30], &[], 20);
    let id = scheduler.submit(small.clone(), at(0)).unwrap();
    let mut log = Log::default();
    log.run(&mut scheduler);
    log.check(id, &small);
    let error = log.end(large).stop.clone().unwrap_err();
    let Error::TextOutOfPages { tokens, held, free, pages: 64 } = *error else { panic!("{error}") };
    assert!(tokens > 330 && held > 60 && free < UNIT, "{error}");
    let tokens = &log.tokens[&large];
    assert_eq!(tokens[..], alone(&request(&[1; 300], &[], tokens.len())).0);
}

#[test]
fn a_context_is_read_once_for_all_who_begin_with_it() {
    let mut scheduler = Scheduler::new(Fake::new(1000), Settings::default());
    let requests: Vec<_> = (0..6u32)
        .map(|i| Request {
            sampling: Sampling { seed: 7, ..Sampling::default() },
            ..request(&[1; 200], if i % 2 == 0 { &[5, 6] } else { &[] }, 30)
        })
        .collect();
    let ids: Vec<_> =
        requests.iter().map(|r| scheduler.submit(r.clone(), at(0)).unwrap()).collect();
    // Differs in its last token only.
    let mut other = vec![1; 200];
    other[199] = 2;
    let other = request(&other, &[], 30);
    let stranger = scheduler.submit(other.clone(), at(0)).unwrap();
    let mut log = Log::default();
    log.run(&mut scheduler);
    for (id, request) in ids.iter().zip(&requests) {
        log.check(*id, request);
    }
    log.check(stranger, &other);
    assert_eq!(scheduler.totals().read, 2 * 200 + 3 * 2);
    assert_eq!(scheduler.totals().shared, 5);
    assert_eq!(ids.iter().map(|&id| log.end(id).usage.shared).sum::<usize>(), 5 * 200);
}

#[test]
fn contexts_are_kept_as_long_as_told_and_pages_allow() {
    let settings = Settings { contexts: 1, ..Settings::default() };
    let mut scheduler = Scheduler::new(Fake::new(64), settings);
    let mut log = Log::default();
    let mut ask = |kind: u32, tokens: usize| {
        let request = request(&vec![kind; tokens], &[3], 10);
        let id = scheduler.submit(request.clone(), at(log.ticks)).unwrap();
        while !scheduler.is_idle() {
            log.tick(&mut scheduler);
        }
        log.check(id, &request);
        (log.end(id).usage.shared, scheduler.machine().texts())
    };
    assert_eq!(ask(1, 100), (0, 1));
    assert_eq!(ask(1, 100), (100, 1), "it is still there");
    assert_eq!(ask(2, 100), (0, 1), "one is kept");
    assert_eq!(ask(1, 100), (0, 1));
    // The whole pool is needed, and what is only kept goes.
    assert_eq!(ask(3, 300), (0, 1));
    assert_eq!(ask(1, 100), (0, 1));
}

#[test]
fn contexts_that_are_only_kept_go_before_anybody_waits() {
    let settings = Settings { contexts: 2, ..Settings::default() };
    let mut scheduler = Scheduler::new(Fake::new(64), settings);
    let mut log = Log::default();
    let mut texts = Vec::new();
    for (kind, tokens, limit) in [(1, 100, 10), (2, 60, 200), (3, 60, 10)] {
        let request = request(&vec![kind; tokens], &[], limit);
        let id = scheduler.submit(request.clone(), at(log.ticks)).unwrap();
        while !scheduler.is_idle() {
            log.tick(&mut scheduler);
        }
        log.check(id, &request);
        texts.push(scheduler.machine().texts());
    }
    assert_eq!(texts, [1, 1, 2], "the first went for the answer to the second");
}

#[test]
fn nobody_steps_who_has_drawn_all_that_was_asked_for() {
    for late in [false, true] {
        let mut fake = Fake::new(64);
        fake.late = late;
        let mut scheduler = Scheduler::new(fake, Settings::default());
        for limit in [1, 2, 10] {
            scheduler.submit(request(&[1; 20], &[], limit), at(0)).unwrap();
        }
        Log::default().run(&mut scheduler);
        assert_eq!(scheduler.totals().stepped, 1 + 9, "the first token is drawn without a step");
    }
}

#[test]
fn a_priority_goes_first_and_nobody_waits_for_ever() {
    let mut fake = Fake::new(1000);
    fake.limits.batch = 1;
    let settings = Settings { patience: at(300), ..Settings::default() };
    let mut scheduler = Scheduler::new(fake, settings);
    let low = request(&[1; 10], &[], 20);
    let running = scheduler.submit(low.clone(), at(0)).unwrap();
    let mut log = Log::default();
    log.tick(&mut scheduler);
    let waiting = scheduler.submit(low.clone(), at(1)).unwrap();
    // From now on somebody of higher priority always waits.
    let high = Request { priority: 1, ..low.clone() };
    let mut highs = Vec::new();
    while !log.ends.contains_key(&waiting) {
        assert!(log.ticks < 1000, "it starves");
        highs.push(scheduler.submit(high.clone(), at(log.ticks)).unwrap());
        for _ in 0..10 {
            log.tick(&mut scheduler);
        }
    }
    let ended = |id| log.ends[&id].0;
    assert!(ended(running) > ended(highs[0]), "the one that was writing gave way");
    assert_eq!(log.end(running).usage.preemptions, 1);
    assert!(ended(waiting) > 300, "it waited while others were ahead by its patience");
    for id in highs {
        scheduler.cancel(id, at(log.ticks));
    }
    log.run(&mut scheduler);
    log.check(running, &low);
    log.check(waiting, &low);
}

#[test]
fn cancelled_wherever_it_stands_its_pages_are_back_at_once() {
    let settings = Settings { slice: 40, ..Settings::default() };
    let mut seen = [false; 3];
    for tick in 0..60 {
        let mut scheduler = Scheduler::new(Fake::new(64), settings.clone());
        let other = request(&[2; 100], &[4], 90);
        let other_id = scheduler.submit(other.clone(), at(0)).unwrap();
        let id = scheduler.submit(request(&[1; 100], &[1, 2], 90), at(0)).unwrap();
        let mut log = Log::default();
        (0..tick).for_each(|_| log.tick(&mut scheduler));
        let before = scheduler.machine().used();
        assert!(scheduler.cancel(id, at(tick)) && !scheduler.cancel(id, at(tick)));
        let freed = before - scheduler.machine().used();
        let written = log.tokens.contains_key(&id);
        seen = [seen[0] | (freed == 0), seen[1] | (freed > 0 && !written), seen[2] | written];
        log.run(&mut scheduler);
        log.check(other_id, &other);
        assert!(matches!(log.end(id).stop, Ok(Stop::Caller)));
    }
    assert_eq!(seen, [true; 3], "while it waited, while it was read, and while it wrote");
}

#[test]
fn what_is_wrong_with_one_text_is_its_own_affair() {
    let mut scheduler = Scheduler::new(Fake::new(200), Settings::default());
    let requests = [
        request(&[1; 40], &[POISON], 30),
        request(&[1; 40], &[2], 30),
        request(&[UNREADABLE; 40], &[], 30),
        request(&[3; 40], &[], 30),
    ];
    let ids = requests.clone().map(|request| scheduler.submit(request, at(0)).unwrap());
    let mut log = Log::default();
    log.run(&mut scheduler);
    for (id, request) in ids.iter().zip(&requests) {
        log.check(*id, request);
    }
    assert!(matches!(*log.end(ids[0]).stop.clone().unwrap_err(), Error::NoLogits));
    assert!(matches!(
        *log.end(ids[2]).stop.clone().unwrap_err(),
        Error::PositionNotFinite { layer: 0 }
    ));
}

#[test]
fn a_lost_machine_ends_everybody_with_its_error() {
    for tick in 0..12 {
        let mut fake = Fake::new(64);
        fake.late = tick % 2 == 1;
        let mut scheduler = Scheduler::new(fake, Settings { slice: 40, ..Settings::default() });
        for kind in 0..4 {
            scheduler.submit(request(&[kind; 100], &[], 30), at(0)).unwrap();
        }
        let mut log = Log::default();
        (0..tick).for_each(|_| log.tick(&mut scheduler));
        scheduler.machine_mut().lost = true;
        while !scheduler.is_idle() {
            log.tick(&mut scheduler);
            assert!(log.ticks < 100);
        }
        assert_eq!(log.ends.len(), 4);
        for (_, end) in log.ends.values() {
            let error = end.stop.clone().unwrap_err();
            assert!(matches!(*error, Error::EngineStopped), "{error}");
        }
    }
}

#[test]
fn a_request_that_begins_and_answers_in_one_tick_has_taken_its_time() {
    let mut scheduler = Scheduler::new(Fake::new(64), Settings::default());
    scheduler.submit(request(&[1; 10], &[], 1), at(0)).unwrap();
    let asked = Cell::new(0);
    let events = scheduler.tick(|| {
        asked.set(asked.get() + 1);
        at(asked.get())
    });
    let Some((_, Event::End(end))) = events.last() else { panic!("{events:?}") };
    assert_eq!(end.usage.waited, at(1));
    assert_eq!(end.usage.to_first, at(asked.get() - 1));
}

#[test]
fn senseless_requests_are_refused() {
    let mut scheduler = Scheduler::new(Fake::new(10_000), Settings::default());
    let mut refused = |request| scheduler.submit(request, at(0)).unwrap_err();
    assert!(matches!(refused(request(&[], &[1], 3)), Error::EmptyPrompt));
    assert!(matches!(refused(request(&[1], &[], 0)), Error::NothingToWrite));
    assert!(matches!(refused(request(&[97], &[], 3)), Error::UnknownToken { id: 97, .. }));
    assert!(matches!(refused(request(&[1], &[99], 3)), Error::UnknownToken { id: 99, .. }));
    assert!(matches!(
        refused(request(&[1; 4000], &[], 97)),
        Error::ContextTooLong { wanted: 4097, limit: 4096 }
    ));
    assert!(matches!(
        refused(request(&[1], &[1; 65], 3)),
        Error::QuestionTooLong { found: 65, most: 64 }
    ));
    let sampling = Sampling { top_p: 0.0, ..Sampling::default() };
    let senseless = Request { sampling, ..request(&[1], &[], 3) };
    assert!(matches!(refused(senseless), Error::Sampling { .. }));
    assert!(matches!(refused(request(&[1], &[], usize::MAX)), Error::ContextTooLong { .. }));
    assert!(scheduler.is_idle());
}
