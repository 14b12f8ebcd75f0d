//! The model's own distribution: best token, log of the sum of exponentials, the most likely few.
//! Rows are gone through by kernels that have the same bits on every machine.

use super::NonFinite;
use crate::step::TokenLogprob;
use crate::units::TokenId;
use tandem_cpu_kernels::Kernels;
pub(super) use tandem_cpu_kernels::{SUM_BLOCK, exp_nonpositive, sum_of_weights};

/// What one pass over a row finds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// The token with the largest logit, the first of equals.
    pub best: TokenId,
    /// ln Σ exp(logit).
    pub log_sum: f32,
}

/// The token with the largest value, the first of equals, where no value is NaN.
pub(super) fn best(logits: &[f32]) -> TokenId {
    TokenId(Kernels::best().argmax(logits).unwrap_or(0) as u32)
}

/// Best token and log-sum of a row.
pub(super) fn measure(logits: &[f32]) -> Result<Row, NonFinite> {
    let kernels = Kernels::best();
    let Some(largest) = kernels.largest_finite(logits) else {
        let at = logits.iter().position(|logit| !logit.is_finite()).unwrap_or(0);
        let value = logits.get(at).copied().unwrap_or(f32::NAN);
        return Err(NonFinite { token: TokenId(at as u32), value });
    };
    let sum = kernels.sum_exp_below(logits, largest);
    let best = Kernels::first_equal(logits, largest).unwrap_or(0);
    let log_sum = (f64::from(largest) + sum.ln()) as f32;
    Ok(Row { best: TokenId(best as u32), log_sum })
}

/// The `count` most likely tokens, best first, the lower id first of equals; they come ascending by
/// id. One pass; an insertion only for a logit that beats the worst kept.
pub(super) fn top(
    logits: impl ExactSizeIterator<Item = (TokenId, f32)>,
    count: usize,
    log_sum: f32,
) -> Vec<TokenLogprob> {
    let count = count.min(logits.len());
    let mut kept: Vec<TokenLogprob> = Vec::with_capacity(count);
    if count == 0 {
        return kept;
    }
    let mut worst = f32::NEG_INFINITY;
    for (id, logit) in logits {
        if logit <= worst {
            continue;
        }
        if kept.len() == count {
            kept.pop();
        }
        let at = kept.partition_point(|token| token.logprob >= logit);
        kept.insert(at, TokenLogprob { id, logprob: logit });
        if kept.len() == count {
            worst = kept[count - 1].logprob;
        }
    }
    for token in &mut kept {
        token.logprob -= log_sum;
    }
    kept
}
