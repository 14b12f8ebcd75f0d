//! What one step may spend on prompts, while it is shared among them.

/// Tokens and time of one step for prompts. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ChunkBudget {
    /// Tokens that the step has room for.
    pub tokens: usize,
    /// Tokens of the smallest chunk; 0 once there is one in the step.
    pub tokens_min: usize,
    /// Time that was saved for chunks, in microseconds.
    pub account_us: f64,
    /// Time that this step may take longer; infinite when no stream waits for it.
    pub step_us: f64,
    /// What the step takes without prompts, as far as known.
    pub decode_us: f64,
}

impl ChunkBudget {
    /// A step that only prompts wait for.
    pub fn prompts_only(tokens: usize) -> Self {
        let us = f64::INFINITY;
        Self { tokens, tokens_min: 0, account_us: us, step_us: us, decode_us: 0.0 }
    }

    /// Takes out so many tokens that cost `token_us` microseconds each.
    pub fn spend(&mut self, tokens: usize, token_us: f64) {
        if tokens > 0 {
            self.tokens = self.tokens.saturating_sub(tokens);
            self.tokens_min = 0;
            self.account_us -= tokens as f64 * token_us;
            self.step_us -= tokens as f64 * token_us;
        }
    }
}
