//! KV blocks on their way between a stage, host memory and a file: against a naive model, with host
//! memory that can't be registered, and with disks that are full, torn or wrong.

#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiers.rs"]
mod tiers;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use proptest::prelude::*;
use stage::{Model, options};
use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tandem::executor::{
    ExecutorError, KvBlocks, KvTiers, Registration, StageOptions, TierBytes, TierOptions,
};
use tandem::memory::HugePages;
use tandem::step::CopyOutcome::{self, Done, Failed};
use tandem::step::Tier::{Device, Disk, Host};
use tandem::tensor::KvDType;
use tandem::units::BlockId;
use tempfile::TempDir;
use tiers::{copy, hold_random_orders, moved, perform};
use tiny_model::{Family, TinyModel};

/// The KV blocks of a stage on the CPU.
fn of_a_stage(family: Family, dtype: KvDType) -> Arc<dyn KvBlocks> {
    let model = Model::from_bytes(&TinyModel::new(family).gguf().bytes());
    let mut options = options(1, 320);
    options.kv.dtype = dtype;
    model.stage(&StageOptions { step_tokens_max: 32, ..options }).kv()
}

fn sizes(host_blocks: usize, disk_blocks: usize, folder: &TempDir) -> TierOptions {
    TierOptions { host_blocks, disk_blocks, disk_folder: folder.path().to_owned() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_orders_move_what_a_naive_model_says(
        seed: u64, host in 1..9_usize, disk in 1..9_usize, kind in 0..4_usize,
    ) {
        let family = [Family::Llama, Family::Gemma3][kind / 2];
        let kv = of_a_stage(family, KvDType::ON_CPU[kind % 2]);
        let folder = TempDir::new().unwrap();
        hold_random_orders(&kv, &sizes(host, disk, &folder), seed);
    }
}

const MIB: usize = 1 << 20;

/// A store whose driver registers a part of what it is asked to, and copies nothing else.
struct Limited {
    blocks: Mutex<Vec<Vec<u8>>>,
    /// Bytes that will still be registered.
    room: Mutex<usize>,
    registered: Arc<Mutex<Vec<Range<usize>>>>,
}

struct Registered(Range<usize>, Arc<Mutex<Vec<Range<usize>>>>);

impl Drop for Registered {
    fn drop(&mut self) {
        self.1.lock().unwrap().retain(|range| *range != self.0);
    }
}

fn addresses(bytes: &[u8]) -> Range<usize> {
    let start = bytes.as_ptr().addr();
    start..start + bytes.len()
}

impl Limited {
    fn new(room: usize) -> Arc<Self> {
        let blocks = Mutex::new(vec![vec![0; MIB]; 5]);
        Arc::new(Self { blocks, room: Mutex::new(room), registered: Arc::default() })
    }

    fn assert_registered(&self, bytes: &[u8]) {
        let wanted = addresses(bytes);
        let registered = self.registered.lock().unwrap();
        let holds = |range: &Range<usize>| range.start <= wanted.start && wanted.end <= range.end;
        assert!(registered.iter().any(holds), "{wanted:?} in {registered:?}");
    }
}

impl KvBlocks for Limited {
    fn block_bytes(&self) -> usize {
        MIB
    }

    fn device_blocks(&self) -> usize {
        self.blocks.lock().unwrap().len()
    }

    fn huge_pages(&self) -> HugePages {
        HugePages::Advise
    }

    unsafe fn register(&self, memory: &[u8]) -> Result<Registration, ExecutorError> {
        // What tests register themselves costs nothing.
        if memory.len() > 5 * MIB {
            let mut room = self.room.lock().unwrap();
            let refused = || ExecutorError::Unsupported { what: "more memory".into() };
            *room = room.checked_sub(memory.len()).ok_or_else(refused)?;
        }
        self.registered.lock().unwrap().push(addresses(memory));
        Ok(Some(Box::new(Registered(addresses(memory), Arc::clone(&self.registered)))))
    }

    unsafe fn read(&self, copies: &mut [(BlockId, &mut [u8])]) -> Result<(), ExecutorError> {
        for (block, to) in copies {
            self.assert_registered(to);
            to.copy_from_slice(&self.blocks.lock().unwrap()[block.index()]);
        }
        Ok(())
    }

    unsafe fn write(&self, copies: &[(BlockId, &[u8])]) -> Result<(), ExecutorError> {
        for (block, from) in copies {
            self.assert_registered(from);
            self.blocks.lock().unwrap()[block.index()].copy_from_slice(from);
        }
        Ok(())
    }
}

#[test]
fn memory_is_registered_as_it_fills_and_blocks_beyond_what_the_driver_gives_take_a_detour() {
    let folder = TempDir::new().unwrap();
    // The detour's 16 MiB, the first 512, one chunk of 16, and 14 more.
    let kv = Limited::new(558 * MIB);
    let mut tiers = KvTiers::new(kv.clone(), &sizes(600, 3, &folder)).unwrap();
    let all = TierBytes {
        host: 600 * MIB,
        host_pinned: 512 * MIB,
        host_pageable: 0,
        bounce: 16 * MIB,
        disk: 3 * MIB,
    };
    assert_eq!(tiers.bytes(), all);
    // Chunks are of 16 blocks. There is room for the last, of 8, too, but nobody asks again.
    moved(&mut tiers, &[((Device, 1), (Host, 0)), ((Device, 0), (Host, 527))]);
    assert_eq!(tiers.bytes(), TierBytes { host_pinned: 528 * MIB, ..all });
    moved(&mut tiers, &[((Device, 0), (Host, 528)), ((Device, 1), (Host, 599))]);
    let pageable = TierBytes { host_pinned: 528 * MIB, host_pageable: 24 * MIB, ..all };
    assert_eq!(tiers.bytes(), pageable);
    drop(tiers);
    assert!(kv.registered.lock().unwrap().is_empty());
}

#[test]
fn memory_is_registered_ahead_of_use_until_the_driver_gives_no_more() {
    let folder = TempDir::new().unwrap();
    // The detour's 16 MiB, and 560 of 640.
    let kv = Limited::new(576 * MIB);
    let mut tiers = KvTiers::new(kv.clone(), &sizes(640, 3, &folder)).unwrap();
    let pinned = |tiers: &KvTiers| tiers.bytes().host_pinned / MIB;
    assert!(!tiers.prepare_ahead());
    assert_eq!(pinned(&tiers), 512, "nothing is in use");
    moved(&mut tiers, &[((Device, 1), (Host, 3))]);
    assert!(tiers.prepare_ahead());
    assert!(!tiers.prepare_ahead());
    assert_eq!(pinned(&tiers), 528, "512 behind the 16 in use");
    moved(&mut tiers, &[((Device, 1), (Host, 47))]);
    while tiers.prepare_ahead() {}
    assert_eq!(pinned(&tiers), 560, "512 behind the 48 in use");
    moved(&mut tiers, &[((Device, 1), (Host, 48)), ((Host, 3), (Device, 2))]);
    while tiers.prepare_ahead() {}
    let bytes = tiers.bytes();
    assert_eq!((bytes.host_pinned / MIB, bytes.host_pageable / MIB), (560, 16), "a refusal");
}

#[test]
fn random_orders_move_the_same_where_some_memory_is_not_registered() {
    let folder = TempDir::new().unwrap();
    for (seed, chunks) in [(1, 0), (2, 1), (3, 5)] {
        let kv = Limited::new((16 + chunks * 16) * MIB);
        let kv: Arc<dyn KvBlocks> = kv;
        let bytes = hold_random_orders(&kv, &sizes(80, 3, &folder), seed).bytes();
        assert_eq!(bytes.host_pinned, chunks * 16 * MIB);
        assert_eq!(bytes.host_pageable, (80 - chunks * 16) * MIB);
    }
}

#[test]
fn a_store_that_can_register_nothing_has_no_tiers() {
    let folder = TempDir::new().unwrap();
    let error = KvTiers::new(Limited::new(0), &sizes(1, 0, &folder)).map(|_| ()).unwrap_err();
    assert!(matches!(error, ExecutorError::Unsupported { .. }), "{error}");
}

#[test]
fn orders_for_blocks_that_do_not_exist_fail_alone() {
    let folder = TempDir::new().unwrap();
    let kv = of_a_stage(Family::Llama, KvDType::F16);
    let mut tiers = KvTiers::new(kv, &sizes(2, 0, &folder)).unwrap();
    let orders = [
        copy((Device, 0), (Host, 0)),
        copy((Device, 1), (Host, 2)),
        copy((Device, 10), (Host, 1)),
        copy((Device, 1), (Disk, 0)),
        copy((Host, 0), (Device, 1)),
        copy((Host, 5), (Device, 1)),
    ];
    let wanted: [CopyOutcome; 6] = [Done, Failed, Failed, Failed, Done, Failed];
    assert_eq!(perform(&mut tiers, &orders), wanted);
    assert!(!tiers.disk_stopped());
}

/// The open file of the tiers whose folder this is, by its number.
fn open_file(folder: &Path) -> RawFd {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let ours = open
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(folder)));
    let numbers: Vec<RawFd> =
        ours.map(|entry| entry.file_name().to_str().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers.len(), 1, "{numbers:?}");
    numbers[0]
}

fn path_of(file: RawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{file}"))
}

/// Puts another open file in the place of one.
fn replace(file: RawFd, other: &File) {
    // SAFETY: both are open, and the number stays its owner's.
    assert_eq!(unsafe { libc::dup2(other.as_raw_fd(), file) }, file);
}

/// Tiers with blocks 0 to 2 of the device on disk, and the number of their file.
fn with_a_disk(folder: &TempDir) -> (KvTiers, RawFd, usize) {
    let kv = of_a_stage(Family::Qwen3, KvDType::F16);
    let bytes = kv.block_bytes();
    let mut tiers = KvTiers::new(kv, &sizes(4, 4, folder)).unwrap();
    let away = [0, 1, 2].map(|block| ((Device, block), (Disk, block)));
    moved(&mut tiers, &away);
    let file = open_file(folder.path());
    (tiers, file, bytes)
}

#[test]
fn the_file_has_no_name_while_it_is_used_and_all_its_space_from_the_start() {
    let folder = TempDir::new().unwrap();
    let (tiers, file, block_bytes) = with_a_disk(&folder);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let metadata = fs::metadata(path_of(file)).unwrap();
    assert_eq!(metadata.len(), 4 * block_bytes as u64);
    assert_eq!(tiers.bytes().disk, 4 * block_bytes);
}

#[test]
fn a_full_disk_stops_and_what_is_there_can_be_read() {
    let folder = TempDir::new().unwrap();
    let (mut tiers, file, _) = with_a_disk(&folder);
    let own = File::open(path_of(file)).unwrap();
    let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    replace(file, &full);
    assert!(!tiers.disk_stopped());
    let orders = [0, 1, 2].map(|block| copy((Device, 3), (Disk, block + 1)));
    assert_eq!(perform(&mut tiers, &orders), [Failed; 3]);
    assert!(tiers.disk_stopped());
    replace(file, &own);
    // Nothing is at the places of failed copies, even those that nobody tried.
    let orders = [0, 1, 2, 3].map(|block| copy((Disk, block), (Host, block)));
    assert_eq!(perform(&mut tiers, &orders), [Done, Failed, Failed, Failed]);
    // The device and the host go on as before.
    moved(&mut tiers, &[((Device, 3), (Host, 2)), ((Host, 2), (Device, 4))]);
    assert_eq!(perform(&mut tiers, &[copy((Host, 2), (Disk, 0))]), [Failed]);
}

#[test]
fn bytes_that_changed_on_disk_are_not_restored() {
    for harm in [Harm::Bit, Harm::OldHalf, Harm::Cut] {
        let folder = TempDir::new().unwrap();
        let (mut tiers, file, block_bytes) = with_a_disk(&folder);
        let disk = OpenOptions::new().read(true).write(true).open(path_of(file)).unwrap();
        harm.block(&disk, 1, block_bytes);
        let back = [0, 1, 2].map(|block| copy((Disk, block), (Device, block + 5)));
        let last = if let Harm::Cut = harm { Failed } else { Done };
        assert_eq!(perform(&mut tiers, &back), [Done, Failed, last], "{harm:?}");
        assert!(tiers.disk_stopped(), "{harm:?}");
        assert_eq!(perform(&mut tiers, &[copy((Device, 0), (Disk, 1))]), [Failed]);
        assert_eq!(perform(&mut tiers, &back[1..2]), [Failed], "{harm:?}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Harm {
    /// One bit is another.
    Bit,
    /// The second half is what lay there before.
    OldHalf,
    /// The file ends in the middle of the block.
    Cut,
}

impl Harm {
    fn block(self, disk: &File, block: usize, block_bytes: usize) {
        let middle = (block * block_bytes + block_bytes / 2) as u64;
        match self {
            Harm::Bit => {
                let mut byte = [0];
                disk.read_exact_at(&mut byte, middle).unwrap();
                disk.write_all_at(&[byte[0] ^ 16], middle).unwrap();
            }
            Harm::OldHalf => disk.write_all_at(&vec![7; block_bytes / 2], middle).unwrap(),
            Harm::Cut => disk.set_len(middle).unwrap(),
        }
    }
}

#[test]
fn a_folder_without_room_or_without_a_file_is_named() {
    let folder = TempDir::new().unwrap();
    let new = |options: &TierOptions| {
        let kv = of_a_stage(Family::Llama, KvDType::F16);
        KvTiers::new(kv, options).map(|_| ()).unwrap_err()
    };
    let absent = folder.path().join("absent");
    let named = new(&TierOptions { disk_folder: absent, ..sizes(1, 1, &folder) }).to_string();
    assert!(
        named.starts_with("kv.disk_folder is ") && named.contains("absent: No such"),
        "{named}"
    );
    assert!(named.contains("; allowed is a folder in which a file of "), "{named}");
    let huge = new(&sizes(1, 1 << 46, &folder));
    assert!(matches!(huge, ExecutorError::DiskTier { bytes, .. } if bytes > 1 << 56), "{huge}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
