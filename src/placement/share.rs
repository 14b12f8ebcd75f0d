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
}

impl SharedTimes {
    /// Seconds of `here` layers on the CPU beside `streamed` on their way: whoever ends first
    /// lets the other be alone.
    pub fn seconds(&self, here: f64, streamed: f64) -> f64 {
        let (cpu, stream) = (here * self.cpu_beside, streamed * self.stream_beside);
        if stream <= cpu {
            stream + (here - stream / self.cpu_beside) * self.cpu
        } else {
            cpu + (streamed - cpu / self.stream_beside) * self.stream
        }
    }
}
