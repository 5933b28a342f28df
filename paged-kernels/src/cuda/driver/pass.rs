//! Launches of kernels/pass.cu and kernels/pass.cuh: passes of several tokens.

use super::attend::{AttendCall, AttendStep, Cut, HEAD_WORDS, in_slabs};
use super::map::{Map, encode};
use super::resident::{RawState, SHARE_WORDS, State, Targets};
use super::{Device, Grid, RawView, Room, failed, function, load};
use crate::cuda::plan::SLAB;
use crate::cuda::view::{DeviceView, DeviceViewMut};
use crate::error::Result;
use crate::shape::Dtype;
use cudarc::driver::{CudaContext, result, sys};
use std::ffi::CStr;
use std::sync::Arc;

const BOOKS: &str = concat!(include_str!("../../../kernels/pass.compute_80.ptx"), "\0");
const ATTEND_BF16: &str = concat!(include_str!("../../../kernels/pass_bf16.compute_80.ptx"), "\0");
const ATTEND_F16: &str = concat!(include_str!("../../../kernels/pass_f16.compute_80.ptx"), "\0");
const ATTEND_F8: &str = concat!(include_str!("../../../kernels/pass_f8.compute_80.ptx"), "\0");
const HOPPER: &str = concat!(include_str!("../../../kernels/pass_hopper.compute_90a.ptx"), "\0");
/// Threads of the fast attention's blocks.
const TEAM: u32 = 128;
const HOPPER_TEAM: u32 = 384;
/// Threads of the blocks that close holes, and of those that plan.
const CLOSERS: u32 = 256;
const PLANNERS: u32 = 512;
/// Warps of the blocks that fold, a row each.
const FOLDERS: usize = 8;
/// 32-bit words of `Tile` and `PassText` in kernels/pass.cuh.
const TILE_WORDS: usize = 4;
const TEXT_WORDS: usize = 8;
/// The fast attention's kernels, as in kernels/pass.cuh, the tallest tiles first.
const KERNELS: [Tall<&CStr>; 7] = {
    const fn kernel<'a>(
        kernel: &'a CStr,
        fold: &'a CStr,
        dim: usize,
        height: usize,
        keys: usize,
    ) -> Tall<&'a CStr> {
        Tall { kernel, fold, dim, height, keys, stages: 2, narrow: 0, map: None }
    }
    [
        kernel(c"pass_attend_tall_d64", c"pass_fold_d64", 64, 128, 64),
        kernel(c"pass_attend_d64", c"pass_fold_d64", 64, 64, 64),
        kernel(c"pass_attend_tall_d96", c"pass_fold_d96", 96, 128, 32),
        kernel(c"pass_attend_d96", c"pass_fold_d96", 96, 64, 64),
        kernel(c"pass_attend_tall_d128", c"pass_fold_d128", 128, 128, 64),
        kernel(c"pass_attend_d128", c"pass_fold_d128", 128, 64, 64),
        kernel(c"pass_attend_d256", c"pass_fold_d256", 256, 64, 32),
    ]
};
/// Those of kernels/pass_hopper.cu, by type: dim, stages, name.
const HOPPER_KERNELS: [(Dtype, usize, usize, &CStr); 4] = [
    (Dtype::Bf16, 64, 4, c"pass_hopper_bf16_d64"),
    (Dtype::Bf16, 128, 3, c"pass_hopper_bf16_d128"),
    (Dtype::F16, 64, 4, c"pass_hopper_f16_d64"),
    (Dtype::F16, 128, 3, c"pass_hopper_f16_d128"),
];
const HOPPER_KEYS: usize = 128;
/// What a block of theirs aligns its shared memory to.
const ALIGNED: usize = 1024;

/// A kernel of the fast attention.
#[derive(Debug, Clone, Copy)]
struct Tall<K> {
    kernel: K,
    /// The kernel that folds what blocks share.
    fold: K,
    dim: usize,
    /// Rows of a tile: tokens times query heads of a kv head.
    height: usize,
    /// Keys of a unit.
    keys: usize,
    /// Units that a block has room for, on their way or, of eight bits, made wide.
    stages: usize,
    /// Bytes of a unit of eight bits, which comes in a place of its own, and of the scales of the one before.
    narrow: usize,
    /// The pool, for a kernel that fetches by the copy engine: a block of it fills a multiprocessor.
    map: Option<Map>,
}

impl<K> Tall<K> {
    /// A block's shared memory: a tile's queries, and the units on their way.
    fn shared(&self) -> usize {
        let rows = self.height + 2 * self.stages * self.keys;
        let aligned = if self.map.is_some() { ALIGNED } else { 0 };
        rows * self.dim.next_multiple_of(64) * 2 + self.narrow + aligned
    }

    /// For a cache of eight bits: each row comes with its scale, which stays when it is made wide.
    fn of_eight_bits(self) -> Self {
        Self { stages: 1, narrow: 2 * self.keys * (self.dim + 8), ..self }
    }

    fn threads(&self) -> u32 {
        if self.map.is_some() { HOPPER_TEAM } else { TEAM }
    }

    /// Blocks that a multiprocessor has room for.
    fn at_once(&self) -> usize {
        if self.map.is_some() { 1 } else { 2 }
    }
}

/// A text's part of a pass.
#[derive(Debug, Clone, Copy)]
pub struct PassText {
    pub seat: usize,
    pub tokens: usize,
    /// Its newest tokens before the pass that may be beyond the window now.
    pub leaving: usize,
}

#[derive(Debug)]
struct Kernels {
    context: Arc<CudaContext>,
    modules: Vec<sys::CUmodule>,
    own: sys::CUfunction,
    leave: sys::CUfunction,
    begin: sys::CUfunction,
    /// Those that fit the cache, the tallest tiles first.
    attend: Vec<Tall<sys::CUfunction>>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Kernels {}

impl Kernels {
    fn load(device: &Device, state: &State) -> Result<Self> {
        device.bind()?;
        let books = load(BOOKS)?;
        let mut kernels = Self {
            context: device.context.clone(),
            modules: vec![books],
            own: function(books, c"pass_own")?,
            leave: function(books, c"pass_leave")?,
            begin: function(books, c"pass_begin")?,
            attend: Vec::new(),
        };
        let mut sizes = device.sizes(function(books, c"pass_sizes")?, 2)?;
        let (dim, page_size) = (state.pool.dim as usize, state.pool.page_size);
        let fits = |tall: &Tall<&CStr>| tall.dim == dim && in_slabs(page_size);
        let images = [(Dtype::Bf16, ATTEND_BF16), (Dtype::F16, ATTEND_F16), (Dtype::F8, ATTEND_F8)];
        let image = images.into_iter().find(|(dtype, _)| dtype.code() == state.pool.dtype);
        if let Some((dtype, image)) = image.filter(|_| KERNELS.iter().any(&fits)) {
            let module = load(image)?;
            kernels.modules.push(module);
            sizes.extend(device.sizes(function(module, c"pass_attend_sizes")?, 3)?);
            let narrow = dtype == Dtype::F8;
            let talls = KERNELS.into_iter().filter(fits);
            let talls = talls.map(|tall| if narrow { tall.of_eight_bits() } else { tall });
            let talls = talls.map(|tall| (module, tall));
            let mut talls = talls.collect::<Vec<_>>();
            let rows = state.pool.room.bytes() / dim / 2;
            let name =
                HOPPER_KERNELS.into_iter().find(|kernel| (kernel.0, kernel.1) == (dtype, dim));
            if let Some((_, _, stages, kernel)) = name.filter(|_| device.hopper && rows < 1 << 31) {
                let module = load(HOPPER)?;
                kernels.modules.push(module);
                sizes.extend(device.sizes(function(module, c"pass_hopper_sizes")?, 1)?);
                let map = Some(encode(dtype, state.pool.room.address, [dim, rows], dim, SLAB)?);
                talls.insert(
                    0,
                    (module, Tall { kernel, keys: HOPPER_KEYS, stages, map, ..talls[0].1 }),
                );
            }
            let attend = talls[talls.len() - 1].0;
            for (module, tall) in talls {
                let (kernel, fold) = (function(module, tall.kernel)?, function(attend, tall.fold)?);
                let which =
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is of a module that is loaded.
                unsafe {
                    result::function::set_function_attribute(kernel, which, tall.shared() as i32)
                }
                .map_err(failed("cuFuncSetAttribute"))?;
                let Tall { dim, height, keys, stages, narrow, map, .. } = tall;
                kernels.attend.push(Tall { kernel, fold, dim, height, keys, stages, narrow, map });
            }
        }
        assert_eq!(
            sizes,
            MIRRORED[..sizes.len()],
            "the kernels' structs are as they are mirrored here"
        );
        Ok(kernels)
    }

    /// The kernel for texts of so many rows a kv head: tall tiles load keys half as often, where they are not mostly empty.
    fn pick(&self, rows: impl Iterator<Item = usize> + Clone) -> Option<Tall<sys::CUfunction>> {
        let filled = |tall: &Tall<_>| {
            rows.clone().map(|rows| rows.next_multiple_of(tall.height)).sum::<usize>()
        };
        let [tall, rest @ ..] = &self.attend[..] else { return None };
        // Hopper's is twice as fast a row.
        let (most, least) = if tall.map.is_some() { (8, 12) } else { (8, 9) };
        let short = rest.iter().find(|short| most * filled(tall) > least * filled(short));
        Some(*short.unwrap_or(tall))
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            for &module in &self.modules {
                // SAFETY: nothing else names the module's functions, and unloading waits for what still runs.
                self.context.record_err(unsafe { result::module::unload(module) });
            }
        }
    }
}

/// What a pass's plan is written to, for all layers. It grows with the longest pass.
#[derive(Debug)]
pub struct Pass {
    kernels: Kernels,
    texts: Room,
    /// The text of each token, and of each tile.
    owners: Room,
    tile_owners: Room,
    heads: Room,
    rows: Room,
    slots: Room,
    marks: Room,
    plan: Room,
    shares: Room,
    parts: Room,
    count: usize,
    tokens: usize,
    tiles: usize,
    tall: Option<Tall<sys::CUfunction>>,
    cut: Cut,
}

impl Pass {
    pub fn new(device: &Device, state: &State) -> Result<Self> {
        let empty = || device.room(0);
        Ok(Self {
            kernels: Kernels::load(device, state)?,
            texts: empty()?,
            owners: empty()?,
            tile_owners: empty()?,
            heads: empty()?,
            rows: empty()?,
            slots: empty()?,
            marks: empty()?,
            plan: empty()?,
            shares: device.room(state.layers * 2 * device.blocks * SHARE_WORDS * 4)?,
            parts: empty()?,
            count: 0,
            tokens: 0,
            tiles: 0,
            tall: None,
            cut: Cut::Fast,
        })
    }

    /// Where one layer's tokens go.
    pub fn targets(&self, state: &State, layer: usize) -> Targets<'_> {
        Targets::of(&self.rows, &self.marks, layer, state.kv_heads * self.tokens)
    }
}

impl Device {
    /// Lets the dropped tokens of `texts`' last passes go that are beyond the window, and closes the holes they leave. Where
    /// pages may be shared, those that this writes to are copied first.
    pub fn leave(
        &self,
        state: &State,
        pass: &mut Pass,
        texts: &[PassText],
        shared: bool,
    ) -> Result<()> {
        let most = texts.iter().map(|text| text.leaving).max().unwrap_or(0);
        assert!(texts.iter().all(|text| text.seat < state.seats && text.leaving <= state.places()));
        if most == 0 {
            return Ok(());
        }
        let words = texts.iter().flat_map(|text| {
            [text.seat, text.tokens, 0, text.leaving, 0, 0, 0, 0].map(|word| word as u32)
        });
        self.upload(&words.collect::<Vec<_>>(), &mut pass.texts)?;
        let call = LeaveCall {
            state: state.raw(),
            texts: pass.texts.address,
            count: texts.len() as u32,
            most: most as u32,
        };
        let grid = |words: usize| Grid {
            blocks: state.layers * state.kv_heads * texts.len(),
            threads: CLOSERS,
            shared: 4 * words as u32,
            overlaps: false,
        };
        if shared {
            // SAFETY: the state's rooms are of its sizes, the seats exist and each stands once, and shared memory holds a bit
            // for each page of a head.
            unsafe { self.launch(pass.kernels.own, grid(state.most_pages.div_ceil(32)), &call) }?;
        }
        // SAFETY: as above; shared memory holds a slot for each token that may leave, and two words for each 32.
        unsafe { self.launch(pass.kernels.leave, grid(most + 2 * most.div_ceil(32)), &call) }
    }

    /// Plans a pass of `texts`, whose tokens follow one another: they are appended to what their heads keep.
    pub fn begin_pass(
        &self,
        state: &State,
        pass: &mut Pass,
        texts: &[PassText],
        group: usize,
        cut: Cut,
    ) -> Result<()> {
        (pass.count, pass.cut) = (texts.len(), cut);
        pass.tokens = texts.iter().map(|text| text.tokens).sum();
        pass.tall = pass.kernels.pick(texts.iter().map(|text| text.tokens * group));
        let (height, keys) = pass.tall.map_or((1, 1), |tall| (tall.height, tall.keys));
        let (mut words, mut owners, mut tile_owners) = (Vec::new(), Vec::new(), Vec::new());
        for (i, text) in texts.iter().enumerate() {
            let (first, first_tile) = (owners.len(), tile_owners.len());
            let tiles =
                if pass.tall.is_some() { (text.tokens * group).div_ceil(height) } else { 0 };
            words.extend(
                [text.seat, text.tokens, first, text.leaving, first_tile, 0, 0, 0]
                    .map(|word| word as u32),
            );
            owners.extend(std::iter::repeat_n(i as u32, text.tokens));
            tile_owners.extend(std::iter::repeat_n(i as u32, tiles));
        }
        pass.tiles = tile_owners.len();
        self.upload(&words, &mut pass.texts)?;
        self.upload(&owners, &mut pass.owners)?;
        self.upload(&tile_owners, &mut pass.tile_owners)?;
        let heads = state.layers * state.kv_heads;
        let blocks = pass.tall.map_or(1, |tall| tall.at_once()) * self.blocks;
        self.reserve(heads * pass.count * HEAD_WORDS * 4, &mut pass.heads)?;
        self.reserve(heads * pass.tokens * 4, &mut pass.rows)?;
        self.reserve(heads * pass.tokens * 4, &mut pass.slots)?;
        self.reserve(heads * pass.tokens * 8, &mut pass.marks)?;
        self.reserve(heads * pass.tiles * TILE_WORDS * 4, &mut pass.plan)?;
        if pass.tall.is_some() {
            let part = height * (state.pool.dim as usize + 2) * 4;
            self.reserve(2 * blocks * part, &mut pass.parts)?;
        }
        let call = BeginCall {
            state: state.raw(),
            texts: pass.texts.address,
            owners: pass.tile_owners.address,
            heads: pass.heads.address,
            rows: pass.rows.address,
            slots: pass.slots.address,
            marks: pass.marks.address,
            plan: pass.plan.address,
            shares: pass.shares.address,
            count: pass.count as u32,
            tokens: pass.tokens as u32,
            tiles: pass.tiles as u32,
            group: group as u32,
            height: height as u32,
            keys: keys as u32,
            blocks: blocks as u32,
            cut: cut as u32,
        };
        let layers = if pass.count == 0 { 0 } else { state.layers };
        let grid = Grid { blocks: layers, threads: PLANNERS, shared: 0, overlaps: false };
        // SAFETY: the state's rooms are of its sizes, the seats exist and each stands once; the pass's rooms have just been
        // made large enough for its texts, tokens and tiles.
        unsafe { self.launch(pass.kernels.begin, grid, &call) }
    }

    /// Attends from a pass's tokens in one layer. `lse`, if any, has a number for each row.
    #[allow(clippy::too_many_arguments)]
    pub fn attend_pass(
        &self,
        state: &State,
        pass: &Pass,
        layer: usize,
        queries: DeviceView<'_>,
        scale: f32,
        out: &DeviceViewMut<'_>,
        lse: Option<&DeviceViewMut<'_>>,
    ) -> Result<()> {
        let [query_heads, tokens, dim] = queries.shape();
        assert_eq!(
            (tokens, dim, out.shape()),
            (pass.tokens, state.pool.dim as usize, queries.shape())
        );
        let heads = state.kv_heads * pass.count;
        let group = query_heads / state.kv_heads;
        let step = AttendStep {
            heads: pass.heads.part(layer * heads * HEAD_WORDS, heads * HEAD_WORDS),
            tables: state.tables(),
            slots: pass.slots.part(layer * state.kv_heads * tokens, state.kv_heads * tokens),
            owners: pass.owners.part(0, tokens),
            shares: pass.shares.whole(),
            parts: pass.parts.whole(),
            cut: Cut::Fast,
            single: false,
            early: false,
            slim: false,
            sequences: pass.count,
            group,
        };
        let Some(tall) =
            pass.tall.filter(|_| scale > 0.0 && scale.is_finite() && fits(state, &queries, out))
        else {
            return self.attend(&state.pool, &step, queries, scale, out, lse);
        };
        let (tiles, blocks) = (state.kv_heads * pass.tiles, tall.at_once() * self.blocks);
        let call = PassCall {
            attend: self.attend_call(&state.pool, &step, queries, scale, out, lse),
            shares: pass.shares.part(layer * blocks * SHARE_WORDS, blocks * SHARE_WORDS).address,
            tiles: pass.plan.part(layer * tiles * TILE_WORDS, tiles * TILE_WORDS).address,
            owners: pass.tile_owners.part(0, pass.tiles).address,
            texts: pass.texts.part(0, pass.count * TEXT_WORDS).address,
            parts: pass.parts.address,
            count: pass.tiles as u32,
            height: tall.height as u32,
        };
        let blocks = if tokens == 0 { 0 } else { blocks };
        let grid =
            Grid { blocks, threads: tall.threads(), shared: tall.shared() as u32, overlaps: false };
        // SAFETY: the views hold what their shapes say and are aligned as `fits` asks; the arrays are those that
        // `begin_pass` has written for this kernel's tiles, and `parts` holds two for each block.
        unsafe {
            match tall.map {
                Some(map) => self.launch(tall.kernel, grid, &HopperCall { map, pass: call }),
                None => self.launch(tall.kernel, grid, &call),
            }
        }?;
        if pass.cut == Cut::Invariant {
            return Ok(());
        }
        let grid = Grid {
            blocks: grid.blocks * tall.height / FOLDERS,
            threads: 32 * FOLDERS as u32,
            shared: 0,
            overlaps: false,
        };
        // SAFETY: as above; it folds what the kernel before it wrote.
        unsafe { self.launch(tall.fold, grid, &call) }
    }
}

/// Whether the fast attention can read the queries 16 bytes, and write results two elements at a time.
fn fits(state: &State, queries: &DeviceView<'_>, out: &DeviceViewMut<'_>) -> bool {
    let (from, to) = (queries.raw(), out.raw());
    let even = |view: &RawView, bytes: u64, elements: i64| {
        view.data.is_multiple_of(bytes)
            && view.head_stride % elements == 0
            && view.token_stride % elements == 0
    };
    let pair = if to.dtype == Dtype::F32.code() { 8 } else { 4 };
    from.dtype == state.pool.queries() && even(&from, 16, 8) && even(&to, pair, 2)
}

// Mirrors of the structs in kernels/pass.cuh and kernels/pass.cu.

#[repr(C)]
struct HopperCall {
    map: Map,
    pass: PassCall,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PassCall {
    attend: AttendCall,
    shares: u64,
    tiles: u64,
    owners: u64,
    texts: u64,
    parts: u64,
    count: u32,
    height: u32,
}

#[repr(C)]
struct LeaveCall {
    state: RawState,
    texts: u64,
    count: u32,
    most: u32,
}

#[repr(C)]
struct BeginCall {
    state: RawState,
    texts: u64,
    owners: u64,
    heads: u64,
    rows: u64,
    slots: u64,
    marks: u64,
    plan: u64,
    shares: u64,
    count: u32,
    tokens: u32,
    tiles: u32,
    group: u32,
    height: u32,
    keys: u32,
    blocks: u32,
    cut: u32,
}

/// Sizes of the structs, in the order in which the kernels give theirs.
const MIRRORED: [u32; 6] = [
    size_of::<LeaveCall>() as u32,
    size_of::<BeginCall>() as u32,
    4 * TILE_WORDS as u32,
    4 * TEXT_WORDS as u32,
    size_of::<PassCall>() as u32,
    size_of::<HopperCall>() as u32,
];
