//! stub. stub.
#![allow(missing_docs)]
use crate::{request::SamplingParams, step::TokenLogprob, units::TokenId};
pub struct Sampler;
#[derive(Debug)]
pub struct NonFinite;
pub struct SampledToken {
    pub token: TokenLogprob,
    pub top: Vec<TokenLogprob>,
}
impl Sampler {
    pub fn new(_: usize) -> Self {
        Self
    }
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        _history: &[TokenId],
        _p: usize,
        _pos: usize,
    ) -> Result<SampledToken, NonFinite> {
        let mut best = 0;
        for (i, l) in logits.iter().enumerate() {
            if *l > logits[best] {
                best = i;
            }
        }
        self.score(logits, TokenId(best as u32), params.top_logprobs)
    }
    pub fn score(
        &mut self,
        l: &mut [f32],
        t: TokenId,
        k: usize,
    ) -> Result<SampledToken, NonFinite> {
        let max = l.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !l.iter().all(|x| x.is_finite()) {
            return Err(NonFinite);
        }
        let lse = l.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln() + f64::from(max);
        let lp = |i: usize| TokenLogprob {
            id: TokenId(i as u32),
            logprob: (f64::from(l[i]) - lse) as f32,
        };
        let mut order: Vec<usize> = Vec::new();
        if k > 0 {
            order = (0..l.len()).collect();
            order.select_nth_unstable_by(k, |a, b| l[*b].total_cmp(&l[*a]));
            order.truncate(k);
            order.sort_by(|a, b| l[*b].total_cmp(&l[*a]));
        }
        Ok(SampledToken { token: lp(t.index()), top: order.into_iter().map(lp).collect() })
    }
}
