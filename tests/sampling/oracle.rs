//! The same chain the slow way: sort everything, in f64.

use tandem::request::SamplingParams;
use tandem::units::TokenId;

/// Penalised logits in f64.
pub fn penalised(
    logits: &[f32],
    params: &SamplingParams,
    history: &[TokenId],
    prompt_tokens: usize,
) -> Vec<f64> {
    let mut logits: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
    for (id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(id.index()) {
            *logit += f64::from(*bias);
        }
    }
    let last_n = params.penalty_last_n.unwrap_or(usize::MAX).min(history.len());
    let window = &history[history.len() - last_n..];
    let generated = &history[prompt_tokens.min(history.len())..];
    for (at, logit) in logits.iter_mut().enumerate() {
        let count = |tokens: &[TokenId]| tokens.iter().filter(|id| id.index() == at).count();
        if count(window) > 0 {
            let penalty = f64::from(params.repetition_penalty);
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        let said = count(generated) as f64;
        *logit -= said * f64::from(params.frequency_penalty);
        *logit -= if said > 0.0 { f64::from(params.presence_penalty) } else { 0.0 };
    }
    for (id, length) in dry_repeats(params, history) {
        if let Some(logit) = logits.get_mut(id.index()) {
            let power = (length - params.dry.allowed_length) as i32;
            *logit -= f64::from(params.dry.multiplier) * f64::from(params.dry.base).powi(power);
        }
    }
    logits
}

/// For every token, the longest repeat that it would extend, if that is long enough.
fn dry_repeats(params: &SamplingParams, history: &[TokenId]) -> Vec<(TokenId, usize)> {
    if params.dry.multiplier == 0.0 {
        return Vec::new();
    }
    let last_n = params.dry.last_n.unwrap_or(usize::MAX).min(history.len());
    let window = &history[history.len() - last_n..];
    let mut found: Vec<(TokenId, usize)> = Vec::new();
    for end in 1..window.len() {
        // How long do the tokens before `end` repeat the window's end?
        let mut length = 0;
        while length < end
            && window[end - 1 - length] == window[window.len() - 1 - length]
            && !params.dry_breaker_tokens.contains(&window[window.len() - 1 - length])
        {
            length += 1;
        }
        if length >= params.dry.allowed_length {
            match found.iter_mut().find(|(id, _)| *id == window[end]) {
                Some((_, longest)) => *longest = (*longest).max(length),
                None => found.push((window[end], length)),
            }
        }
    }
    found
}

/// Every token that may be drawn with its probability, ascending by id.
pub fn distribution(logits: &[f64], params: &SamplingParams) -> Vec<(usize, f64)> {
    let mut kept: Vec<(usize, f64)> = logits.iter().copied().enumerate().collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.temperature == 0.0 {
        return vec![(kept[0].0, 1.0)];
    }
    if params.top_k > 0 {
        kept.truncate(params.top_k);
    }
    if params.typical_p < 1.0 {
        let shares = shares(&kept, 1.0);
        let entropy: f64 = shares.iter().map(|p| if *p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
        let mut order: Vec<usize> = (0..kept.len()).collect();
        let surprise = |at: usize| (-shares[at].ln() - entropy).abs();
        order.sort_by(|a, b| surprise(*a).total_cmp(&surprise(*b)));
        let count = reach(order.iter().map(|at| shares[*at]), params.typical_p);
        order.truncate(count);
        order.sort_unstable();
        kept = order.into_iter().map(|at| kept[at]).collect();
    }
    if params.top_p < 1.0 {
        let count = reach(shares(&kept, 1.0).into_iter(), params.top_p);
        kept.truncate(count);
    }
    if params.min_p > 0.0 {
        let shares = shares(&kept, 1.0);
        let least = f64::from(params.min_p) * shares[0];
        kept.truncate(shares.iter().filter(|p| **p >= least).count());
    }
    let shares = shares(&kept, f64::from(params.temperature));
    let mut drawn: Vec<(usize, f64)> =
        kept.iter().zip(shares).map(|((id, _), p)| (*id, p)).collect();
    drawn.sort_by_key(|(id, _)| *id);
    drawn
}

fn shares(ranked: &[(usize, f64)], temperature: f64) -> Vec<f64> {
    let largest = ranked.iter().map(|(_, logit)| *logit).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> =
        ranked.iter().map(|(_, logit)| ((logit - largest) / temperature).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// How many of the shares are needed to reach a mass.
fn reach(shares: impl ExactSizeIterator<Item = f64>, mass: f32) -> usize {
    let all = shares.len();
    let mut reached = 0.0;
    for (at, share) in shares.enumerate() {
        reached += share;
        if reached >= f64::from(mass) {
            return at + 1;
        }
    }
    all
}

/// The token that a number in [0, 1) falls to, and how close it came to a neighbour's share.
pub fn draw(distribution: &[(usize, f64)], number: f64) -> (usize, f64) {
    let mut passed = 0.0;
    for (id, share) in distribution {
        if number < passed + share {
            return (*id, (number - passed).min(passed + share - number));
        }
        passed += share;
    }
    (distribution[distribution.len() - 1].0, 0.0)
}
