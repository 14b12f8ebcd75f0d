//! What the host prepares for a step, in one piece of pinned memory that travels at once. Where the
//! parts of recorded steps lie depends on the number of tokens alone, so that they find them again.

use super::vram::{ACTIVATIONS, Vram};
use crate::executor::ExecutorError;
use crate::memory::Commitment;
use crate::placement::INPUT_ALIGNMENT as ALIGNMENT;
use tandem_kernels::{DeviceMemory, Gpu, PinnedMemory, RowQuestion, Span};

const PARTS: usize = Part::Questions as usize + 1;
const U32: usize = size_of::<u32>();

/// A part of a step's inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// u32 `[tokens]`: position in its sequence.
    Positions,
    /// u32 `[tokens]`: where the block table of its sequence starts.
    Tables,
    /// u32: tokens whose logits are wanted.
    Wanted,
    /// u32: first token and number of tokens of sequences with many.
    Runs,
    /// u32: all other tokens.
    Single,
    /// u32: what crossings of spilled networks are counted from.
    Crossings,
    /// u32: what pieces of weights that stream are counted from.
    Pieces,
    /// u32 `[tokens]`: rows of the embedding.
    Rows,
    /// f32 `[tokens, angles]`
    Angles,
    /// `[tokens]` rows of the embedding as they lie in the file.
    FileRows,
    /// u32: block tables.
    Blocks,
    /// What is asked about rows of logits; no recorded step reads it.
    Questions,
}

/// The inputs of a step, here and on the GPU.
pub(super) struct Inputs {
    host: PinnedMemory,
    device: DeviceMemory,
    /// Bytes of a token in each part before the last two.
    token_bytes: [usize; Part::Blocks as usize],
    /// Bytes of each part in this step.
    part_bytes: [usize; PARTS],
    is_travelling: bool,
    /// Where they have outgrown what was planned.
    reserved: Option<Commitment>,
}

impl Inputs {
    /// Room for `tokens` tokens and `blocks` block numbers; a token has `angles` f32 and, where
    /// rows of the embedding travel, `row_bytes`.
    ///
    /// # Errors
    /// No memory, here or there.
    pub fn new(
        gpu: &Gpu,
        (tokens, blocks): (usize, usize),
        (angles, row_bytes): (usize, usize),
    ) -> Result<Self, ExecutorError> {
        let token_bytes = of_token(angles, row_bytes);
        let last = [blocks * U32, tokens * RowQuestion::BYTES];
        let bytes = aligned(&of_step(&token_bytes, tokens, last));
        Ok(Self {
            host: gpu.alloc_pinned(bytes)?,
            device: gpu.alloc(bytes)?,
            token_bytes,
            part_bytes: [0; PARTS],
            is_travelling: false,
            reserved: None,
        })
    }

    /// Begins a step of some tokens, block numbers and questions. Whether memory had to move: spans
    /// of before are then gone.
    ///
    /// # Errors
    /// No memory, or none that may be taken: then all is as before. Or what the step before has
    /// failed with.
    pub fn begin(
        &mut self,
        (gpu, vram): (&Gpu, &Vram),
        (tokens, blocks, questions): (usize, usize, usize),
    ) -> Result<bool, ExecutorError> {
        if self.is_travelling {
            gpu.synchronize()?;
            self.is_travelling = false;
        }
        let last = [blocks * U32, questions * RowQuestion::BYTES];
        self.part_bytes = of_step(&self.token_bytes, tokens, last);
        let need = self.used_bytes();
        let moves = need > self.device.bytes();
        if moves {
            let reserved = vram.row(ACTIVATIONS, 2 * need)?;
            (self.device, self.host) = (gpu.alloc(2 * need)?, gpu.alloc_pinned(2 * need)?);
            self.reserved = Some(reserved.commit());
        }
        Ok(moves)
    }

    fn place(&self, part: Part) -> usize {
        aligned(&self.part_bytes[..part as usize])
    }

    fn used_bytes(&self) -> usize {
        aligned(&self.part_bytes)
    }

    /// A part, to be written.
    pub fn bytes_mut(&mut self, part: Part) -> &mut [u8] {
        let (start, bytes) = (self.place(part), self.part_bytes[part as usize]);
        &mut self.host[start..start + bytes]
    }

    /// Writes the beginning of a part.
    ///
    /// # Panics
    /// When it has less room.
    pub fn put(&mut self, part: Part, numbers: impl IntoIterator<Item = u32>) {
        let mut room = self.bytes_mut(part).as_chunks_mut().0.iter_mut();
        for number in numbers {
            let bytes = room.next().expect("room for the numbers of a step");
            *bytes = number.to_ne_bytes();
        }
    }

    /// Sends all parts.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn send(&mut self, gpu: &Gpu) -> Result<(), ExecutorError> {
        let used = self.used_bytes();
        self.is_travelling = true;
        // SAFETY: `begin` waits before anything is written again, and so does the memory's drop.
        unsafe { gpu.send(&self.host, used, self.device.span())? };
        Ok(())
    }

    /// The GPU has been waited for.
    pub fn arrived(&mut self) {
        self.is_travelling = false;
    }

    /// A part on the GPU.
    pub fn span(&self, part: Part) -> Span<'_> {
        self.device.span().part(self.place(part), self.part_bytes[part as usize])
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        self.device.bytes()
    }
}

/// Bytes of a token in each part before the last two, with so many f32 of angles, and bytes of a
/// row of an embedding in host memory.
fn of_token(angles: usize, row_bytes: usize) -> [usize; Part::Blocks as usize] {
    let mut token_bytes = [U32; Part::Blocks as usize];
    token_bytes[Part::Runs as usize] = 2 * U32;
    token_bytes[Part::Angles as usize] = angles * U32;
    token_bytes[Part::FileRows as usize] = row_bytes;
    token_bytes
}

/// Bytes of all parts of a step of `tokens` tokens.
fn of_step(
    token_bytes: &[usize; Part::Blocks as usize],
    tokens: usize,
    last: [usize; 2],
) -> [usize; PARTS] {
    let mut bytes = [0; PARTS];
    let (first, others) = bytes.split_at_mut(token_bytes.len());
    first.iter_mut().zip(token_bytes).for_each(|(bytes, of_token)| *bytes = of_token * tokens);
    others.copy_from_slice(&last);
    bytes
}

/// Bytes of parts that lie one behind the other.
fn aligned(part_bytes: &[usize]) -> usize {
    part_bytes.iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::BufferDims;
    use crate::tensor::DType;

    #[test]
    fn a_plan_counts_the_bytes_of_all_parts() {
        for (angles, looked_up) in [(0, None), (129, None), (64, Some((DType::Q6_K, 768)))] {
            let dims = BufferDims { angles, looked_up, ..BufferDims::default() };
            let token_bytes = of_token(angles, dims.row_bytes());
            for (tokens, blocks) in [(1, 0), (7, 1), (512, 4_001)] {
                let last = [blocks * U32, tokens * RowQuestion::BYTES];
                let bytes = aligned(&of_step(&token_bytes, tokens, last));
                assert_eq!(dims.input_bytes(tokens, blocks), bytes);
            }
        }
    }
}
