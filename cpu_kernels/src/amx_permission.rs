//! Whether this process may use AMX. Its registers hold 8 KiB, which Linux (5.16 and later) saves
//! on context switches only for processes that asked: `arch_prctl(ARCH_REQ_XCOMP_PERM)`, see the
//! kernel's "Using XSTATE features in user space applications".

/// Whether the CPU has AMX with bf16, the system has granted it to this process, and it multiplies
/// right: emulators and hypervisors have announced what they did not do. The first call asks.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) fn granted() -> bool {
    static GRANTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *GRANTED.get_or_init(|| has_bf16_tiles() && request() && crate::matmul::amx::multiplies())
}

/// No other system is known to need no permission.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) fn granted() -> bool {
    false
}

/// CPUID leaf 7: AMX-BF16 is bit 22 of EDX, AMX-TILE bit 24. XCR0 has bits 17 (tile configuration)
/// and 18 (tile data) when the system can save them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_bf16_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const TILES: u32 = 1 << 22 | 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    let leaves = __cpuid(0).eax;
    if leaves < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    __cpuid_count(7, 0).edx & TILES == TILES && {
        let (low, _high): (u32, u32);
        // SAFETY: the system has enabled XGETBV (OSXSAVE).
        unsafe {
            std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _high,
                options(nomem, nostack, preserves_flags));
        }
        low >> 17 & 3 == 3
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call reads two integers; it fails where the kernel does not know it.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}
