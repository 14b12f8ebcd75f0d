//! The books of one GPU's memory: what is promised, what is in use, and what for.
//!
//! Bytes are reserved before they are allocated, and a reservation that does not fit is refused
//! with numbers: an engine that keeps its books never meets the allocator's own refusal. A
//! reservation becomes a commitment when the allocation has succeeded; dropping either gives the
//! bytes back.

use crate::request::RequestError;
use crate::units::ByteSize;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why bytes are not promised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// The pool has not that many left.
    #[error(
        "{purpose} on GPU {ordinal}: {} are needed, and {} of the {} that may be used are free",
        ByteSize(*need_bytes), ByteSize(*free_bytes), ByteSize(*capacity_bytes)
    )]
    DoesNotFit {
        /// Whose memory.
        ordinal: usize,
        /// What for.
        purpose: &'static str,
        /// Bytes asked for.
        need_bytes: u64,
        /// Bytes left.
        free_bytes: u64,
        /// Bytes of the whole pool.
        capacity_bytes: u64,
    },
}

impl LedgerError {
    /// The refusal of a request or a model, with what to do.
    pub fn refusal(&self, suggest: &str) -> RequestError {
        let Self::DoesNotFit { ordinal, purpose, need_bytes, free_bytes, .. } = self;
        RequestError::InsufficientMemory {
            device: format!("GPU {ordinal} ({purpose})"),
            need: *need_bytes,
            free: *free_bytes,
            suggest: suggest.to_owned(),
        }
    }
}

/// Bytes of one purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PurposeBytes {
    /// Promised, not yet allocated.
    pub reserved_bytes: u64,
    /// Allocated.
    pub committed_bytes: u64,
}

/// The state of a ledger at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LedgerReport {
    /// Whose memory.
    pub ordinal: usize,
    /// Bytes of the pool.
    pub capacity_bytes: u64,
    /// Neither reserved nor committed.
    pub free_bytes: u64,
    /// Most bytes ever reserved and committed together.
    pub peak_bytes: u64,
    /// By purpose, those with bytes only.
    pub purposes: BTreeMap<&'static str, PurposeBytes>,
}

#[derive(Debug, Default)]
struct Books {
    purposes: BTreeMap<&'static str, PurposeBytes>,
    used_bytes: u64,
    peak_bytes: u64,
}

#[derive(Debug)]
struct Shared {
    ordinal: usize,
    capacity_bytes: u64,
    books: Mutex<Books>,
}

impl Shared {
    /// The books are plain numbers that are consistent between any two statements which can panic,
    /// so those of a panicked thread are still right.
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The books of one pool. Copies share them.
#[derive(Clone, Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
}

impl Ledger {
    /// A pool of `capacity_bytes` of the GPU of this ordinal, all free.
    pub fn new(ordinal: usize, capacity_bytes: u64) -> Ledger {
        let books = Mutex::new(Books::default());
        Ledger { shared: Arc::new(Shared { ordinal, capacity_bytes, books }) }
    }

    /// Promises `bytes` for `purpose`, a label that reports show, such as `weights`.
    ///
    /// # Errors
    /// [`LedgerError::DoesNotFit`] when fewer are free; nothing is promised then.
    pub fn reserve(&self, purpose: &'static str, bytes: u64) -> Result<Reservation, LedgerError> {
        let mut books = self.shared.books();
        let free_bytes = self.shared.capacity_bytes - books.used_bytes;
        if bytes > free_bytes {
            return Err(LedgerError::DoesNotFit {
                ordinal: self.shared.ordinal,
                purpose,
                need_bytes: bytes,
                free_bytes,
                capacity_bytes: self.shared.capacity_bytes,
            });
        }
        books.used_bytes += bytes;
        books.peak_bytes = books.peak_bytes.max(books.used_bytes);
        books.purposes.entry(purpose).or_default().reserved_bytes += bytes;
        drop(books);
        let entry =
            Entry { shared: Arc::clone(&self.shared), purpose, bytes, kind: Kind::Reserved };
        Ok(Reservation { entry })
    }

    /// Bytes that are neither reserved nor committed.
    pub fn free_bytes(&self) -> u64 {
        self.shared.capacity_bytes - self.shared.books().used_bytes
    }

    /// All books at one moment.
    pub fn report(&self) -> LedgerReport {
        let books = self.shared.books();
        let in_use =
            |(_, bytes): &(&&'static str, &PurposeBytes)| **bytes != PurposeBytes::default();
        LedgerReport {
            ordinal: self.shared.ordinal,
            capacity_bytes: self.shared.capacity_bytes,
            free_bytes: self.shared.capacity_bytes - books.used_bytes,
            peak_bytes: books.peak_bytes,
            purposes: books.purposes.iter().filter(in_use).map(|(k, v)| (*k, *v)).collect(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reserved,
    Committed,
}

impl Kind {
    fn column(self, bytes: &mut PurposeBytes) -> &mut u64 {
        match self {
            Kind::Reserved => &mut bytes.reserved_bytes,
            Kind::Committed => &mut bytes.committed_bytes,
        }
    }
}

/// One line in the books; dropping it strikes it out.
#[derive(Debug)]
struct Entry {
    shared: Arc<Shared>,
    purpose: &'static str,
    bytes: u64,
    kind: Kind,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut books = self.shared.books();
        books.used_bytes -= self.bytes;
        if let Some(purpose) = books.purposes.get_mut(self.purpose) {
            *self.kind.column(purpose) -= self.bytes;
        }
    }
}

/// Promised bytes. Dropping it gives them back.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its bytes back"]
pub struct Reservation {
    entry: Entry,
}

impl Reservation {
    /// Bytes promised.
    pub fn bytes(&self) -> u64 {
        self.entry.bytes
    }

    /// Writes the bytes down as allocated.
    pub fn commit(mut self) -> Commitment {
        let entry = &mut self.entry;
        if let Some(purpose) = entry.shared.books().purposes.get_mut(entry.purpose) {
            purpose.reserved_bytes -= entry.bytes;
            purpose.committed_bytes += entry.bytes;
        }
        entry.kind = Kind::Committed;
        Commitment { entry: self.entry }
    }
}

/// Allocated bytes: it lives as long as the allocation. Dropping it gives them back.
#[derive(Debug)]
#[must_use = "dropping a commitment gives its bytes back"]
pub struct Commitment {
    entry: Entry,
}

impl Commitment {
    /// Bytes allocated.
    pub fn bytes(&self) -> u64 {
        self.entry.bytes
    }
}
