//! A stand-in for libcuda and for the management library, as a shared library of its own, so that
//! the door can be tested on machines without a GPU. `FAKE_CUDA_INIT`, `FAKE_CUDA_VERSION` and
//! `FAKE_CUDA_DEVICES` choose its answers, `FAKE_CUDA_FULL` is the GPU on which nothing is free,
//! `FAKE_CUDA_FAILS` the function that fails with `FAKE_CUDA_CODE`, by default for want of memory.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// `CUDA_ERROR_OUT_OF_MEMORY`
const OUT_OF_MEMORY: i32 = 2;
/// Contexts on each GPU now.
static CONTEXTS: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
/// A process that holds memory of all GPUs, and how much.
const HOLDER: (u32, u64) = (4_242, 6 << 30);
/// What this process's context takes.
const CONTEXT_BYTES: u64 = 512 << 20;

/// `nvmlProcessInfo_t`
#[repr(C)]
pub struct ProcessInfo {
    pid: u32,
    used_bytes: u64,
    instances: [u32; 2],
}

fn setting(name: &str, default: i32) -> i32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What a function fails with, if it is the one.
fn failure(function: &str) -> Option<i32> {
    let is_it = std::env::var("FAKE_CUDA_FAILS").is_ok_and(|name| name == function);
    is_it.then(|| setting("FAKE_CUDA_CODE", OUT_OF_MEMORY))
}

/// A handle that nobody looks behind.
fn handle() -> *mut c_void {
    std::ptr::dangling_mut::<u64>().cast()
}

/// Writes through a pointer of the caller; success.
///
/// # Safety
/// `to` is valid for a write of `T`.
unsafe fn answer<T>(to: *mut T, value: T) -> i32 {
    // SAFETY: the caller's promise, which is that of the real function.
    unsafe { to.write(value) };
    0
}

macro_rules! answers {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $body:block)*) => { $(
        /// # Safety
        /// As the real function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> i32 {
            if let Some(code) = failure(stringify!($name)) {
                return code;
            }
            // SAFETY: the promise of the real function.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    )* };
}

answers! {
    fn cuInit(_flags: u32) { setting("FAKE_CUDA_INIT", 0) }
    fn cuDriverGetVersion(version: *mut c_int) {
        answer(version, setting("FAKE_CUDA_VERSION", 13_000))
    }
    fn cuDeviceGetCount(count: *mut c_int) { answer(count, setting("FAKE_CUDA_DEVICES", 2)) }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) { answer(device, ordinal) }
    fn cuDeviceGetName(name: *mut c_char, _len: c_int, device: c_int) {
        answer(name.cast::<[u8; 7]>(), *if device == 0 { b"Fake 0\0" } else { b"Fake 1\0" })
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) {
        answer(value, match attribute { 75 => 9, 76 => 0, 16 => 132, 33 => device, _ => 0 })
    }
    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) {
        if device == setting("FAKE_CUDA_FULL", -1) {
            return OUT_OF_MEMORY;
        }
        CONTEXTS[device as usize].fetch_add(1, SeqCst);
        answer(context, handle())
    }
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        CONTEXTS[device as usize].fetch_sub(1, SeqCst);
        0
    }
    fn cuCtxSetCurrent(_context: *mut c_void) { 0 }
    fn cuCtxGetCurrent(context: *mut *mut c_void) { answer(context, std::ptr::null_mut()) }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        answer(free, 60 << 30) + answer(total, 80 << 30)
    }
    fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) { answer(stream, handle()) }
    fn cuStreamQuery(_stream: *mut c_void) { 0 }
    fn cuStreamSynchronize(_stream: *mut c_void) { 0 }
    fn cuStreamDestroy_v2(_stream: *mut c_void) { 0 }
    fn cuModuleLoadData(module: *mut *mut c_void, _image: *const c_void) {
        answer(module, handle())
    }
    fn cuModuleUnload(_module: *mut c_void) { 0 }
    fn cuModuleGetFunction(
        function: *mut *mut c_void, _module: *mut c_void, _name: *const c_char
    ) {
        answer(function, handle())
    }
    fn cuModuleGetFunctionCount(count: *mut c_uint, _module: *mut c_void) { answer(count, 3) }
    fn cuModuleEnumerateFunctions(
        functions: *mut *mut c_void, count: c_uint, _module: *mut c_void
    ) {
        (0..count as usize).for_each(|at| functions.add(at).write(handle()));
        0
    }
    fn cuFuncGetModule(module: *mut *mut c_void, _function: *mut c_void) {
        answer(module, handle())
    }
    fn cuFuncGetAttribute(value: *mut c_int, _attribute: c_int, _function: *mut c_void) {
        answer(value, 90)
    }
    fn cuFuncSetAttribute(_function: *mut c_void, _attribute: c_int, _value: c_int) { 0 }
    fn cuFuncLoad(_function: *mut c_void) { 0 }
    fn cuMemAlloc_v2(pointer: *mut u64, _bytes: usize) { answer(pointer, 4096) }
    fn cuMemFree_v2(_pointer: u64) { 0 }
    fn cuMemsetD8Async(_at: u64, _value: u8, _bytes: usize, _stream: *mut c_void) { 0 }
    fn cuMemHostRegister_v2(_at: *mut c_void, _bytes: usize, _flags: c_uint) { 0 }
    fn cuMemHostUnregister(_at: *mut c_void) { 0 }
    fn cuCtxSynchronize() { 0 }
    fn cuGetErrorString(_code: i32, text: *mut *const c_char) { answer(text, c"a fake".as_ptr()) }
    fn cuGetErrorName(_code: i32, text: *mut *const c_char) { answer(text, c"FAKE".as_ptr()) }
    fn nvmlInit_v2() { 0 }
    fn nvmlShutdown() { 0 }
    fn nvmlDeviceGetHandleByPciBusId_v2(address: *const c_char, device: *mut *const AtomicUsize) {
        let found = (0..CONTEXTS.len()).find(|bus| {
            format!("00000000:{bus:02x}:00.0").as_bytes() == CStr::from_ptr(address).to_bytes()
        });
        // What NVML says of an address that nobody has.
        found.map_or(6, |bus| answer(device, &raw const CONTEXTS[bus]))
    }
    fn nvmlDeviceGetComputeRunningProcesses_v3(
        contexts: *const AtomicUsize, count: *mut c_uint, infos: *mut ProcessInfo
    ) {
        let ours = (std::process::id(), CONTEXT_BYTES);
        let listed = [HOLDER, ours];
        let listed = &listed[..if (*contexts).load(SeqCst) > 0 { 2 } else { 1 }];
        for (at, (pid, used_bytes)) in listed.iter().enumerate() {
            let info = ProcessInfo { pid: *pid, used_bytes: *used_bytes, instances: [0; 2] };
            infos.add(at).write(info);
        }
        answer(count, listed.len() as c_uint)
    }
    fn nvmlDeviceGetGraphicsRunningProcesses_v3(
        _contexts: *const AtomicUsize, count: *mut c_uint, _infos: *mut ProcessInfo
    ) {
        answer(count, 0)
    }
}
