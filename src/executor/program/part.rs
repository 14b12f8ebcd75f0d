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

/// Where the feed-forward networks of a stage's layers are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum FeedForwards {
    /// Here.
    #[default]
    Here,
    /// Here, but those of these layers, ascending: they are *spilled* to host memory. Another
    /// program has them alone ([`FeedForwards::SpilledAlone`]).
    Spilled(Vec<usize>),
    /// The stage is nothing but those of these layers, ascending: what a stage on a GPU has
    /// spilled. It has no layers, no inlet and no outlet.
    SpilledAlone(Vec<usize>),
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
    /// Which of their feed-forward networks.
    pub feed_forwards: FeedForwards,
}

impl StagePart {
    /// All of a model with `n_layers` layers.
    pub fn whole(n_layers: usize) -> Self {
        Self {
            layers: 0..n_layers,
            inlet: Inlet::Embedding,
            outlet: Outlet::Logits,
            feed_forwards: FeedForwards::Here,
        }
    }

    /// All of a model with `n_layers` layers but the feed-forward networks of some, ascending.
    pub fn spilling(n_layers: usize, layers: &[usize]) -> Self {
        let feed_forwards = FeedForwards::Spilled(layers.to_vec());
        Self { feed_forwards, ..Self::whole(n_layers) }
    }

    /// The feed-forward networks that this part has spilled, if there are any.
    pub fn spilled(&self) -> Option<Self> {
        match &self.feed_forwards {
            FeedForwards::Spilled(layers) if !layers.is_empty() => {
                let feed_forwards = FeedForwards::SpilledAlone(layers.clone());
                Some(Self { layers: 0..0, feed_forwards, ..self.clone() })
            }
            _ => None,
        }
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
