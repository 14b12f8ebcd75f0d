//! Which part of a model a stage runs, and what it is joined to.

use std::ops::Range;

/// Where a stage's residual stream comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inlet {
    /// The embedding of the step's tokens.
    Embedding,
    /// The stage before.
    Handoff,
}

/// Where a stage's residual stream goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlet {
    /// The output matrix and the samplers.
    Logits,
    /// The next stage.
    Handoff,
}

/// Which part of a model a stage runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagePart {
    /// Layers, counted over the whole model.
    pub layers: Range<usize>,
    /// What comes before them.
    pub inlet: Inlet,
    /// What comes after them.
    pub outlet: Outlet,
}

impl StagePart {
    /// All of a model with `n_layers` layers.
    pub fn whole(n_layers: usize) -> Self {
        Self { layers: 0..n_layers, inlet: Inlet::Embedding, outlet: Outlet::Logits }
    }

    /// The two stages of a model that is cut before layer `cut`, `0 ..= n_layers`.
    pub fn split(n_layers: usize, cut: usize) -> [Self; 2] {
        let whole = Self::whole(n_layers);
        [
            Self { layers: 0..cut, outlet: Outlet::Handoff, ..whole.clone() },
            Self { layers: cut..n_layers, inlet: Inlet::Handoff, ..whole },
        ]
    }
}
