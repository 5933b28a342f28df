//! Texts that leave the pool and come back into other pages.

mod common;

use common::{DTYPES, Outputs, Twins, small, view};
use paged_kernels::{CacheShape, Cpu, Dtype, Error, PagedAttention, Sequence};

/// Three texts, two of which share pages, beside a fourth that comes and goes; with `moved` the first leaves the pool
/// after every step, and the fourth takes its pages.
fn life(dtype: Dtype, moved: bool) -> Vec<Outputs> {
    let mut twins = Twins::new(Cpu::new(small(dtype)).unwrap(), 0.5);
    let mut texts = [37, 9].map(|tokens| twins.prompt(tokens)).to_vec();
    texts.push(twins.fork(texts[0]));
    let mut outputs = Vec::new();
    for i in 0..30 {
        let tokens = |text: usize| if i % 7 == text { 6 } else { 1 };
        let step = (0..3).map(|text| (texts[text], tokens(text))).collect::<Vec<_>>();
        outputs.push(twins.step(&step).unwrap());
        let before = twins.backend.stats();
        let suspended = moved.then(|| twins.backend.suspend(texts[0]).unwrap());
        if let Some(suspended) = &suspended {
            let freed = before.pages_used - twins.backend.stats().pages_used;
            assert!(freed > 0 && freed <= suspended.pages());
            assert_eq!(twins.backend.release(texts[0]), Err(Error::UnknownSequence));
        }
        let other = twins.prompt(20 + i);
        if let Some(suspended) = suspended {
            let back = twins.backend.resume(&suspended).unwrap();
            let tokens = twins.texts.remove(&texts[0]).unwrap();
            twins.texts.insert(back, tokens);
            texts[0] = back;
        }
        twins.check_stats();
        twins.release(other);
    }
    texts.into_iter().for_each(|text| twins.release(text));
    assert_eq!(twins.backend.stats().pages_used, 0);
    assert_eq!(twins.backend.stats().reserved_bytes, 0);
    outputs
}

#[test]
fn a_text_that_was_away_gives_the_same_bits() {
    for dtype in DTYPES {
        assert_eq!(life(dtype, true), life(dtype, false), "{dtype:?}");
    }
}

#[test]
fn what_cannot_leave_or_come_back_changes_nothing() {
    let shape = CacheShape { pages: 60, ..small(Dtype::F32) };
    let mut twins = Twins::new(Cpu::new(shape.clone()).unwrap(), 0.0);
    let text = twins.prompt(32);
    let suspended = twins.backend.suspend(text).unwrap();
    assert_eq!((suspended.pages(), suspended.bytes()), (32, 32 * shape.page_bytes()));
    let other = twins.prompt(29);
    let before = twins.backend.stats();
    let error = twins.backend.resume(&suspended).unwrap_err();
    assert_eq!(error, Error::OutOfPages { wanted: 32, free: 28 });
    assert_eq!(twins.backend.stats(), before);

    let mut wider = Cpu::new(CacheShape { head_dim: 32, ..shape.clone() }).unwrap();
    assert_eq!(wider.resume(&suspended), Err(Error::OtherShape));
    let mut larger = Cpu::new(CacheShape { pages: 61, ..shape }).unwrap();
    larger.resume(&suspended).unwrap();

    twins.backend.begin_step(&[(other, 1)]).unwrap();
    assert_eq!(twins.backend.suspend(other).unwrap_err(), Error::StepUnfinished { layer: 0 });
    let rows = vec![0.0; 2 * 16];
    for layer in 0..2 {
        let rows = view(&rows, [2, 1, 16]);
        twins.backend.append(layer, rows, rows, &[false; 2]).unwrap();
    }
    twins.backend.suspend(other).unwrap();
    assert_eq!(twins.backend.suspend(other).unwrap_err(), Error::UnknownSequence);
}

/// What `wanted` says is what a step takes, shared pages and recycled slots included.
#[test]
fn what_a_step_takes_is_known_before() {
    let mut twins = Twins::new(Cpu::new(small(Dtype::F32)).unwrap(), 0.6);
    let text = twins.prompt(37);
    let texts: Vec<Sequence> = vec![text, twins.fork(text), twins.prompt(3)];
    for i in 0..120 {
        let step = [(texts[i % 3], 1 + if i < 60 { 0 } else { i % 6 })];
        let before = twins.backend.stats().pages_used;
        let wanted = twins.backend.wanted(&step).unwrap();
        twins.step(&step).unwrap();
        let used = twins.backend.stats().pages_used;
        // A step after a longer one may also give pages back, which do not count for it.
        assert!(if i < 60 { used == before + wanted } else { used <= before + wanted });
    }
    let twice = twins.backend.wanted(&[(text, 1), (text, 1)]);
    assert_eq!(twice, Err(Error::SequenceTwice));
}
