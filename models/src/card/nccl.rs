//! Sums over cards, by NCCL, which is looked for when it is needed.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use cudarc::driver::CudaStream;
use libloading::os::unix::{Library, Symbol};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

const LIBRARY: &str = "libnccl.so.2";
/// `ncclSum`.
const SUM: c_int = 0;
/// How long a communicator that is in use may be waited for before it is left as it is.
const PATIENCE: Duration = Duration::from_secs(1);

type Handle = *mut c_void;
type InitAll = unsafe extern "C" fn(*mut Handle, c_int, *const c_int) -> c_int;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    Handle,
    *mut c_void,
) -> c_int;
type End = unsafe extern "C" fn(Handle) -> c_int;
type Text = unsafe extern "C" fn(c_int) -> *const c_char;

/// The functions of the library; they live as long as this.
#[derive(Debug)]
struct Nccl {
    init_all: Symbol<InitAll>,
    all_reduce: Symbol<AllReduce>,
    abort: Symbol<End>,
    destroy: Symbol<End>,
    text: Symbol<Text>,
    _library: Library,
}

impl Nccl {
    fn open(library: &str) -> Result<Self> {
        let missing = |error: libloading::Error| {
            use std::error::Error as _;
            let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            Error::Nccl { reason }
        };
        // SAFETY: NCCL may be loaded at any time; it is the one that libtorch has loaded already, if it has. The types are
        // those of nccl.h, the same in all versions 2.
        unsafe {
            let library = Library::new(library).map_err(missing)?;
            Ok(Self {
                init_all: library.get(b"ncclCommInitAll\0").map_err(missing)?,
                all_reduce: library.get(b"ncclAllReduce\0").map_err(missing)?,
                abort: library.get(b"ncclCommAbort\0").map_err(missing)?,
                destroy: library.get(b"ncclCommDestroy\0").map_err(missing)?,
                text: library.get(b"ncclGetErrorString\0").map_err(missing)?,
                _library: library,
            })
        }
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: it takes any number, and gives a text that is never freed.
        let text = unsafe { CStr::from_ptr((self.text)(code)) };
        Err(Error::NcclCall { call, reason: text.to_string_lossy().into_owned() })
    }
}

/// A card's end of a communicator.
#[derive(Debug)]
struct Comm(Handle);

// SAFETY: NCCL lets any thread call, one at a time for each communicator, which the lock around it sees to.
unsafe impl Send for Comm {}

/// The first cards of the machine, as parts of one communicator.
#[derive(Debug)]
pub(super) struct Clique {
    nccl: Nccl,
    comms: Vec<Mutex<Option<Comm>>>,
}

impl Clique {
    /// Of cards 0 up to `cards`.
    ///
    /// # Errors
    /// [`Error::Nccl`] where it is missing; [`Error::NcclCall`] where it cannot connect the cards.
    pub fn new(cards: usize) -> Result<Self> {
        let nccl = Nccl::open(LIBRARY)?;
        let mut handles: Vec<Handle> = vec![std::ptr::null_mut(); cards];
        // SAFETY: there is room for a handle a card, and without a list the cards are the first.
        let code =
            unsafe { (nccl.init_all)(handles.as_mut_ptr(), cards as c_int, std::ptr::null()) };
        nccl.check("ncclCommInitAll", code)?;
        let comms = handles.into_iter().map(|handle| Mutex::new(Some(Comm(handle)))).collect();
        Ok(Self { nccl, comms })
    }

    /// Queues the sum over the cards of the first `elements` of `tensor`, a contiguous one on card `rank`, in place, on a
    /// stream of that card. All cards must queue the same sums in the same order.
    pub fn sum(
        &self,
        rank: usize,
        tensor: &Tensor,
        elements: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let kind = match tensor.kind() {
            Kind::Float => 7,
            Kind::BFloat16 => 9,
            _ => return Err(super::memory::layout(tensor, "f32 or bf16 on the card")),
        };
        let at = super::memory::address(tensor, tensor.kind(), elements)? as *mut c_void;
        let comm = self.comms[rank].lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Comm(handle)) = &*comm else {
            let cause = "its communicator was given up".to_owned();
            return Err(Error::RankLost { rank, cause });
        };
        stream.context().bind_to_thread().map_err(super::driver::failed("cuCtxSetCurrent"))?;
        let queue = stream.cu_stream().cast();
        // SAFETY: the tensor holds the elements, on the card of the communicator and of the stream, and lives until the sum is
        // done: what frees it is ordered behind.
        let code = unsafe { (self.nccl.all_reduce)(at, at, elements, kind, SUM, *handle, queue) };
        self.nccl.check("ncclAllReduce", code)
    }

    /// Ends what is under way on all cards.
    pub fn give_up(&self) {
        for comm in &self.comms {
            let start = Instant::now();
            let mut comm = loop {
                match comm.try_lock() {
                    Ok(comm) => break comm,
                    Err(TryLockError::Poisoned(comm)) => break comm.into_inner(),
                    Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(TryLockError::WouldBlock) => return,
                }
            };
            if let Some(Comm(handle)) = comm.take() {
                // SAFETY: the handle is taken, so nobody uses it again.
                unsafe { (self.nccl.abort)(handle) };
            }
        }
    }
}

impl Drop for Clique {
    fn drop(&mut self) {
        for comm in &mut self.comms {
            let comm = comm.get_mut().unwrap_or_else(PoisonError::into_inner);
            if let Some(Comm(handle)) = comm.take() {
                // SAFETY: as above; graphs that hold sums are gone, for each holds this.
                unsafe { (self.nccl.destroy)(handle) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_is_missing_the_error_says_where_it_is_found() {
        let error = Nccl::open("libnccl-is-not-here.so.2").unwrap_err().to_string();
        assert!(error.contains("it cannot be loaded: libnccl-is-not-here.so.2"), "{error}");
        assert!(error.ends_with("on LD_LIBRARY_PATH, or use one card"), "{error}");
    }
}
