//! Memory of this process, and whether loading weights stayed within what it may take. Counted for
//! the whole process: a file that uses this holds one test only.

use super::stage::Model;
use std::path::Path;
use tandem::executor::{CpuPool, LoadProgress, PoolOptions, StagePart, Weights, WeightsRequest};
use tandem::formats::Checkpoint;
use tandem::memory::HugePages;

/// Stacks, the workers' first allocations, pages that neighbours share.
const SLACK_BYTES: usize = 3 << 20;
/// What a test may have taken, and given back, before it loads.
const BEFORE_BYTES: usize = 32 << 20;

/// A field of this process's status, in bytes.
fn status_bytes(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Loads a model of at least `weight_bytes_min` and checks that memory never held more than its
/// weights and a tenth, holds no more than the weights afterwards, and that progress was told.
pub fn check_load(path: &Path, weight_bytes_min: usize) {
    let model = Model::open(Checkpoint::open(path).unwrap());
    let spec = model.spec.clone();
    let part = StagePart::whole(spec.layers.len());
    let (source, huge_pages) = (model.checkpoint.into(), HugePages::SystemDefault);
    let request = WeightsRequest { source, spec, part, isa: None, huge_pages };
    let options =
        PoolOptions { threads: 2, cores: Vec::new(), nodes: Default::default(), spin_us: 50 };
    let mut pool = CpuPool::new(&options).unwrap();
    let mut reports: Vec<LoadProgress> = Vec::new();
    let before = status_bytes("VmRSS:");
    let hidden = status_bytes("VmHWM:") - before;
    assert!(hidden < BEFORE_BYTES, "what came before hides {hidden} bytes of loading");
    let weights = Weights::load(&request, &mut pool, &mut |at| reports.push(at)).unwrap();
    let (peak, after) = (status_bytes("VmHWM:") - before, status_bytes("VmRSS:") - before);
    let allowed = weights.bytes() + weights.bytes() / 10;
    assert!(weights.bytes() > weight_bytes_min, "{} bytes of weights", weights.bytes());
    assert!(after >= weights.bytes() / 2, "{after} resident bytes: the load was not measured");
    assert!(peak <= allowed, "peak of {peak} bytes, allowed {allowed}");
    let settled = weights.bytes() + SLACK_BYTES;
    assert!(after <= settled, "{after} bytes stay, allowed {settled}");
    assert!(reports.is_sorted_by_key(|at| at.done_bytes) && reports.len() > 6);
    let last = reports.last().unwrap();
    assert!(last.done_bytes == last.total_bytes && last.total_bytes >= weights.bytes() / 2);
}
