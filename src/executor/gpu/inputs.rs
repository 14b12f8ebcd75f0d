//! What the host prepares for a step, in one piece of pinned memory that travels at once. Where its
//! parts lie depends on the number of tokens alone, so that recorded steps find them again.

use crate::executor::ExecutorError;
use tandem_kernels::{DeviceMemory, Gpu, PinnedMemory, Span};

const ALIGNMENT: usize = 16;
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
    /// u32 `[tokens]`: rows of the embedding.
    Rows,
    /// f32 `[tokens, angles]`
    Angles,
    /// `[tokens]` rows of the embedding as they lie in the file.
    FileRows,
    /// u32: block tables.
    Blocks,
}

/// The inputs of a step, here and on the GPU.
pub(super) struct Inputs {
    host: PinnedMemory,
    device: DeviceMemory,
    /// Bytes of a token in each part before the last.
    token_bytes: [usize; Part::Blocks as usize],
    tokens: usize,
    /// Block numbers of this step.
    blocks: usize,
    is_travelling: bool,
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
        let mut token_bytes = [U32; Part::Blocks as usize];
        token_bytes[Part::Runs as usize] = 2 * U32;
        token_bytes[Part::Angles as usize] = angles * U32;
        token_bytes[Part::FileRows as usize] = row_bytes;
        let bytes = place(&token_bytes, Part::Blocks, tokens) + blocks * U32;
        Ok(Self {
            host: gpu.alloc_pinned(bytes)?,
            device: gpu.alloc(bytes)?,
            token_bytes,
            tokens: 0,
            blocks: 0,
            is_travelling: false,
        })
    }

    /// Begins a step of some tokens. Whether memory had to move: spans of before are then gone.
    ///
    /// # Errors
    /// No memory: then all is as before. Or what the step before has failed with.
    pub fn begin(
        &mut self,
        gpu: &Gpu,
        (tokens, blocks): (usize, usize),
    ) -> Result<bool, ExecutorError> {
        if self.is_travelling {
            gpu.synchronize()?;
            self.is_travelling = false;
        }
        (self.tokens, self.blocks) = (tokens, blocks);
        let need = self.used_bytes();
        let moves = need > self.device.bytes();
        if moves {
            (self.device, self.host) = (gpu.alloc(2 * need)?, gpu.alloc_pinned(2 * need)?);
        }
        Ok(moves)
    }

    fn place(&self, part: Part) -> usize {
        place(&self.token_bytes, part, self.tokens)
    }

    fn used_bytes(&self) -> usize {
        self.place(Part::Blocks) + self.blocks * U32
    }

    fn part_bytes(&self, part: Part) -> usize {
        match self.token_bytes.get(part as usize) {
            Some(bytes) => bytes * self.tokens,
            None => self.blocks * U32,
        }
    }

    /// A part, to be written.
    pub fn bytes_mut(&mut self, part: Part) -> &mut [u8] {
        let (start, bytes) = (self.place(part), self.part_bytes(part));
        &mut self.host[start..start + bytes]
    }

    /// Writes the beginning of a part.
    ///
    /// # Panics
    /// When it has less room.
    pub fn put(&mut self, part: Part, numbers: &[u32]) {
        let bytes = bytemuck::cast_slice(numbers);
        self.bytes_mut(part)[..bytes.len()].copy_from_slice(bytes);
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
        self.device.span().part(self.place(part), self.part_bytes(part))
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        self.device.bytes()
    }
}

/// Where a part starts in a step of `tokens` tokens.
fn place(token_bytes: &[usize], part: Part, tokens: usize) -> usize {
    let before = &token_bytes[..part as usize];
    before.iter().map(|bytes| (bytes * tokens).next_multiple_of(ALIGNMENT)).sum()
}
