//! CUDA's driver, as far as NCCL and copies beside the computation need it.
//!
//! The context is the device's primary one, which libtorch uses too, so memory and streams of both are one
//! another's.

use super::error::NcclError;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

/// One GPU of this host, ready for calls from any thread.
#[derive(Debug)]
pub struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: a context is a handle that the driver allows any thread to make current.
unsafe impl Send for Device {}
// SAFETY: as above; nothing here changes after `open`.
unsafe impl Sync for Device {}

/// Work of a device that runs in order.
#[derive(Debug)]
pub struct Stream {
    handle: sys::CUstream,
    owned: bool,
    device: Arc<Device>,
}

// SAFETY: the driver allows a stream's use from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; concurrent calls are ordered by the driver.
unsafe impl Sync for Stream {}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    handle: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: the driver allows an event's use from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Device {
    /// The GPU that CUDA calls `index`. Fails with the reason on a host without CUDA's driver or that GPU.
    pub fn open(index: usize) -> Result<Arc<Self>, NcclError> {
        // cudarc panics where the driver's library is missing, so that is asked first.
        // SAFETY: opening the driver's library runs its initializers only.
        if !unsafe { sys::is_culib_present() } {
            return Err(NcclError::Unavailable(
                "no CUDA driver here (libcuda.so.1): install NVIDIA's driver, or use --device cpu".to_owned(),
            ));
        }
        check("starting", result::init())?;
        let ordinal = i32::try_from(index).unwrap_or(i32::MAX);
        let handle = check("looking for the GPU", result::device::get(ordinal))?;
        // SAFETY: `handle` is a device of this driver; `drop` releases what is retained here.
        let context = check("opening the GPU", unsafe { result::primary_ctx::retain(handle) })?;
        Ok(Arc::new(Self { handle, context }))
    }

    /// Makes this device the calling thread's current one, as CUDA's and NCCL's calls expect. What is offered here
    /// does so by itself.
    pub fn bind(&self) -> Result<(), NcclError> {
        // SAFETY: the context is retained for as long as `self` lives.
        check("selecting the GPU", unsafe { result::ctx::set_current(self.context) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: undoes the retain of `open`, once. A failure leaves the context to the process's end.
        let _ = unsafe { result::primary_ctx::release(self.handle) };
    }
}

impl Stream {
    /// A stream that does not wait for the default one.
    pub fn new(device: &Arc<Device>) -> Result<Self, NcclError> {
        device.bind()?;
        let kind = result::stream::StreamKind::NonBlocking;
        let handle = check("making a stream", result::stream::create(kind))?;
        Ok(Self { handle, owned: true, device: device.clone() })
    }

    /// The default stream, on which libtorch computes unless told otherwise.
    pub fn default_of(device: &Arc<Device>) -> Self {
        Self { handle: ptr::null_mut(), owned: false, device: device.clone() }
    }

    /// A stream that somebody else made and owns.
    ///
    /// # Safety
    /// `handle` is a `cudaStream_t` of this device that lives as long as the result.
    pub unsafe fn borrowed(device: &Arc<Device>, handle: *mut c_void) -> Self {
        Self { handle: handle.cast(), owned: false, device: device.clone() }
    }

    /// Lets this stream's later work wait for `event`. Does not block the caller.
    pub fn wait_for(&self, event: &Event) -> Result<(), NcclError> {
        self.device.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both handles live as long as their owners.
        check("making a stream wait", unsafe { result::stream::wait_event(self.handle, event.handle, flags) })
    }

    /// Copies `bytes` within the device, in order with the stream's work.
    ///
    /// # Safety
    /// Both ranges are this device's memory, do not overlap, and stay allocated until the copy is done.
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), NcclError> {
        self.device.bind()?;
        // SAFETY: as the caller promises.
        check("copying on the GPU", unsafe { result::memcpy_dtod_async(to, from, bytes, self.handle) })
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// As NCCL takes it.
    pub(super) fn raw(&self) -> *mut c_void {
        self.handle.cast()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned && self.device.bind().is_ok() {
            // SAFETY: made by `new` and destroyed once; work in progress goes on to its end.
            let _ = unsafe { result::stream::destroy(self.handle) };
        }
    }
}

impl Event {
    /// The point after all that `stream` has been given so far.
    pub fn after(stream: &Stream) -> Result<Self, NcclError> {
        stream.device.bind()?;
        // Without timing, querying an event takes no lock of the driver.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let handle = check("making an event", result::event::create(flags))?;
        let event = Self { handle, device: stream.device.clone() };
        // SAFETY: both handles are live.
        check("recording an event", unsafe { result::event::record(event.handle, stream.handle) })?;
        Ok(event)
    }

    /// Whether the work before this point is done. Fails if it failed.
    pub fn is_done(&self) -> Result<bool, NcclError> {
        self.device.bind()?;
        // SAFETY: the handle is live.
        match unsafe { result::event::query(self.handle) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            other => check("computing", other).map(|()| true),
        }
    }

    /// Waits for the point while `go_on` says so, asking again and again; whether it was reached.
    pub fn wait_while(&self, mut go_on: impl FnMut() -> bool) -> Result<bool, NcclError> {
        let mut rest = Rest::default();
        while !self.is_done()? {
            if !go_on() {
                return Ok(false);
            }
            rest.take();
        }
        Ok(true)
    }
}

/// Pauses between looks at the GPU: none at first, since a small reduction takes tens of microseconds.
#[derive(Default)]
pub(super) struct Rest {
    looks: u32,
}

impl Rest {
    pub(super) fn take(&mut self) {
        /// Looks before the thread sleeps: a few hundred microseconds of them.
        const EAGER: u32 = 500;
        self.looks = self.looks.saturating_add(1);
        if self.looks < EAGER {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `after` and destroyed once; the driver keeps what still waits for it.
            let _ = unsafe { result::event::destroy(self.handle) };
        }
    }
}

fn check<T>(doing: &'static str, result: Result<T, DriverError>) -> Result<T, NcclError> {
    result.map_err(|error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        NcclError::Cuda { doing, reason: text.unwrap_or_else(|_| format!("error {}", error.0 as u32)) }
    })
}
