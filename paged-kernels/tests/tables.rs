//! Pool and tables under random operations, beside a model that knows which token lies in which row of memory.

use paged_kernels::{Error, PageId, PagePool, PageTable, Place};
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap};

const HEADS: usize = 3;
const WINDOW: usize = 5;
/// Few enough that some operations run out.
const PAGES: usize = 20;

#[derive(Debug, Clone)]
enum Operation {
    Fill(Vec<bool>),
    Step(Vec<bool>),
    Clear,
}

fn drops(longest: usize) -> impl Strategy<Value = Vec<bool>> {
    (0.0..=1.0)
        .prop_flat_map(move |share| prop::collection::vec(prop::bool::weighted(share), 0..=longest))
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        2 => drops(24).prop_map(Operation::Fill),
        6 => drops(1).prop_map(Operation::Step),
        3 => drops(14).prop_map(Operation::Step),
        1 => Just(Operation::Clear),
    ]
}

/// One head and its text: whether each token goes, and how many came last.
struct Head {
    table: PageTable,
    drops: Vec<bool>,
    newest: usize,
}

struct Model {
    pool: PagePool,
    page_size: usize,
    heads: Vec<Head>,
    /// What was last written: head and token.
    memory: HashMap<Place, (usize, usize)>,
}

impl Model {
    fn new(page_size: usize) -> Self {
        let head = || Head { table: PageTable::new(page_size), drops: Vec::new(), newest: 0 };
        let heads = (0..HEADS).map(|_| head()).collect();
        Self { pool: PagePool::new(PAGES), page_size, heads, memory: HashMap::new() }
    }

    /// Token of each slot of a head.
    fn rows(&self, head: usize) -> Vec<usize> {
        let places = places(&self.heads[head].table, self.page_size);
        let tokens = places.into_iter().map(|place| {
            let (owner, token) = self.memory[&place];
            assert_eq!(owner, head, "another head wrote into {place:?}");
            token
        });
        tokens.collect()
    }

    fn apply(&mut self, head: usize, operation: Operation) {
        match operation {
            Operation::Fill(drops) if self.heads[head].drops.is_empty() => self.fill(head, drops),
            Operation::Fill(drops) | Operation::Step(drops) => self.step(head, &drops),
            Operation::Clear => {
                let Head { table, drops, newest } = &mut self.heads[head];
                table.clear(&mut self.pool).unwrap();
                drops.clear();
                *newest = 0;
            }
        }
    }

    fn fill(&mut self, head: usize, drops: Vec<bool>) {
        let Head { table, .. } = &mut self.heads[head];
        let kept = (0..drops.len()).filter(|&i| i + WINDOW >= drops.len() || !drops[i]);
        let kept = kept.collect::<Vec<_>>();
        match table.fill(&mut self.pool, WINDOW, &drops) {
            Ok(()) => {
                for (place, token) in places(table, self.page_size).into_iter().zip(kept) {
                    self.memory.insert(place, (head, token));
                }
                self.heads[head].drops = drops;
            }
            Err(error) => {
                let wanted = kept.len().div_ceil(self.page_size);
                assert_eq!(error, Error::OutOfPages { wanted, free: self.pool.free() });
            }
        }
    }

    fn step(&mut self, head: usize, new: &[bool]) {
        let before = self.rows(head);
        let Head { table, drops, newest } = &mut self.heads[head];
        let (mut slots, mut moves) = (Vec::new(), Vec::new());
        let begun = table.begin_step(&mut self.pool, WINDOW, new.len(), &mut slots, &mut moves);
        if let Err(error) = begun {
            assert!(matches!(error, Error::OutOfPages { wanted, free } if wanted > free));
            assert_eq!(self.rows(head), before);
            return;
        }
        let left = |token: &usize| drops[*token] && token + WINDOW < drops.len();
        let free = (0..before.len()).filter(|&slot| left(&before[slot])).collect::<Vec<_>>();
        if free.len() <= new.len() {
            let recycled =
                slots.iter().map(|slot| slot.index()).filter(|slot| *slot < before.len());
            let recycled = recycled.collect::<BTreeSet<_>>();
            assert_eq!(recycled, free.into_iter().collect(), "slots of dropped tokens are reused");
            assert!(moves.is_empty());
        }
        for step in moves {
            let token = self.memory[&step.from];
            self.memory.insert(step.to, token);
        }
        for (i, slot) in slots.iter().enumerate() {
            self.memory.insert(table.place(*slot), (head, drops.len() + i));
        }
        table.decide(new);
        drops.extend(new);
        *newest = new.len();
    }

    fn check(&self) {
        let mut pages = BTreeSet::new();
        for (head, Head { table, drops, newest }) in self.heads.iter().enumerate() {
            let old = drops.len().saturating_sub(newest + WINDOW);
            let live = (0..drops.len()).filter(|&i| i >= old || !drops[i]).collect::<Vec<_>>();
            let mut rows = self.rows(head);
            rows.sort_unstable();
            assert_eq!(rows, live, "each live token has exactly one slot of 0..len");
            assert_eq!(table.pages().len(), table.len().div_ceil(self.page_size));
            assert!(table.pages().iter().all(|page| pages.insert(*page)), "a page in two tables");
            assert!(table.pages().iter().all(|page| self.pool.holders(*page) == 1));
            let window = drops.len().min(WINDOW + newest);
            assert_eq!(table.recent().count(), window);
        }
        assert_eq!((self.pool.used(), self.pool.free()), (pages.len(), PAGES - pages.len()));
    }
}

fn places(table: &PageTable, page_size: usize) -> Vec<Place> {
    let place = |slot| Place { page: table.pages()[slot / page_size], row: slot % page_size };
    (0..table.len()).map(place).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_live_token_has_one_row_and_every_page_one_owner(
        page_size in 1usize..=5,
        operations in prop::collection::vec((0..HEADS, operation()), 1..60),
    ) {
        let mut model = Model::new(page_size);
        for (head, operation) in operations {
            model.apply(head, operation);
            model.check();
        }
    }

    #[test]
    fn pages_are_counted(operations in prop::collection::vec((0..3, 0usize..8), 1..80)) {
        let (mut pool, mut holders) = (PagePool::new(6), HashMap::<PageId, usize>::new());
        let mut peak = 0;
        for (operation, choice) in operations {
            let mut held = holders.keys().copied().collect::<Vec<_>>();
            held.sort_unstable();
            match held.get(choice % held.len().max(1)) {
                Some(&page) if operation == 1 => {
                    pool.share(page).unwrap();
                    *holders.entry(page).or_default() += 1;
                }
                Some(&page) if operation == 2 => {
                    let left = holders[&page] - 1;
                    assert_eq!(pool.release(page), Ok(left == 0));
                    holders.insert(page, left);
                    holders.retain(|_, count| *count > 0);
                    if left == 0 {
                        assert_eq!(pool.release(page), Err(Error::PageNotInUse { page }));
                        assert_eq!(pool.share(page), Err(Error::PageNotInUse { page }));
                    }
                }
                _ => match pool.take() {
                    Ok(page) => assert_eq!(holders.insert(page, 1), None, "taken twice"),
                    Err(error) => {
                        assert_eq!(error, Error::OutOfPages { wanted: 1, free: 0 });
                        assert_eq!(holders.len(), 6);
                    }
                },
            }
            peak = peak.max(holders.len());
            assert_eq!((pool.used(), pool.free(), pool.peak()), (holders.len(), 6 - holders.len(), peak));
            assert!(holders.iter().all(|(page, count)| pool.holders(*page) == *count));
        }
    }
}

#[test]
fn single_steps_never_touch_a_kept_token() {
    let mut model = Model::new(4);
    model.apply(0, Operation::Fill((0..20).map(|i| i % 3 == 0).collect()));
    for step in 0..40 {
        let before = model.rows(0);
        model.apply(0, Operation::Step(vec![step % 2 == 0]));
        let after = model.rows(0);
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert!(
            changed <= 1 && after.len() >= before.len(),
            "one slot is recycled, or one appended"
        );
        model.check();
    }
}

#[test]
fn a_burst_equals_single_steps_once_it_has_left_the_window() {
    let drops = (0..30).map(|i| i % 4 != 1).collect::<Vec<_>>();
    let live = |steps: &[usize]| {
        let mut model = Model::new(4);
        let mut rest = drops.as_slice();
        for &tokens in steps {
            let (new, later) = rest.split_at(tokens);
            rest = later;
            model.apply(0, Operation::Step(new.to_vec()));
            model.check();
        }
        let mut rows = model.rows(0);
        rows.sort_unstable();
        rows
    };
    assert_eq!(live(&[29, 1]), live(&[1; 30]));
    assert_eq!(live(&[10, 10, 9, 1]), live(&[1; 30]));
}
