//! Stand-in until the branch `scheduler` is merged and replaces it. Take the other side when it
//! conflicts.
#![allow(missing_docs, reason = "replaced as a whole")]
#[derive(Clone, Debug, serde::Serialize)]
pub struct Placement {
    pub context_tokens: usize,
    pub device_blocks: usize,
    pub host_blocks: usize,
    pub threads: usize,
}
