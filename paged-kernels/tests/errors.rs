//! Every misuse has its own error, and changes nothing.

mod common;

use common::{Twins, small, view};
use half::{bf16, f16};
use paged_kernels::{CacheShape, Cpu, Dtype, Error, PagedAttention, Sequence, View, ViewMut};

fn cache() -> Cpu {
    Cpu::new(small(Dtype::F32)).unwrap()
}

/// `[heads, tokens, 16]` of zeros for a cache of [`small`] shape.
fn fill(cache: &mut Cpu, text: Sequence, layer: usize, tokens: usize) -> Result<(), Error> {
    let rows = vec![0.0; 2 * tokens * 16];
    let rows = view(&rows, [2, tokens, 16]);
    cache.fill(text, layer, rows, rows, &vec![false; 2 * tokens])
}

fn append(cache: &mut Cpu, layer: usize, tokens: usize) -> Result<(), Error> {
    let rows = vec![0.0; 2 * tokens * 16];
    let rows = view(&rows, [2, tokens, 16]);
    cache.append(layer, rows, rows, &vec![false; 2 * tokens])
}

fn attend(cache: &mut Cpu, layer: usize, tokens: usize) -> Result<(), Error> {
    let (queries, mut out) = (vec![0.0; 6 * tokens * 16], vec![0.0; 6 * tokens * 16]);
    let out = ViewMut::new(&mut out[..], [6, tokens, 16])?;
    cache.attend(layer, view(&queries, [6, tokens, 16]), 1.0, out, None)
}

#[test]
fn a_cache_needs_pages_and_a_whole_group() {
    let refused = |shape| match Cpu::new(shape) {
        Err(Error::CacheShape { field, found, .. }) => (field, found),
        other => panic!("{other:?}"),
    };
    let good = || small(Dtype::F32);
    assert_eq!(refused(CacheShape { pages: 0, ..good() }), ("pages", 0));
    assert_eq!(refused(CacheShape { page_size: 0, ..good() }), ("page_size", 0));
    assert_eq!(refused(CacheShape { layers: 0, ..good() }), ("layers", 0));
    assert_eq!(refused(CacheShape { head_dim: 0, ..good() }), ("head_dim", 0));
    assert_eq!(refused(CacheShape { query_heads: 5, ..good() }), ("query_heads", 5));
    assert_eq!(refused(CacheShape { pages: usize::MAX, ..good() }), ("pages", usize::MAX));
    let head_dim = usize::MAX / 4;
    assert_eq!(refused(CacheShape { head_dim, ..good() }), ("pages", 4096));
}

#[test]
fn a_released_sequence_is_refused_also_when_its_place_is_taken() {
    let mut cache = cache();
    let old = cache.allocate().unwrap();
    cache.release(old).unwrap();
    assert_eq!(cache.release(old), Err(Error::UnknownSequence));
    let new = cache.allocate().unwrap();
    assert_ne!(old, new);
    assert_eq!(cache.release(old), Err(Error::UnknownSequence));
    assert_eq!(fill(&mut cache, old, 0, 3), Err(Error::UnknownSequence));
    assert_eq!(cache.begin_step(&[(old, 1)]), Err(Error::UnknownSequence));
    assert_eq!(cache.lengths(old), Err(Error::UnknownSequence));
    assert!(cache.tables(old, 0).is_err());
}

#[test]
fn a_sequence_released_within_a_step_ends_it() {
    let mut cache = cache();
    let (a, b) = (cache.allocate().unwrap(), cache.allocate().unwrap());
    cache.begin_step(&[(a, 1), (b, 1)]).unwrap();
    append(&mut cache, 0, 2).unwrap();
    cache.release(a).unwrap();
    assert_eq!(append(&mut cache, 1, 2), Err(Error::UnknownSequence));
    assert_eq!(attend(&mut cache, 0, 2), Err(Error::UnknownSequence));
    // b's row in layer 1 was never written.
    let c = cache.allocate().unwrap();
    assert_eq!(cache.begin_step(&[(c, 1)]), Err(Error::StepUnfinished { layer: 1 }));
    cache.release(b).unwrap();
    cache.begin_step(&[(c, 1)]).unwrap();
}

#[test]
fn shapes_are_checked() {
    let mut cache = cache();
    let text = cache.allocate().unwrap();
    let data = vec![0.0; 4096];
    let rows = |shape: [usize; 3]| view(&data[..shape.iter().product()], shape);
    let shape = |tensor, expected, found| Err(Error::Shape { tensor, expected, found });
    let length = |argument, expected, found| Err(Error::Length { argument, expected, found });
    let (good, bad) = (rows([2, 3, 16]), rows([3, 3, 16]));
    let (expected, found) = ([2, 3, 16], [3, 3, 16]);
    assert_eq!(cache.fill(text, 0, bad, good, &[false; 6]), shape("keys", expected, found));
    assert_eq!(cache.fill(text, 0, good, bad, &[false; 6]), shape("values", expected, found));
    assert_eq!(cache.fill(text, 0, good, good, &[false; 5]), length("drops", 6, 5));
    cache.begin_step(&[(text, 3)]).unwrap();
    let short = rows([2, 1, 16]);
    assert_eq!(cache.append(0, short, good, &[false; 6]), shape("keys", expected, [2, 1, 16]));
    assert_eq!(cache.append(0, good, short, &[false; 6]), shape("values", expected, [2, 1, 16]));
    assert_eq!(cache.append(0, good, good, &[false; 7]), length("drops", 6, 7));
    for layer in 0..2 {
        append(&mut cache, layer, 3).unwrap();
    }
    let mut out = vec![0.0; 6 * 3 * 16];
    let queries = rows([6, 3, 16]);
    let view = ViewMut::new(&mut out[..96], [2, 3, 16]).unwrap();
    assert_eq!(cache.attend(0, queries, 1.0, view, None), shape("out", [6, 3, 16], expected));
    let view = ViewMut::new(&mut out[..], [6, 3, 16]).unwrap();
    assert_eq!(cache.attend(0, good, 1.0, view, None), shape("queries", [6, 3, 16], expected));
    let view = ViewMut::new(&mut out[..], [6, 3, 16]).unwrap();
    let mut lse = [0.0; 17];
    assert_eq!(cache.attend(0, queries, 1.0, view, Some(&mut lse)), length("lse", 18, 17));
}

#[test]
fn views_are_checked() {
    let data = [0.0f32; 12];
    assert!(View::new(&data[..], [1, 3, 4]).is_ok());
    for shape in [[1, 3, 3], [1, 3, 5], [usize::MAX, 2, 2]] {
        assert!(matches!(View::new(&data[..], shape), Err(Error::Length { found: 12, .. })));
    }
    assert!(View::strided(&data[..], [2, 3, 2], [2, 4]).is_ok());
    assert!(View::strided(&data[..], [2, 3, 2], [3, 4]).is_err());
    assert!(View::strided(&data[..], [2, 3, 2], [usize::MAX, 4]).is_err());
    assert!(View::strided(&data[..0], [0, 3, 2], [6, 2]).is_ok());
    assert!(ViewMut::new(&mut [bf16::ZERO; 3][..], [1, 1, 4]).is_err());
    assert!(View::new(&[f16::ZERO; 5][..], [1, 1, 4]).is_err());
    assert!(ViewMut::new(&mut [f16::ZERO; 3][..], [1, 1, 4]).is_err());
}

#[test]
fn layers_are_checked() {
    let mut cache = cache();
    let text = cache.allocate().unwrap();
    let wrong = Err(Error::Layer { found: 2, layers: 2 });
    assert_eq!(fill(&mut cache, text, 2, 3), wrong);
    cache.begin_step(&[(text, 1)]).unwrap();
    assert_eq!(append(&mut cache, 2, 1), wrong);
    assert_eq!(attend(&mut cache, 2, 1), wrong);
}

#[test]
fn a_layer_is_filled_once_before_the_first_step_and_like_the_others() {
    let mut cache = cache();
    let text = cache.allocate().unwrap();
    fill(&mut cache, text, 1, 3).unwrap();
    assert_eq!(fill(&mut cache, text, 1, 3), Err(Error::FilledTwice { layer: 1 }));
    let differs = Error::TokensDiffer { layer: 0, expected: 3, found: 4 };
    assert_eq!(fill(&mut cache, text, 0, 4), Err(differs));
    assert_eq!(cache.begin_step(&[(text, 1)]), Err(Error::NotFilled { layer: 0 }));
    fill(&mut cache, text, 0, 3).unwrap();
    cache.begin_step(&[(text, 1)]).unwrap();
    assert_eq!(fill(&mut cache, text, 0, 3), Err(Error::FilledLate));
}

#[test]
fn a_step_goes_begin_append_attend() {
    let mut cache = cache();
    let text = cache.allocate().unwrap();
    assert_eq!(append(&mut cache, 0, 1), Err(Error::NoStep));
    assert_eq!(attend(&mut cache, 0, 1), Err(Error::NoStep));
    assert_eq!(cache.begin_step(&[(text, 1), (text, 2)]), Err(Error::SequenceTwice));
    cache.begin_step(&[(text, 1)]).unwrap();
    assert_eq!(attend(&mut cache, 0, 1), Err(Error::NotAppended { layer: 0 }));
    append(&mut cache, 0, 1).unwrap();
    assert_eq!(append(&mut cache, 0, 1), Err(Error::AppendedTwice { layer: 0 }));
    attend(&mut cache, 0, 1).unwrap();
    assert_eq!(cache.begin_step(&[(text, 1)]), Err(Error::StepUnfinished { layer: 1 }));
    append(&mut cache, 1, 1).unwrap();
    cache.begin_step(&[(text, 1)]).unwrap();
}

#[test]
fn out_of_pages_leaves_everybody_as_they_were() {
    // Pages of 4 rows; 2 layers and 2 heads: 16 tokens take 16 pages.
    let shape = CacheShape { pages: 25, ..small(Dtype::F32) };
    let mut twins = Twins::new(Cpu::new(shape).unwrap(), 0.0);
    let (a, b) = (twins.prompt(16), twins.prompt(4));
    let before = twins.backend.stats();
    let refused = |wanted, free| Error::OutOfPages { wanted, free };
    assert_eq!(twins.step(&[(b, 1), (a, 1)]), Err(refused(8, 5)));
    assert_eq!(twins.step(&[(b, usize::MAX)]).err(), Some(refused(usize::MAX - 3, 5)));
    let c = twins.allocate();
    assert_eq!(twins.fill(c, 9), Err(refused(6, 5)));
    assert_eq!(twins.backend.stats(), before);
    // The others go on as if nothing had been, and a release is enough to try again.
    twins.step(&[(b, 1)]).unwrap();
    twins.release(a);
    twins.fill(c, 9).unwrap();
    twins.step(&[(b, 1), (c, 2)]).unwrap();
    twins.check_stats();
}

#[test]
fn errors_end_in_advice() {
    let error = Error::OutOfPages { wanted: 12, free: 3 };
    let expected =
        "wanted 12 pages, 3 are free; release a sequence or build the cache with more pages";
    assert_eq!(error.to_string(), expected);
}
