//! Fast attention over pages on the CPU.
//!
//! A head's pages are cut into segments at fixed multiples of its own length. Each segment gives a partial softmax, and
//! a head's partials are folded in order. Which thread computes which partial depends on the machine and on the
//! neighbours; the bits of the result do not.

mod exp;
mod tile;

use crate::error::Result;
use crate::host::{Call, Host, Kernel};
use crate::shape::CacheShape;
use crate::storage::{Element, Memory, Storage};
use crate::view::ViewMut;
use std::sync::{Mutex, PoisonError};
use tile::{Run, Segments, State};

/// A cache in host memory with fast attention: SIMD as the CPU has it, threads, each key and value read once for all
/// query heads that share it. Sums are f32, and the same bits come out whatever the number of threads and whatever
/// other sequences are in the step.
///
/// Page sizes and head dims that are multiples of 16 are fast; others work, some ten times slower.
pub type Cpu = Host<Fast>;

/// The arithmetic of [`Cpu`].
#[derive(Debug)]
pub struct Fast {
    workers: Workers,
    /// Queries of the call, `[heads of the step, tokens of the sequence, G, D]`, in f32.
    queries: Vec<f32>,
    states: Vec<f32>,
}

#[derive(Debug, Clone, Copy)]
struct Workers {
    threads: usize,
    arch: pulp::Arch,
}

/// Rows of a segment, rounded to whole pages.
const SEGMENT: usize = 256;
/// Query rows (tokens times group) that are worth a task of their own over a whole head; fewer share out its segments.
const MANY_ROWS: usize = 32;
/// Products of a query's and a key's element below which waking another thread costs more than it saves: some 40 µs on
/// one thread, keys and values coming from memory (BENCHMARKS.md).
const SMALL: usize = 100_000;

impl Cpu {
    /// An empty cache whose attention uses all of rayon's threads. Memory grows with the pages in use.
    ///
    /// # Errors
    /// [`CacheShape`](crate::Error::CacheShape) for a shape that no cache can have.
    pub fn new(shape: CacheShape) -> Result<Self> {
        Self::with_threads(shape, rayon::current_num_threads())
    }

    /// Like [`new`](Self::new), with at most `threads` threads: the caller and helpers from rayon's pool.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn with_threads(shape: CacheShape, threads: usize) -> Result<Self> {
        let lanes = if tiled(&shape) { tile::LANES } else { 1 };
        let workers = Workers { threads, arch: pulp::Arch::new() };
        Self::build(shape, lanes, Fast { workers, queries: Vec::new(), states: Vec::new() })
    }
}

fn tiled(shape: &CacheShape) -> bool {
    shape.page_size.is_multiple_of(tile::LANES) && shape.head_dim.is_multiple_of(tile::LANES)
}

impl Kernel for Fast {
    fn attend(&mut self, call: Call<'_>, out: &mut ViewMut<'_>, lse: Option<&mut [f32]>) {
        match (call.memory, tiled(call.shape)) {
            (Memory::F32(pages), true) => self.run::<_, { tile::LANES }>(pages, &call, out, lse),
            (Memory::F32(pages), false) => self.run::<_, 1>(pages, &call, out, lse),
            (Memory::Bf16(pages), true) => self.run::<_, { tile::LANES }>(pages, &call, out, lse),
            (Memory::Bf16(pages), false) => self.run::<_, 1>(pages, &call, out, lse),
            (Memory::F16(pages), true) => self.run::<_, { tile::LANES }>(pages, &call, out, lse),
            (Memory::F16(pages), false) => self.run::<_, 1>(pages, &call, out, lse),
            (Memory::F8(pages), true) => self.run::<_, { tile::LANES }>(pages, &call, out, lse),
            (Memory::F8(pages), false) => self.run::<_, 1>(pages, &call, out, lse),
        }
    }
}

/// Query rows of one head that are attended together; `parts` of its segments apart, to be folded.
struct Block {
    /// Of the step's heads.
    head: usize,
    /// First row, in tokens times group.
    first: usize,
    rows: usize,
    parts: usize,
}

impl Fast {
    fn run<E: Element, const L: usize>(
        &mut self,
        storage: &Storage<E>,
        call: &Call<'_>,
        out: &mut ViewMut<'_>,
        mut lse: Option<&mut [f32]>,
    ) {
        let (group, dim) = (call.shape.group(), call.shape.head_dim);
        let span = (SEGMENT / call.shape.page_size).max(1);
        self.read_queries(call);

        let mut blocks = Vec::new();
        let mut work = 0;
        for (i, head) in call.heads.iter().enumerate() {
            let rows = head.tokens.len() * group;
            work += rows * head.table.len() * dim;
            let split = self.workers.threads > 1 && rows <= MANY_ROWS;
            let parts = if split { head.table.pages().len().div_ceil(span).max(1) } else { 1 };
            for first in (0..rows).step_by(MANY_ROWS) {
                blocks.push(Block { head: i, first, rows: MANY_ROWS.min(rows - first), parts });
            }
        }

        let width = State::width(dim);
        let total = blocks.iter().map(|block| block.rows * block.parts).sum::<usize>();
        self.states.resize(total * width, 0.0);

        let mut queries = self.queries.as_slice();
        let mut states = self.states.as_mut_slice();
        let mut tasks = Vec::new();
        for block in &blocks {
            let head = &call.heads[block.head];
            let (rows, rest) = queries.split_at(block.rows * dim);
            queries = rest;
            let segments = head.table.pages().len().div_ceil(span);
            for part in 0..block.parts {
                let (state, rest) = states.split_at_mut(block.rows * width);
                states = rest;
                let range = if block.parts == 1 { 0..segments } else { part..part + 1 };
                let segments =
                    Segments { storage, head, span, page_size: call.shape.page_size, range };
                tasks.push(Run::<E, L> {
                    segments,
                    queries: rows,
                    first: block.first,
                    group,
                    scale: call.scale,
                    states: state,
                });
            }
        }
        self.workers.run(tasks, work);

        let mut states = self.states.as_mut_slice();
        for block in &blocks {
            let head = &call.heads[block.head];
            let (parts, rest) = states.split_at_mut(block.parts * block.rows * width);
            states = rest;
            let (total, parts) = parts.split_at_mut(block.rows * width);
            for (row, total) in total.chunks_exact_mut(width).enumerate() {
                for part in parts.chunks_exact(block.rows * width) {
                    State::fold(total, &part[row * width..][..width]);
                }
                let token = head.tokens.start + (block.first + row) / group;
                let query_head = head.head * group + (block.first + row) % group;
                let (values, log_sum) = State::finish(total);
                out.write(query_head, token, values);
                if let Some(lse) = &mut lse {
                    lse[query_head * call.queries.shape()[1] + token] = log_sum;
                }
            }
        }
    }

    /// Copies the queries so that the rows that share keys lie together.
    fn read_queries(&mut self, call: &Call<'_>) {
        let [heads, tokens, dim] = call.queries.shape();
        self.queries.resize(heads * tokens * dim, 0.0);
        let mut rows = self.queries.chunks_exact_mut(dim);
        for head in call.heads {
            for token in head.tokens.clone() {
                let group = call.shape.group();
                for (query_head, row) in (head.head * group..(head.head + 1) * group).zip(&mut rows)
                {
                    call.queries.read(query_head, token, row);
                }
            }
        }
    }
}

impl Workers {
    /// Runs the tasks here and on helpers, whoever is free taking the next.
    fn run<E: Element, const L: usize>(self, tasks: Vec<Run<'_, E, L>>, work: usize) {
        let helpers =
            if work < SMALL { 0 } else { self.threads.min(tasks.len()).saturating_sub(1) };
        let queue = Mutex::new(tasks.into_iter());
        if helpers == 0 {
            return self.work(&queue);
        }
        rayon::in_place_scope(|scope| {
            (0..helpers).for_each(|_| scope.spawn(|_| self.work(&queue)));
            self.work(&queue);
        });
    }

    /// Kept out of line: each copy would hold all of the inner loops.
    #[inline(never)]
    fn work<'a, E: Element + 'a, const L: usize>(
        self,
        queue: &Mutex<impl Iterator<Item = Run<'a, E, L>>>,
    ) {
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(task) = next() {
            self.arch.dispatch(task);
        }
    }
}
