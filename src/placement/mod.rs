//! stub. stub. stub.
#![allow(missing_docs)]
#[derive(Clone, Debug, serde::Serialize)]
pub struct Placement {
    pub context_tokens: usize,
    pub device_blocks: usize,
    pub host_blocks: usize,
    pub threads: usize,
}
