//! Owns speculative decoding's decisions: what is proposed for a sequence's next tokens, how many
//! of them are worth a wider step, and which of them count. It must not know schedulers, executors
//! or time beyond the durations that it is told. The scheduler calls it, once per step.
//!
//! ```text
//! propose   the longest run of a sequence's last tokens that stood earlier in it; what followed
//!           there is the draft (lookup.rs)
//! choose    the draft tokens of all sequences, the likeliest first, as many as give the most
//!           tokens per second by what steps of some width have taken (lengths.rs)
//! accept    the model samples at every drafted position, each with its own random number; drafted
//!           tokens count as long as they are what was sampled (acceptance.rs)
//! ```
//! So an answer never depends on drafts: each of its tokens is sampled from the model's own logits
//! behind tokens that were sampled themselves.
//! Source of the rule: Leviathan et al., "Fast Inference from Transformers via Speculative
//! Decoding", where the draft is one token with all the probability; of the proposals: prompt
//! lookup decoding (Saxena).

mod acceptance;
mod draft;
mod lengths;
mod lookup;

pub use acceptance::agreeing;
pub use draft::Draft;
pub use lengths::{DraftLengths, StepTimes, WIDTH_MAX};
pub use lookup::Lookup;

/// How sequences are speculated on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpeculationOptions {
    /// Where drafts come from.
    pub lookup: Lookup,
    /// Tokens of the longest draft, at least 1.
    pub draft_max: usize,
    /// Steps of up to so many tokens give a token the same bits, ascending: a draft never takes a
    /// step beyond the next of these. Empty where bits never depend on a step's width.
    pub width_borders: &'static [usize],
}

impl SpeculationOptions {
    /// Tokens of the widest step in which `decodes` sequences may have drafts.
    pub fn width_max(&self, decodes: usize) -> usize {
        let border = self.width_borders.iter().find(|border| **border >= decodes);
        border.copied().unwrap_or(WIDTH_MAX).min(WIDTH_MAX)
    }
}
