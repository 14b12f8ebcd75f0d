//! The door to a stage's own KV blocks, and host memory that they are copied from and to.

use crate::executor::ExecutorError;
use crate::memory::{AlignedBytes, HugePages};
use crate::units::BlockId;
use std::ops::{Deref, DerefMut};

/// What keeps host memory known to a device, if that is needed.
pub type Registration = Option<Box<dyn Send>>;

/// The KV blocks of a stage's device tier, as another thread copies them while steps run.
pub trait KvBlocks: Send + Sync {
    /// Bytes of a block: keys and values of all layers.
    fn block_bytes(&self) -> usize;

    /// Blocks of the tier.
    fn device_blocks(&self) -> usize;

    /// What is asked of the system for host memory behind the tier.
    fn huge_pages(&self) -> HugePages;

    /// Makes host memory known to the device, so that it copies from and to it by itself; `None`
    /// where it copies from and to any.
    ///
    /// # Safety
    /// The memory stays mapped until what is returned is dropped.
    ///
    /// # Errors
    /// The driver refuses.
    unsafe fn register(&self, memory: &[u8]) -> Result<Registration, ExecutorError>;

    /// Copies blocks to host memory, each to [`KvBlocks::block_bytes`] bytes, and returns when all
    /// are there.
    ///
    /// # Safety
    /// Until it returns nobody else writes the blocks. The memory is registered.
    ///
    /// # Errors
    /// The device fails; what is in host memory then is of no use.
    unsafe fn read(&self, copies: &mut [(BlockId, &mut [u8])]) -> Result<(), ExecutorError>;

    /// Copies blocks from host memory and returns when all are there, for every step that begins
    /// afterwards.
    ///
    /// # Safety
    /// Until it returns nobody else reads or writes the blocks, which differ. The memory is
    /// registered.
    ///
    /// # Errors
    /// The device fails; what is in the blocks then is of no use.
    unsafe fn write(&self, copies: &[(BlockId, &[u8])]) -> Result<(), ExecutorError>;
}

/// Copies device blocks to registered host memory.
///
/// # Errors
/// As of [`KvBlocks::read`].
pub(super) fn read_blocks(
    kv: &dyn KvBlocks,
    copies: &mut [(BlockId, &mut [u8])],
) -> Result<(), ExecutorError> {
    // SAFETY: a block that is read is written by nobody until the result is there: the scheduler's
    // rule (`KvTiers::perform`). Memory was registered before (`HostTier`).
    unsafe { kv.read(copies) }
}

/// Copies device blocks from registered host memory.
///
/// # Errors
/// As of [`KvBlocks::write`].
pub(super) fn write_blocks(
    kv: &dyn KvBlocks,
    copies: &[(BlockId, &[u8])],
) -> Result<(), ExecutorError> {
    // SAFETY: as above, and one that is written is touched by nobody; those of a run differ.
    unsafe { kv.write(copies) }
}

/// Whether a device copies from and to some memory by itself.
enum Access {
    /// Nobody has asked yet.
    Unknown,
    Direct(Registration),
    Refused,
}

/// Host memory that a device may copy from and to by itself.
pub(super) struct HostMemory {
    // Before the memory.
    access: Access,
    bytes: AlignedBytes,
}

impl HostMemory {
    /// Zeroed memory, of which no page exists yet.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(bytes: usize, huge_pages: HugePages) -> Result<Self, ExecutorError> {
        let bytes = AlignedBytes::zeroed(bytes, huge_pages)
            .map_err(|source| ExecutorError::Memory { what: "KV blocks in host memory", source })?;
        Ok(Self { access: Access::Unknown, bytes })
    }

    /// Registers the memory, where that was not tried before.
    ///
    /// # Errors
    /// The driver refuses, this time; later calls do not ask again.
    pub fn register(&mut self, kv: &dyn KvBlocks) -> Result<(), ExecutorError> {
        if let Access::Unknown = self.access {
            self.access = Access::Refused;
            // SAFETY: the memory lives longer than the registration, as the order of fields says.
            self.access = Access::Direct(unsafe { kv.register(&self.bytes)? });
        }
        Ok(())
    }

    /// Has it stay as it is.
    pub fn refuse(&mut self) {
        if let Access::Unknown = self.access {
            self.access = Access::Refused;
        }
    }

    pub fn is_new(&self) -> bool {
        matches!(self.access, Access::Unknown)
    }

    pub fn is_direct(&self) -> bool {
        matches!(self.access, Access::Direct(_))
    }

    pub fn is_pinned(&self) -> bool {
        matches!(self.access, Access::Direct(Some(_)))
    }

    pub fn is_refused(&self) -> bool {
        matches!(self.access, Access::Refused)
    }
}

impl Deref for HostMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for HostMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}
