//! A stand-in for libcuda, as a shared library of its own, so that the door can be tested on
//! machines without a GPU. `FAKE_CUDA_INIT` and `FAKE_CUDA_VERSION` choose its answers.

use std::ffi::{c_char, c_int, c_void};

fn setting(name: &str, default: i32) -> i32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
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
    ($(fn $name:ident($($arg:ident: $type:ty),*) { $body:expr })*) => { $(
        /// # Safety
        /// As the real function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> i32 {
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
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
        answer(value, match attribute { 75 => 9, 76 => 0, 16 => 132, _ => 0 })
    }
    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) {
        answer(context, std::ptr::dangling_mut::<u64>().cast())
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { 0 }
    fn cuCtxSetCurrent(_context: *mut c_void) { 0 }
    fn cuCtxGetCurrent(context: *mut *mut c_void) { answer(context, std::ptr::null_mut()) }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        answer(free, 60 << 30) + answer(total, 80 << 30)
    }
    fn cuGetErrorString(_code: i32, text: *mut *const c_char) { answer(text, c"a fake".as_ptr()) }
    fn cuGetErrorName(_code: i32, text: *mut *const c_char) { answer(text, c"FAKE".as_ptr()) }
}
