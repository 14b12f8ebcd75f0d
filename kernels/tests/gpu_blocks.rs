//! Copies of blocks that lie in planes, against the bytes that they are made of.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::{Random, gpu};
use tandem_kernels::{BlockPlanes, Gpu, GpuError};

/// Sends some blocks, copies one inside the GPU, and compares all that comes back.
fn keeps(gpu: &Gpu, planes: &BlockPlanes, blocks: [usize; 3], random: &mut Random) {
    let bytes = planes.block_bytes();
    let mut host: Vec<u8> = (0..5 * bytes).map(|_| random.next() as u8).collect();
    // SAFETY: it lives until the end, beyond the waits.
    let registered = unsafe { gpu.register_whole(&host) }.expect("registered memory");
    let (sent, back) = host.split_at_mut(2 * bytes);
    let copies = gpu.block_copies().expect("a stream");
    copies.begin(gpu).expect("an order");
    for (from, block) in sent.chunks(bytes).zip(blocks) {
        // SAFETY: registered, and only read.
        unsafe { copies.send(gpu, from, (planes, block)) }.expect("a copy");
    }
    copies.wait(gpu).expect("copies");
    planes.copy_block(gpu, blocks[1], blocks[2]).expect("a copy inside");
    copies.follow(gpu).expect("a mark");
    copies.begin(gpu).expect("an order");
    for (to, block) in back.chunks_mut(bytes).zip(blocks) {
        // SAFETY: registered, and not used before the wait.
        unsafe { copies.fetch(gpu, (planes, block), to) }.expect("a copy");
    }
    copies.wait(gpu).expect("copies");
    assert!(back[..2 * bytes] == sent[..], "{bytes} bytes");
    assert!(back[2 * bytes..] == sent[bytes..], "{bytes} bytes inside");
    drop(registered);
}

#[test]
fn blocks_of_any_shape_come_back_as_they_went() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(7);
    for (planes, blocks, block_bytes) in
        [(2, 3, 16), (64, 9, 65_536), (56, 5, 1_000), (2, 70, 34_816), (1, 4, 4_096)]
    {
        let memory = gpu.block_planes(planes, (blocks, block_bytes)).expect("memory");
        assert_eq!(memory.block_bytes(), planes * block_bytes);
        assert_eq!(memory.plane(planes - 1).bytes(), blocks * block_bytes);
        keeps(&gpu, &memory, [blocks - 1, 0, 1], &mut random);
        keeps(&gpu, &memory, [0, 2, blocks - 1], &mut random);
    }
}

#[test]
fn planes_that_are_further_apart_than_one_copy_reaches_are_copied_one_by_one() {
    let Some(gpu) = gpu() else { return };
    // 2 GiB and a block each.
    let (blocks, block_bytes) = (2049, 1 << 20);
    match gpu.block_planes(2, (blocks, block_bytes)) {
        Ok(memory) => keeps(&gpu, &memory, [blocks - 1, 0, 1], &mut Random(8)),
        Err(GpuError::OutOfMemory { free_bytes, .. }) => {
            println!("skipped: {free_bytes:?} bytes are free");
        }
        Err(error) => panic!("{error}"),
    }
}
