//! Routes of a mixture of experts: which tokens of a step go through which experts (`route.cu`).
//!
//! They are made and stay on the GPU: how much is launched depends on the number of tokens alone,
//! so that a step can be recorded before anyone knows its routes.

use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use cudarc::driver::DeviceRepr;

/// Bits of a word of a token's experts.
const WORD_BITS: usize = 32;
/// Bytes of what is told of an expert with tokens.
const SLOT_BYTES: usize = 16;
/// Most tokens that one block routes: it has a warp for each, and a thread for each expert.
const FEW_TOKENS: usize = 8;
/// Warps of a block that chooses experts, one for each token; and threads of one that lists pairs.
const CHOOSE_WARPS: usize = 8;
const GROUP_THREADS: usize = 256;
const U32: usize = size_of::<u32>();
const F32: usize = size_of::<f32>();

/// Room on a GPU for the routes of a layer with experts; the next layer's take their place.
pub struct ExpertRoutes {
    /// u32 `[tokens, words]`: a token's experts as bits.
    masks: DeviceMemory,
    /// f32 `[tokens, n_used]`, by ascending expert.
    weights: DeviceMemory,
    /// u32 `[tokens · n_used]`: pairs by expert.
    pairs: DeviceMemory,
    /// `[1 + n_experts]`, as `Routes` in routes.cuh.
    slots: DeviceMemory,
    n_experts: usize,
    n_used: usize,
    tokens_max: usize,
}

/// Routes of the tokens of a step.
#[derive(Clone, Copy)]
pub struct Routed<'a> {
    /// Where they are, or will be.
    pub routes: &'a ExpertRoutes,
    /// Tokens of the step.
    pub tokens: usize,
}

/// How tokens choose their experts.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    /// `[tokens, n_experts]` f32: products with the router.
    pub logits: Span<'a>,
    /// Multiplies the softmax over a token's experts.
    pub weight_scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RouteArgs {
    logits: u64,
    masks: u64,
    weights: u64,
    slots: u64,
    pairs: u64,
    weight_scale: f32,
    tokens: u32,
    n_experts: u32,
    n_used: u32,
}

// SAFETY: plain numbers in the order of `RouteArgs` in route.cu.
unsafe impl DeviceRepr for RouteArgs {}

impl ExpertRoutes {
    /// Most experts of a layer, and most that a token goes through.
    pub const EXPERTS_MAX: usize = 256;
    /// See [`ExpertRoutes::EXPERTS_MAX`].
    pub const USED_MAX: usize = 32;

    /// Room for up to `tokens_max` tokens that each go through `n_used` of `n_experts` experts.
    ///
    /// # Errors
    /// No memory.
    ///
    /// # Panics
    /// When there are more experts than the kernels can tell apart, or fewer than are used.
    pub fn new(
        gpu: &Gpu,
        (n_experts, n_used): (usize, usize),
        tokens_max: usize,
    ) -> Result<ExpertRoutes, GpuError> {
        assert!((1..=Self::EXPERTS_MAX).contains(&n_experts), "{n_experts} experts");
        assert!((1..=n_experts.min(Self::USED_MAX)).contains(&n_used), "{n_used} of {n_experts}");
        let [masks, weights, pairs, slots] = Self::parts((n_experts, n_used), tokens_max);
        Ok(ExpertRoutes {
            masks: gpu.alloc(masks)?,
            weights: gpu.alloc(weights)?,
            pairs: gpu.alloc(pairs)?,
            slots: gpu.alloc(slots)?,
            n_experts,
            n_used,
            tokens_max,
        })
    }

    /// Bytes of masks, weights, pairs and slots.
    fn parts((n_experts, n_used): (usize, usize), tokens_max: usize) -> [usize; 4] {
        [
            tokens_max * n_experts.div_ceil(WORD_BITS) * U32,
            tokens_max * n_used * F32,
            tokens_max * n_used * U32,
            (1 + n_experts) * SLOT_BYTES,
        ]
    }

    /// Bytes that routes of up to `tokens_max` tokens, each through `n_used` of `n_experts`
    /// experts, take on a GPU.
    pub fn bytes_of(experts: (usize, usize), tokens_max: usize) -> usize {
        Self::parts(experts, tokens_max).iter().sum()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        [&self.masks, &self.weights, &self.pairs, &self.slots].map(DeviceMemory::bytes).iter().sum()
    }

    /// How many experts there are.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    /// Through how many each token goes.
    pub fn n_used(&self) -> usize {
        self.n_used
    }
}

impl Routed<'_> {
    /// Pairs of token and expert: `token · n_used + place`, where a token's experts are ascending.
    pub fn pairs(&self) -> usize {
        self.tokens * self.routes.n_used
    }

    /// Experts that may have tokens.
    pub(crate) fn slots(&self) -> usize {
        self.routes.n_experts.min(self.pairs())
    }

    /// Pointers to what is told of experts with tokens, and to their pairs.
    pub(crate) fn lists(&self) -> (u64, u64) {
        let ExpertRoutes { slots, pairs, n_experts, .. } = self.routes;
        (slots.span().of(1 + n_experts, SLOT_BYTES), pairs.span().of(self.pairs(), U32))
    }

    /// Pointer to the weights of all pairs.
    pub(crate) fn weights(&self) -> u64 {
        self.routes.weights.span().of(self.pairs(), F32)
    }
}

impl Gpu {
    /// Chooses each token's experts, and lists the tokens of each expert: the largest logits, of
    /// equals those of lower index, with the softmax over them as weights. A token with a logit
    /// that is not finite gets the first experts, and weights that are no numbers.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short or there is no room for so many tokens.
    pub fn route(&self, route: &Route<'_>, to: Routed<'_>) -> Result<(), GpuError> {
        let Routed { routes, tokens } = to;
        let (n_experts, most) = (routes.n_experts, routes.tokens_max);
        assert!(tokens <= most, "{tokens} tokens, room for {most}");
        let words = n_experts.div_ceil(WORD_BITS);
        let (slots, pairs) = to.lists();
        let arguments = RouteArgs {
            logits: route.logits.of(tokens * n_experts, F32),
            masks: routes.masks.span().of(tokens * words, U32),
            weights: to.weights(),
            slots,
            pairs,
            weight_scale: route.weight_scale,
            tokens: tokens as u32,
            n_experts: n_experts as u32,
            n_used: routes.n_used as u32,
        };
        if tokens <= FEW_TOKENS {
            let threads = (32 * tokens).max(n_experts.next_multiple_of(32));
            let shape = ([tokens.min(1), 1, 1], threads, 0);
            // SAFETY: all spans were checked against the shapes.
            return unsafe { self.launch("route_few", shape, &arguments) };
        }
        let choose = ([tokens.div_ceil(CHOOSE_WARPS), 1, 1], CHOOSE_WARPS * 32, 0);
        // SAFETY: as above.
        unsafe { self.launch("choose_experts", choose, &arguments)? };
        let group = ([n_experts, 1, 1], GROUP_THREADS, 0);
        // SAFETY: as above.
        unsafe { self.launch("group_pairs", group, &arguments) }
    }
}
