//! Why a GPU is not there for a model, and who has its memory, in words.

use crate::hardware::{ClosedGpu, Gpus, MemoryHolder};
use crate::units::ByteSize;

/// Processes that a refusal names.
const HOLDERS_MAX: usize = 3;

/// Why GPUs that were asked for are not there.
pub(super) fn reason(gpus: &Gpus) -> String {
    let open = gpus.devices.iter().map(|gpu| gpu.ordinal);
    let mut shown: Vec<_> = open.chain(gpus.closed.iter().map(|gpu| gpu.ordinal)).collect();
    shown.sort_unstable();
    let shown: Vec<_> = shown.iter().map(ToString::to_string).collect();
    match (&gpus.absence, refused(gpus)) {
        (Some(absence), _) => absence.clone(),
        (None, Some(refused)) => refused,
        (None, None) if shown.is_empty() => "the driver shows none".into(),
        (None, None) => format!("the driver shows {}", shown.join(", ")),
    }
}

/// Which GPUs were asked for and can't be used now, with who holds their memory; `None` where all
/// can.
pub(super) fn refused(gpus: &Gpus) -> Option<String> {
    let refused = |gpu: &ClosedGpu| {
        let ClosedGpu { ordinal, name, refusal, holders } = gpu;
        let reason = refusal.as_ref()?;
        Some(format!("GPU {ordinal} ({name}) can't be used: {reason}{}", held(holders)))
    };
    let refused: Vec<_> = gpus.closed.iter().filter_map(refused).collect();
    (!refused.is_empty()).then(|| refused.join("; "))
}

/// Who else holds memory of a GPU, as the end of a sentence.
pub(super) fn held(holders: &[MemoryHolder]) -> String {
    let holder = |MemoryHolder { pid, name, bytes }: &MemoryHolder| {
        let name = if name.is_empty() { String::new() } else { format!("{} ", name.trim()) };
        let bytes = bytes.map_or(String::new(), |bytes| format!(", {}", ByteSize(bytes)));
        format!("{name}(process {pid}{bytes})")
    };
    let holders: Vec<_> = holders.iter().take(HOLDERS_MAX).map(holder).collect();
    match holders.is_empty() {
        true => String::new(),
        false => format!("; its memory is also held by {}", holders.join(", ")),
    }
}
