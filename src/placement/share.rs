//! How long spilled layers take where the CPU computes some and weights of others stream to the GPU
//! meanwhile: both read the same memory, and each is faster alone.

/// Seconds that what is spilled of a layer takes, in the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedTimes {
    /// On the CPU while nothing streams.
    pub cpu: f64,
    /// On the CPU beside a stream of weights.
    pub cpu_beside: f64,
    /// Its weights on their way to the GPU while the CPU rests; infinite where they can't stream.
    pub stream: f64,
    /// Its weights on their way to the GPU while the CPU computes.
    pub stream_beside: f64,
    /// Layers whose weights can arrive while the CPU is at one: what the ring holds. Until the GPU
    /// has the CPU's rows it takes none of them out.
    pub ahead: f64,
}

impl SharedTimes {
    /// Seconds of `here` layers on the CPU beside `streamed` on their way, in turn: whoever ends
    /// first lets the other be alone, and a stream whose ring is full waits for the CPU.
    pub fn seconds(&self, here: f64, streamed: f64) -> f64 {
        let at_each = (self.cpu_beside / self.stream_beside).min(self.ahead);
        let beside = (here * at_each).min(streamed);
        let both = beside * self.stream_beside;
        let rest = streamed - beside;
        // What can't stream takes no time where nothing streams.
        let alone = if rest > 0.0 { rest * self.stream } else { 0.0 };
        both + (here - both / self.cpu_beside) * self.cpu + alone
    }
}
