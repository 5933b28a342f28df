//! Random lives of several texts on both backends, beside dense attention; and what must not change a bit.

mod common;

#[cfg(feature = "cuda")]
use common::on_card::OnCard;
use common::{DTYPES, Outputs, Twins, small};
#[cfg(feature = "cuda")]
use paged_kernels::Cuda;
use paged_kernels::{CacheShape, Cpu, Dtype, Error, PagedAttention, Reference, Sequence};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Operation {
    /// A text with a prompt.
    Begin(usize),
    /// Tokens for the living texts, in turn.
    Step(Vec<usize>),
    /// A second text that goes on from where one of them is.
    Fork(usize),
    /// The end of one of them.
    End(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        2 => (0usize..40).prop_map(Operation::Begin),
        6 => prop::collection::vec(0usize..3, 1..4).prop_map(Operation::Step),
        1 => prop::collection::vec(0usize..20, 1..4).prop_map(Operation::Step),
        1 => (0usize..8).prop_map(Operation::Fork),
        1 => (0usize..8).prop_map(Operation::End),
    ]
}

fn live<B: PagedAttention>(backend: B, drop: f64, operations: &[Operation]) {
    let taken = backend.stats().reserved_bytes;
    let mut twins = Twins::new(backend, drop);
    let mut texts = Vec::<Sequence>::new();
    for operation in operations {
        let before = twins.backend.stats();
        match operation {
            Operation::Begin(tokens) => {
                let text = twins.allocate();
                match twins.fill(text, *tokens) {
                    Ok(()) => texts.push(text),
                    // Layers before the one that failed stay filled until the release.
                    Err(error) => {
                        assert!(matches!(error, Error::OutOfPages { .. }));
                        twins.release(text);
                    }
                }
            }
            Operation::Step(tokens) => {
                let step = texts.iter().copied().zip(tokens.iter().copied()).collect::<Vec<_>>();
                if let Err(error) = twins.step(&step) {
                    assert!(matches!(error, Error::OutOfPages { .. }));
                    assert_eq!(twins.backend.stats(), before, "nothing changes");
                }
            }
            Operation::Fork(choice) if !texts.is_empty() => {
                let fork = twins.fork(texts[choice % texts.len()]);
                texts.push(fork);
                let used = twins.backend.stats().pages_used;
                assert_eq!(used, before.pages_used, "a fork takes no page");
            }
            Operation::End(choice) if !texts.is_empty() => {
                let text = texts.swap_remove(choice % texts.len());
                twins.release(text);
                assert_eq!(twins.backend.release(text), Err(Error::UnknownSequence));
            }
            Operation::Fork(_) | Operation::End(_) => {}
        }
        twins.check_stats();
    }
    texts.into_iter().for_each(|text| twins.release(text));
    let stats = twins.backend.stats();
    assert_eq!((stats.pages_used, stats.rows, stats.reserved_bytes), (0, 0, taken));
}

/// What varies: the share that drops, the shape, and what happens.
fn lives() -> impl Strategy<Value = (f64, CacheShape, Vec<Operation>)> {
    let page_size = prop::sample::select(vec![1, 3, 4, 16]);
    let operations = prop::collection::vec(operation(), 1..24);
    let dtype = prop::sample::select(DTYPES.to_vec());
    (0.0..=1.0, page_size, 20usize..120, dtype, operations).prop_map(
        |(drop, page_size, pages, dtype, operations)| {
            (drop, CacheShape { page_size, pages, ..small(dtype) }, operations)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_lives_equal_dense_attention((drop, shape, operations) in lives()) {
        live(Reference::new(shape.clone()).unwrap(), drop, &operations);
        live(Cpu::new(shape).unwrap(), drop, &operations);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        #[ignore = "needs a CUDA device"]
        fn random_lives_equal_dense_attention((drop, shape, operations) in lives()) {
            live(Cuda::new(shape).unwrap(), drop, &operations);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        // With pages enough: where there are none, `Resident` counts them and gives no error.
        #[test]
        #[ignore = "needs a CUDA device"]
        fn random_lives_on_the_cards_own_books_equal_dense_attention((drop, shape, operations) in lives()) {
            live(OnCard::new(CacheShape { pages: 1 << 12, ..shape }).unwrap(), drop, &operations);
        }
    }

    fn cache() -> Cuda {
        Cuda::new(many()).unwrap()
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn forks_share_a_prompt() {
        check_forks(cache());
        check_forks(OnCard::new(many()).unwrap());
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn neither_neighbours_nor_page_numbers_nor_runs_change_a_bit() {
        let alone = outputs(cache(), &[], 0);
        assert_eq!(alone, outputs(cache(), &[], 0));
        assert_eq!(alone, outputs(cache(), &[1, 3000, 40], 0));
        assert_eq!(alone, outputs(cache(), &[], 9));
    }
}

/// Tokens enough that `Cpu` cuts heads into segments and calls for help.
fn long() -> CacheShape {
    let (layers, kv_heads, query_heads, head_dim) = (1, 3, 9, 64);
    CacheShape { layers, kv_heads, query_heads, head_dim, page_size: 16, ..small(Dtype::F32) }
}

fn many() -> CacheShape {
    CacheShape { pages: 1 << 14, ..long() }
}

fn threads(threads: usize) -> Cpu {
    Cpu::with_threads(many(), threads).unwrap()
}

/// What one text gives, with `neighbours` of other lengths around it and `gaps` in the pool.
fn outputs<B: PagedAttention>(backend: B, neighbours: &[usize], gaps: usize) -> Vec<Outputs> {
    let mut twins = Twins::new(backend, 0.3);
    let gaps = (0..gaps).map(|_| (twins.prompt(17), twins.prompt(33))).collect::<Vec<_>>();
    let neighbours = neighbours.iter().map(|&tokens| twins.prompt(tokens)).collect::<Vec<_>>();
    gaps.iter().for_each(|(text, _)| twins.release(*text));
    // Its own data must not depend on theirs.
    twins.noise = common::Noise(12345);
    let text = twins.prompt(2500);
    let mut outputs = Vec::new();
    for tokens in [1, 1, 12, 1] {
        let mut step = vec![(text, tokens)];
        outputs.push(only(&mut twins, &mut step, &neighbours));
    }
    outputs
}

/// Steps `step` and one token for each neighbour; the outputs of the first text alone.
fn only<B: PagedAttention>(
    twins: &mut Twins<B>,
    step: &mut Vec<(Sequence, usize)>,
    neighbours: &[Sequence],
) -> Outputs {
    let (text, tokens) = step[0];
    step.extend(neighbours.iter().map(|&neighbour| (neighbour, 1)));
    let total: usize = step.iter().map(|(_, tokens)| tokens).sum();
    twins.backend.begin_step(step).unwrap();
    let CacheShape { kv_heads, query_heads, head_dim, .. } = *twins.backend.shape();
    // [heads, total, D] whose first `tokens` of each head are the text's own.
    let seed = twins.backend.lengths(text).unwrap()[0] as u64;
    let rows = |heads: usize, salt: u64| {
        let mut own = common::Noise(seed * 8 + salt);
        let mut rows = vec![0.5; heads * total * head_dim];
        for head in rows.chunks_exact_mut(total * head_dim) {
            head[..tokens * head_dim].copy_from_slice(&own.floats(tokens * head_dim));
        }
        rows
    };
    let (keys, values, queries) = (rows(kv_heads, 1), rows(kv_heads, 2), rows(query_heads, 3));
    let shape = [kv_heads, total, head_dim];
    let views = (common::view(&keys, shape), common::view(&values, shape));
    twins.backend.append(0, views.0, views.1, &vec![true; kv_heads * total]).unwrap();
    let (out, lse) = twins.attend(0, total, &queries).unwrap();
    let own = |width: usize, data: &[f32]| {
        data.chunks_exact(total * width).flat_map(|head| head[..tokens * width].to_vec()).collect()
    };
    vec![(own(head_dim, &out), own(1, &lse))]
}

/// Questions about one prompt: each copies what it writes to, and the prompt's other pages stay one's.
fn check_forks<B: PagedAttention>(backend: B) {
    let mut twins = Twins::new(backend, 0.0);
    let text = twins.prompt(1000);
    let prompt = twins.backend.stats().pages_used;
    let forks = [twins.fork(text), twins.fork(text), text];
    let step = forks.map(|fork| (fork, 3));
    twins.step(&step).unwrap();
    twins.step(&step).unwrap();
    twins.check_stats();
    // Three heads' last pages, which hold 8 rows of the prompt, once more for two of the texts.
    assert_eq!(twins.backend.stats().pages_used, prompt + 3 * 2);
    twins.release(text);
    twins.release(forks[0]);
    twins.step(&step[1..2]).unwrap();
    twins.release(forks[1]);
    assert_eq!(twins.backend.stats().pages_used, 0);
}

#[test]
fn forks_share_a_prompt() {
    check_forks(Cpu::new(many()).unwrap());
}

#[test]
fn neighbours_do_not_change_a_bit() {
    let alone = outputs(threads(2), &[], 0);
    assert_eq!(alone, outputs(threads(2), &[1, 3000, 40], 0));
}

#[test]
fn threads_do_not_change_a_bit() {
    let one = outputs(threads(1), &[], 0);
    for n in [2, 3, 7] {
        assert_eq!(one, outputs(threads(n), &[], 0));
    }
}

#[test]
fn page_numbers_do_not_change_a_bit() {
    assert_eq!(outputs(threads(2), &[], 0), outputs(threads(2), &[], 9));
}

#[test]
fn a_log_sum_never_falls_when_a_key_is_added() {
    let mut twins = Twins::new(Cpu::new(CacheShape { window: 10_000, ..long() }).unwrap(), 0.0);
    let text = twins.prompt(300);
    let queries = common::Noise(5).floats(9 * 64);
    let mut last = vec![f32::NEG_INFINITY; 9];
    for _ in 0..20 {
        twins.step(&[(text, 1)]).unwrap();
        let (_, lse) = twins.attend(0, 1, &queries).unwrap();
        assert!(lse.iter().zip(&last).all(|(new, old)| new >= old));
        last = lse;
    }
}
