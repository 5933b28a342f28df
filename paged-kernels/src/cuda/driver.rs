//! The card: memory, kernels and their launches. All of this crate's `unsafe`.

#![allow(unsafe_code)]

pub mod attend;
mod fused;
pub mod map;
pub mod pass;
pub mod resident;
pub mod scores;
pub mod swap;

use self::attend::{AttendCall, HEAD_WORDS, Stream, StreamCall};
use crate::cuda::view::{DeviceView, DeviceViewMut};
use crate::error::{Error, Result};
use crate::shape::Dtype;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, CudaStream, sys};
use std::ffi::{CStr, c_int, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

/// CUDA 13.0: what the PTX asks for.
const DRIVER: i32 = 13_000;
/// Compute capability that the portable kernels ask for.
const CAPABILITY: (i32, i32) = (8, 0);
/// PTX, with the zero byte that the driver looks for.
const PLAIN: &str = concat!(include_str!("../../kernels/plain.compute_80.ptx"), "\0");
/// Threads of a block of the plain kernels: four warps.
const BLOCK: u32 = 128;
/// Where a row is not to be stored.
pub const NO_ROW: u32 = u32::MAX;

fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        Error::Cuda { call, error: text.unwrap_or_else(|_| format!("{:?}", error.0)) }
    }
}

/// Says whether there is a driver that can be asked for a card. `cudarc` panics where it finds no library, or one
/// without the symbols that it wants, so the library is asked for its version first.
fn check_driver() -> Result<()> {
    // SAFETY: loads and unloads the driver's library; its initialisers may run at any time.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    // SAFETY: the type is cuDriverGetVersion's in cuda.h; the symbol is only used while the library, which is
    // static, is loaded.
    let found = unsafe {
        let version = sys::culib()
            .get::<unsafe extern "C" fn(*mut c_int) -> sys::CUresult>(b"cuDriverGetVersion\0");
        let mut found = 0;
        match version {
            Ok(version) if version(&raw mut found) == sys::CUresult::CUDA_SUCCESS => found,
            _ => 0,
        }
    };
    if found < DRIVER { Err(Error::OldDriver { found, wanted: DRIVER }) } else { Ok(()) }
}

/// Binds the context, and gives the compute capability of a card that has kernels.
fn check_card(context: &Arc<CudaContext>) -> Result<(i32, i32)> {
    let (major, minor) = context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?;
    if (major, minor) < CAPABILITY {
        let card = context.name().map_err(failed("cuDeviceGetName"))?;
        return Err(Error::Card { card, major, minor });
    }
    context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
    Ok((major, minor))
}

fn load(ptx: &'static str) -> Result<sys::CUmodule> {
    // SAFETY: the image is PTX that ends in a zero byte; the caller has bound a context.
    unsafe { result::module::load_data(ptx.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))
}

fn function(module: sys::CUmodule, name: &CStr) -> Result<sys::CUfunction> {
    // SAFETY: the module is loaded into the bound context.
    unsafe { result::module::get_function(module, name.into()) }
        .map_err(failed("cuModuleGetFunction"))
}

/// A card, a stream on it, and the kernels.
#[derive(Debug)]
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: Vec<sys::CUmodule>,
    store: sys::CUfunction,
    shift: sys::CUfunction,
    attend: sys::CUfunction,
    /// The fast attention's kernels, for caches of its type.
    streams: Vec<Stream<sys::CUfunction>>,
    dtype: Dtype,
    /// Whether a fast attention may start while the kernel before it ends.
    overlaps: bool,
    /// Whether it has wgmma.
    hopper: bool,
    /// Blocks that share a layer's pages.
    pub blocks: usize,
}

// SAFETY: the raw handles name a module and its functions, which any thread may use once the context is bound to it,
// as every method here does first.
unsafe impl Send for Device {}

impl Device {
    /// Card 0 and its default stream, for a cache of a type.
    pub fn first(dtype: Dtype) -> Result<Self> {
        check_driver()?;
        let cards = CudaContext::device_count().map_err(failed("cuDeviceGetCount"))?;
        if cards == 0 {
            return Err(Error::NoCard);
        }
        let context = CudaContext::new(0).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        Self::new(context.default_stream(), dtype)
    }

    /// The card of `stream`, working on that stream, for a cache of a type.
    pub fn new(stream: Arc<CudaStream>, dtype: Dtype) -> Result<Self> {
        check_driver()?;
        let context = stream.context().clone();
        let capability = check_card(&context)?;
        let attribute = |which| context.attribute(which).map_err(failed("cuDeviceGetAttribute"));
        use sys::CUdevice_attribute_enum as Attribute;
        let multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let overlaps = capability >= (9, 0);
        let plain = load(PLAIN)?;
        let mut device = Self {
            store: function(plain, c"plain_store")?,
            shift: function(plain, c"plain_move")?,
            attend: function(plain, c"plain_attend")?,
            streams: Vec::new(),
            dtype,
            overlaps,
            hopper: capability == (9, 0),
            context,
            stream,
            modules: vec![plain],
            blocks: multiprocessors,
        };
        let mut sizes = device.sizes(function(plain, c"plain_sizes")?, 6)?;
        sizes.extend(device.load_fast(shared as usize)?);
        assert_eq!(
            sizes,
            MIRRORED[..sizes.len()],
            "the kernels' structs are as they are mirrored here"
        );
        Ok(device)
    }

    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Room for `bytes`, its content undefined.
    pub fn room(&self, bytes: usize) -> Result<Room> {
        self.bind()?;
        if bytes == 0 {
            return Ok(Room { context: self.context.clone(), address: 0, bytes });
        }
        // SAFETY: the context is bound; the memory is only read where a kernel or a copy has written.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            match (error.0, result::mem_get_info()) {
                (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, _))) => {
                    Error::DeviceMemory { wanted: bytes, free }
                }
                _ => failed("cuMemAlloc")(error),
            }
        })?;
        Ok(Room { context: self.context.clone(), address, bytes })
    }

    /// Makes `room` hold at least `bytes`; its content is undefined if it grows.
    pub fn reserve(&self, bytes: usize, room: &mut Room) -> Result<()> {
        if room.bytes < bytes {
            // The old room goes only after what reads it: freeing waits for the card.
            *room = self.room(bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// Copies `data` to the front of `room`, which grows if it must. Returns once `data` may go.
    pub fn upload<T: Plain>(&self, data: &[T], room: &mut Room) -> Result<()> {
        let bytes = size_of_val(data);
        self.reserve(bytes, room)?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: `room` holds at least `bytes`, `data` is plain old data, and the copy from pageable memory has taken
        // it all in when the call returns.
        unsafe { result::memcpy_htod_async(room.address, data, self.stream.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Fills `room` with zero bytes.
    pub fn zero(&self, room: &mut Room) -> Result<()> {
        self.bind()?;
        // SAFETY: the room is as long as it says, and borrowed alone.
        unsafe { result::memset_d8_async(room.address, 0, room.bytes, self.stream.cu_stream()) }
            .map_err(failed("cuMemsetD8Async"))
    }

    /// The front of `room`, once everything before has been done.
    pub fn download<T: Plain + Default>(&self, room: &Room, count: usize) -> Result<Vec<T>> {
        let mut data = vec![T::default(); count];
        assert!(size_of_val(&*data) <= room.bytes, "no more is read than there is");
        if count == 0 {
            return Ok(data);
        }
        self.bind()?;
        // SAFETY: `data` is as long as what is read, any bits are a `T`, and it outlives the synchronisation.
        unsafe { result::memcpy_dtoh_async(&mut data, room.address, self.stream.cu_stream()) }
            .map_err(failed("cuMemcpyDtoHAsync"))?;
        self.synchronize()?;
        Ok(data)
    }

    /// Waits for everything on the stream.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    /// Rows of new tokens into the pool. `rows` is `[heads, tokens]`.
    pub fn store(
        &self,
        pool: &Pool,
        keys: DeviceView<'_>,
        values: DeviceView<'_>,
        rows: Part<'_>,
    ) -> Result<()> {
        let [heads, tokens, dim] = keys.shape();
        assert_eq!(
            (rows.words, dim, values.shape()),
            (heads * tokens, pool.dim as usize, keys.shape())
        );
        let call = StoreCall {
            pool: pool.raw(),
            keys: keys.raw(),
            values: values.raw(),
            rows: rows.address,
            heads: heads as u32,
            tokens: tokens as u32,
        };
        // SAFETY: the views hold what their shapes say, `rows` holds a number for each of their rows, and each number
        // is of a row of the pool, or `NO_ROW`, as `Plan` makes them.
        unsafe { self.launch(self.store, grid(warps(heads * tokens), 0), &call) }
    }

    /// Moves rows within the pool: pairs of from and to.
    pub fn shift(&self, pool: &Pool, rows: Part<'_>) -> Result<()> {
        let call = MoveCall { pool: pool.raw(), rows: rows.address, count: rows.words as u64 / 2 };
        // SAFETY: `rows` holds pairs of rows of the pool, no row twice, as the tables' moves are.
        unsafe { self.launch(self.shift, grid(warps(rows.words / 2), 0), &call) }
    }

    /// # Safety
    /// `call` must be the argument of `kernel`, and its addresses must hold what the kernel reads and writes until it
    /// has run. A kernel that overlaps must wait for the one before by itself.
    unsafe fn launch<T>(&self, kernel: sys::CUfunction, grid: Grid, call: &T) -> Result<()> {
        if grid.blocks == 0 {
            return Ok(());
        }
        self.bind()?;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: u32::try_from(grid.blocks).unwrap_or(u32::MAX).min(i32::MAX as u32),
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut overlap,
            numAttrs: grid.overlaps.into(),
        };
        let mut arguments = [std::ptr::from_ref(call).cast_mut().cast::<c_void>()];
        let (arguments, extra) = (arguments.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the driver copies the argument before it returns; the rest is the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&raw const config, kernel, arguments, extra) }
            .result()
            .map_err(failed("cuLaunchKernelEx"))
    }

    fn sizes(&self, kernel: sys::CUfunction, count: usize) -> Result<Vec<u32>> {
        let room = self.room(count * 4)?;
        // SAFETY: the kernel writes `count` numbers to the address that is its only argument.
        unsafe { self.launch(kernel, grid(1, 0), &room.address) }?;
        self.download(&room, count)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let Ok(()) = self.bind() else { return };
        for &module in &self.modules {
            // SAFETY: nothing else names the module's functions, and unloading waits for what still runs.
            self.context.record_err(unsafe { result::module::unload(module) });
        }
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
struct Grid {
    blocks: usize,
    threads: u32,
    /// Bytes of dynamic shared memory.
    shared: u32,
    overlaps: bool,
}

/// A plain kernel's.
fn grid(blocks: usize, shared: usize) -> Grid {
    Grid { blocks, threads: BLOCK, shared: shared as u32, overlaps: false }
}

/// Blocks for `rows` rows of a warp each; kernels go on from there.
fn warps(rows: usize) -> usize {
    rows.div_ceil(4).min(1 << 16)
}

/// Memory on the card.
#[derive(Debug)]
pub struct Room {
    context: Arc<CudaContext>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Room {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of its 32-bit words.
    pub fn whole(&self) -> Part<'_> {
        self.part(0, self.bytes / 4)
    }

    /// Its front, as `[heads, tokens, dim]`.
    pub fn view(&self, dtype: Dtype, shape: [usize; 3]) -> Result<DeviceView<'_>> {
        let bytes = shape.iter().product::<usize>() * dtype.bytes();
        assert!(bytes <= self.bytes, "a view lies within its room");
        let strides = [shape[1] * shape[2], shape[2]];
        // SAFETY: the room holds the shape and lives as long as the view; whatever bits it holds are numbers.
        unsafe { DeviceView::at(self.address, dtype, shape, strides) }
    }

    /// Its front, as f32 `[heads, tokens, dim]` to write to.
    pub fn view_mut(&mut self, shape: [usize; 3]) -> Result<DeviceViewMut<'_>> {
        assert!(shape.iter().product::<usize>() * 4 <= self.bytes, "a view lies within its room");
        // SAFETY: as above, and the room is borrowed alone.
        unsafe { DeviceViewMut::at(self.address, Dtype::F32, shape) }
    }

    /// Some of its 32-bit words.
    pub fn part(&self, first: usize, words: usize) -> Part<'_> {
        assert!((first + words) * 4 <= self.bytes, "a part lies within its room");
        Part { address: self.address + first as u64 * 4, words, room: PhantomData }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.address != 0 && self.context.bind_to_thread().is_ok() {
            // SAFETY: the address came from `malloc_sync` and goes once; freeing waits for what still uses it.
            self.context.record_err(unsafe { result::free_sync(self.address) });
        }
    }
}

/// 32-bit words in a [`Room`].
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    address: u64,
    words: usize,
    room: PhantomData<&'a Room>,
}

/// The pages.
#[derive(Debug)]
pub struct Pool {
    pub room: Room,
    /// As the kernels number types.
    pub dtype: u32,
    pub page_size: u32,
    pub dim: u32,
}

impl Pool {
    fn raw(&self) -> RawPool {
        let Self { dtype, page_size, dim, .. } = *self;
        RawPool { data: self.room.address, dtype, page_size, dim, unused: 0 }
    }

    /// The type of the queries that fast attention has for it: eight-bit keys meet theirs in bf16.
    fn queries(&self) -> u32 {
        if self.dtype == Dtype::F8.code() { Dtype::Bf16.code() } else { self.dtype }
    }
}

/// What may be copied to the card and back as it is.
///
/// # Safety
/// Any bits are a value, and there is no padding.
pub unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: a number of 16 bits, transparent.
unsafe impl Plain for half::bf16 {}
// SAFETY: as above.
unsafe impl Plain for half::f16 {}

// Mirrors of the structs in kernels/attend.cuh and of the kernels' arguments.

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct RawView {
    pub data: u64,
    pub head_stride: i64,
    pub token_stride: i64,
    pub dtype: u32,
    pub unused: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawPool {
    data: u64,
    dtype: u32,
    page_size: u32,
    dim: u32,
    unused: u32,
}

#[repr(C)]
struct StoreCall {
    pool: RawPool,
    keys: RawView,
    values: RawView,
    rows: u64,
    heads: u32,
    tokens: u32,
}

#[repr(C)]
struct MoveCall {
    pool: RawPool,
    rows: u64,
    count: u64,
}

/// Sizes of the structs, in the order in which the kernels give theirs.
const MIRRORED: [u32; 8] = [
    size_of::<RawView>() as u32,
    size_of::<RawPool>() as u32,
    size_of::<StoreCall>() as u32,
    size_of::<MoveCall>() as u32,
    4 * HEAD_WORDS as u32,
    size_of::<AttendCall>() as u32,
    16,
    size_of::<StreamCall>() as u32,
];
