//! What the workers of a CPU need in a step in which a GPU leaves spilled units to them.

use super::buffers::Rows;
use super::program::SpilledUnit;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tandem_kernels::{CrossingHost, event_number};

/// How the rows of a unit cross: all at once, or where the step has more tokens than there is room
/// for, in pieces one after the other. Each is an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CrossedPieces {
    tokens: usize,
    tokens_max: usize,
}

impl CrossedPieces {
    /// Of a step of some tokens, of which up to `tokens_max` cross at once.
    pub fn of(tokens: usize, tokens_max: usize) -> Self {
        Self { tokens, tokens_max }
    }

    /// How many there are; one of a step without tokens.
    pub fn count(self) -> usize {
        self.tokens.div_ceil(self.tokens_max.max(1)).max(1)
    }

    /// The tokens of one of them.
    pub fn tokens(self, piece: usize) -> Range<usize> {
        let at = |piece: usize| (piece * self.tokens_max).min(self.tokens);
        at(piece)..at(piece + 1)
    }

    /// Which event of the step it is that a piece of a unit crosses.
    pub fn event(self, unit: usize, piece: usize) -> usize {
        unit * self.count() + piece
    }
}

/// One step of the CPU's side, or what it does of a step at once.
#[derive(Clone, Copy)]
pub(super) struct SpillStep<'a> {
    /// Where rows cross.
    pub crossing: CrossingHost<'a>,
    pieces: CrossedPieces,
    /// Which of them crosses.
    piece: usize,
    /// The only unit that is computed; `None` for all.
    unit: Option<SpilledUnit>,
    /// The step's number: events are counted from it.
    base: u32,
    /// The first unit of the GPU that the step is of; of others there are units before and behind.
    first: SpilledUnit,
    /// By its layers with spilled weights: whether the CPU computes their units in this step.
    is_here: &'a [bool],
    /// Set when the GPU will not come.
    pub is_abandoned: &'a AtomicBool,
    /// How long a worker may wait for the GPU.
    pub wait_max: Duration,
}

impl<'a> SpillStep<'a> {
    /// A step whose rows cross in some pieces, in which the CPU computes the layers that `is_here`
    /// says of the GPU whose units begin with `first`. Where there are several pieces, these are to
    /// be computed [one by one](Self::of_piece).
    ///
    /// # Safety
    /// Nobody else on the host uses the crossing's rows while the step lives, and the GPU writes
    /// rows before it raises an event, and reads them after the CPU has.
    pub unsafe fn new(
        crossing: CrossingHost<'a>,
        pieces: CrossedPieces,
        (base, first, is_here): (u32, SpilledUnit, &'a [bool]),
        (is_abandoned, wait_max): (&'a AtomicBool, Duration),
    ) -> Self {
        let (piece, unit) = (0, None);
        Self { crossing, pieces, piece, unit, base, first, is_here, is_abandoned, wait_max }
    }

    /// The same for a piece of a unit alone.
    pub fn of_piece(self, unit: SpilledUnit, piece: usize) -> Self {
        Self { unit: Some(unit), piece, ..self }
    }

    /// Tokens that cross at once.
    fn tokens(&self) -> usize {
        self.pieces.tokens(self.piece).len()
    }

    /// `[n_tokens, width]` that the GPU writes.
    pub fn rows_in(&self, width: usize) -> Rows<'a> {
        let (start, elements) = self.crossing.rows_in();
        let tokens = self.tokens();
        assert!(tokens * width <= elements, "rows of {width} where {elements} elements cross");
        // SAFETY: the crossing has as many elements (asserted), and lives as long; whose turn it is
        // was promised when the step was made.
        unsafe { Rows::shared(start.cast_mut(), tokens, width) }
    }

    /// `[rows, width]` that the GPU reads the first `n_tokens` of.
    pub fn rows_out(&self, rows: usize, width: usize) -> Rows<'a> {
        let (start, elements) = self.crossing.rows_out();
        assert!(rows * width <= elements, "[{rows}, {width}] where {elements} elements cross");
        // SAFETY: as of `rows_in`.
        unsafe { Rows::shared(start, rows, width) }
    }

    /// Whether the CPU computes a unit.
    pub fn computes(&self, unit: SpilledUnit) -> bool {
        let is_asked = self.unit.is_none_or(|only| only == unit);
        let layer = unit.layer.checked_sub(self.first.layer).filter(|_| is_asked);
        layer.is_some_and(|layer| self.is_here.get(layer) == Some(&true))
    }

    /// The number of the event of a unit that it computes.
    pub fn number(&self, unit: SpilledUnit) -> u32 {
        let event = self.pieces.event(unit.index - self.first.index, self.piece);
        event_number(self.base, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_tokens_and_their_events_ascend() {
        for (tokens, tokens_max) in [(1, 256), (256, 256), (257, 256), (512, 256), (700, 64)] {
            let pieces = CrossedPieces::of(tokens, tokens_max);
            let (mut end, mut events) = (0, Vec::new());
            for unit in 0..3 {
                for piece in 0..pieces.count() {
                    let part = pieces.tokens(piece);
                    assert!(part.len() <= tokens_max && !part.is_empty(), "{pieces:?}: {part:?}");
                    assert_eq!(part.start, end % tokens, "{pieces:?}");
                    end += part.len();
                    events.push(pieces.event(unit, piece));
                }
                assert_eq!(end, (unit + 1) * tokens, "{pieces:?}");
            }
            assert_eq!(events, (0..events.len()).collect::<Vec<_>>());
        }
        assert_eq!(CrossedPieces::of(0, 256).count(), 1);
    }
}
