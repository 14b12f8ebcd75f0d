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

/// Which weights of a model are *spilled* to host memory, and how they stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpilledLayers {
    /// Layers whose feed-forward networks are, ascending.
    pub feed_forward: Vec<usize>,
    /// Layers whose attention's weights are, ascending: of queries, keys and values, and of its
    /// output.
    pub attention: Vec<usize>,
    /// Slots of the ring through which weights stream to the GPU.
    pub ring_slots: usize,
}

/// A run of ops whose weights are spilled: a feed-forward network, queries, keys and values, or the
/// output of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpilledUnit {
    /// Counted over the program from 0.
    pub index: usize,
    /// Of which layer it is, of those with spilled weights, counted from 0.
    pub layer: usize,
}

/// Which weights of its layers a stage has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PartWeights {
    /// All.
    #[default]
    All,
    /// All but those that are spilled. Another program has them alone ([`PartWeights::Only`]).
    Without(SpilledLayers),
    /// The stage is nothing but the ops of these: what a stage on a GPU has spilled. It has no
    /// layers, no inlet and no outlet.
    Only(SpilledLayers),
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
    /// Which of their weights.
    pub weights: PartWeights,
}

impl SpilledLayers {
    /// Whether nothing is spilled.
    pub fn is_empty(&self) -> bool {
        self.feed_forward.is_empty() && self.attention.is_empty()
    }
}

impl StagePart {
    /// All of a model with `n_layers` layers.
    pub fn whole(n_layers: usize) -> Self {
        Self {
            layers: 0..n_layers,
            inlet: Inlet::Embedding,
            outlet: Outlet::Logits,
            weights: PartWeights::All,
        }
    }

    /// All of a model with `n_layers` layers but what is spilled.
    pub fn spilling(n_layers: usize, spilled: SpilledLayers) -> Self {
        Self::whole(n_layers).without(spilled)
    }

    /// This part but for what is spilled of its layers.
    pub fn without(self, spilled: SpilledLayers) -> Self {
        Self { weights: PartWeights::Without(spilled), ..self }
    }

    /// What this part has spilled, if there is anything.
    pub fn spilled(&self) -> Option<Self> {
        Self::spilled_of([self])
    }

    /// What the parts of a model, in the order of their layers, have spilled together, if there is
    /// anything: one stage computes it for all of them.
    pub fn spilled_of<'a>(parts: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let mut all = SpilledLayers::default();
        for part in parts {
            if let PartWeights::Without(spilled) = &part.weights {
                all.feed_forward.extend(&spilled.feed_forward);
                all.attention.extend(&spilled.attention);
                all.ring_slots += spilled.ring_slots;
            }
        }
        let weights = PartWeights::Only(all.clone());
        let part = Self { layers: 0..0, inlet: Inlet::Handoff, outlet: Outlet::Handoff, weights };
        Some(part).filter(|_| !all.is_empty())
    }

    /// The two stages of a model that is cut before layer `cut`, `0 ..= n_layers`.
    pub fn split(n_layers: usize, cut: usize) -> [Self; 2] {
        Self::cut(n_layers, &[cut])
            .try_into()
            .unwrap_or_else(|parts| unreachable!("one cut makes two parts, not {parts:?}"))
    }

    /// The stages of a model that is cut before some layers, ascending.
    pub fn cut(n_layers: usize, cuts: &[usize]) -> Vec<Self> {
        let starts = std::iter::once(0).chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain([n_layers]);
        let mut parts: Vec<_> = starts
            .zip(ends)
            .map(|(start, end)| Self {
                layers: start..end,
                inlet: Inlet::Handoff,
                outlet: Outlet::Handoff,
                weights: PartWeights::All,
            })
            .collect();
        if let Some(first) = parts.first_mut() {
            first.inlet = Inlet::Embedding;
        }
        if let Some(last) = parts.last_mut() {
            last.outlet = Outlet::Logits;
        }
        parts
    }
}
