//! The engine's thread: streams, cancellation, refusal, and its end.

use crate::fake::{Fake, UNREADABLE};
use models::engine::{Engine, Event, Executor, Request};
use models::{Error, Stop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn request(kind: u32, limit: usize) -> Request {
    Request { limit, ..Request::new(vec![kind; 100]) }
}

fn engine() -> Engine {
    let make = || Ok(Fake::slow(Duration::from_micros(200), ()));
    Engine::builder().slice(64).start(make).unwrap()
}

/// Waits, without a bound on how long a slow machine may take, but for ever.
fn until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_of_many_threads_get_their_own_tokens() {
    let engine = engine();
    let wanted = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for kind in 0..6 {
            let (engine, wanted) = (&engine, &wanted);
            scope.spawn(move || {
                let answers = engine.generate([request(kind, 50), request(7, 30)]).finish();
                let [(long, end), (short, other)] = &answers[..] else { panic!("{answers:?}") };
                assert_eq!((long.len(), short.len()), (50, 30));
                assert!(matches!((&end.stop, &other.stop), (Ok(Stop::Length), Ok(Stop::Length))));
                wanted.lock().unwrap().push(short.clone());
            });
        }
    });
    let wanted = wanted.into_inner().unwrap();
    assert!(wanted.iter().all(|tokens| *tokens == wanted[0]), "the same request, the same answer");
    assert!(engine.totals().steps > 0);
}

#[test]
fn tokens_come_as_they_are_written() {
    let engine = engine();
    let mut stream = engine.generate([request(1, 1000)]);
    let first = stream.next().unwrap();
    assert!(matches!(first, (0, Event::Token(_))));
    stream.cancel(0);
    stream.cancel(5); // none of the call's
    let last = stream.last().unwrap();
    let (0, Event::End(end)) = last else { panic!("{last:?}") };
    assert!(matches!(end.stop, Ok(Stop::Caller)));
    assert!(end.usage.written < 1000, "it was stopped on the way");
}

/// Dropped during the reading, after some tokens, with all others: nobody else notices.
#[test]
fn who_stops_listening_is_forgotten() {
    let engine = engine();
    let undisturbed = engine.generate([request(1, 200)]).finish();
    let listener = engine.generate([request(1, 200)]);
    drop(engine.generate([request(2, 2000), request(3, 2000)]));
    let mut stream = engine.generate([request(4, 2000)]);
    (0..3).for_each(|_| drop(stream.next()));
    drop(stream);
    assert_eq!(listener.finish()[0].0, undisturbed[0].0);
    // The dropped ones do not go on behind its back.
    let mut before = engine.totals().steps;
    until(|| {
        std::thread::sleep(Duration::from_millis(20));
        std::mem::replace(&mut before, engine.totals().steps) == engine.totals().steps
    });
    assert!(engine.totals().stepped < 4000);
}

#[test]
fn refusals_and_failures_are_ends_of_their_own() {
    let engine = engine();
    let answers = engine
        .generate([
            Request::new([]),
            request(1, 10),
            request(UNREADABLE, 10),
            Request { limit: 4000, ..request(1, 0) },
        ])
        .finish();
    assert!(matches!(**answers[0].1.stop.as_ref().unwrap_err(), Error::EmptyPrompt));
    assert_eq!(answers[1].0.len(), 10);
    assert!(matches!(
        **answers[2].1.stop.as_ref().unwrap_err(),
        Error::PositionNotFinite { layer: 0 }
    ));
    assert!(matches!(
        **answers[3].1.stop.as_ref().unwrap_err(),
        Error::ContextTooLong { wanted: 4100, limit: 4096 }
    ));
    assert!(engine.generate([]).finish().is_empty());
}

#[test]
fn a_machine_that_cannot_be_made_says_why() {
    let error = Engine::builder().start(|| Err::<Fake, _>(Error::NothingToWrite)).unwrap_err();
    assert!(matches!(error, Error::NothingToWrite));
}

#[test]
fn an_end_that_was_seen_is_counted() {
    let engine = engine();
    for calls in 1..=50 {
        engine.generate([request(1, 1)]).finish();
        assert_eq!(engine.totals().read, 100 * calls);
    }
}

/// Counts those that live.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn an_engine_ends_and_another_starts() {
    let alive = Arc::new(AtomicUsize::new(0));
    for _ in 0..3 {
        alive.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(alive.clone());
        let engine = Engine::builder()
            .start(move || Ok(Fake::slow(Duration::from_millis(1), counted)))
            .unwrap();
        let mut stream = engine.generate([request(1, 3000), request(2, 3000)]);
        assert!(matches!(stream.next(), Some((_, Event::Token(_)))));
        drop(engine);
        assert_eq!(alive.load(Ordering::SeqCst), 0, "its machine is gone");
        let ends = stream.filter_map(|(request, event)| match event {
            Event::End(end) => Some((request, end.stop.unwrap_err())),
            Event::Token(_) => None,
        });
        let ends: Vec<_> = ends.collect();
        assert_eq!(ends.iter().map(|end| end.0).collect::<Vec<_>>(), [0, 1]);
        assert!(ends.iter().all(|(_, error)| matches!(**error, Error::EngineStopped)));
    }
}

#[test]
fn limits_are_the_machines() {
    assert_eq!(engine().limits(), Fake::new(1000).limits());
}
