//! GPUs that can't be opened, and memory that others take between a plan and a load.

use super::gpu::{FREE, config, gpu, refusal, with};
use super::spec;
use tandem::hardware::{ClosedGpu, Gpu, Gpus, MemoryHolder};
use tandem::placement::{Device, Phase, Placement, Shortage};
use tandem::request::RequestError;

/// A GPU on which nothing is free.
fn full(ordinal: usize) -> ClosedGpu {
    let holder = MemoryHolder { pid: 7, name: "python3".into(), bytes: Some(80 << 30) };
    ClosedGpu {
        ordinal,
        name: "Fake 8".into(),
        refusal: Some("context: out of memory".into()),
        holders: vec![holder],
    }
}

#[test]
fn a_gpu_that_cannot_be_opened_leaves_the_others_to_models() {
    let why = "GPU 0 (Fake 8) can't be used: context: out of memory; its memory is also held by \
               python3 (process 7, 80.00 GiB)";
    let mut hardware = with(vec![gpu(1, FREE), gpu(2, FREE)]);
    hardware.gpus.closed = vec![full(0)];
    let plan = |device: &str| Placement::plan(&spec(), &hardware, &config(device));
    let auto = plan("auto").unwrap();
    assert_eq!(auto.device(), &Device::Gpu(1));
    assert_eq!(auto.notes, [format!("not all GPUs are used: {why}")]);
    let chosen = plan("2").unwrap();
    assert_eq!((chosen.device(), &chosen.notes), (&Device::Gpu(2), &vec![]));
    for device in ["0", "1,0", "all"] {
        let (field, got, allowed) = refusal(plan(device));
        assert_eq!((field.as_str(), got.as_str()), ("gpu.device", device));
        assert!(allowed.contains(why), "{allowed}");
    }
    hardware.gpus.devices.clear();
    let none = Placement::plan(&spec(), &hardware, &config("auto")).unwrap();
    assert_eq!(none.device(), &Device::Cpu);
    assert_eq!(none.notes, [format!("no GPU is used: {why}")]);
}

#[test]
fn a_gpu_that_nobody_asked_for_is_shown_beside_one_that_is_not_there() {
    let closed = [0, 1].map(|ordinal| ClosedGpu { refusal: None, ..full(ordinal) });
    let mut hardware = with(Vec::new());
    hardware.gpus.closed = closed.to_vec();
    let (_, _, allowed) = refusal(Placement::plan(&spec(), &hardware, &config("7")));
    assert!(allowed.contains("the driver shows 0, 1"), "{allowed}");
}

#[test]
fn memory_that_is_gone_when_a_model_comes_is_told_with_who_has_it() {
    let mut placement = Placement::plan(&spec(), &with(vec![gpu(3, FREE)]), &config("3")).unwrap();
    let stage = &mut placement.stages[0];
    stage.margin_bytes = 1 << 20;
    let (weights, margin) = (stage.weight_bytes, stage.margin_bytes);
    let all = placement.device_bytes() + margin;
    let ask = |free_now: u64, phase: Phase, need_bytes: Option<u64>| {
        let holders = full(3).holders;
        let gpus = Gpus { devices: vec![Gpu { holders, ..gpu(3, free_now) }], ..Gpus::default() };
        let shortage = Shortage { gpu: Some(3), need_bytes, free_bytes: Some(7) };
        let refusal = placement.refusal(&shortage, phase, (&gpus, &config("3")));
        let RequestError::InsufficientMemory { device, need, free, suggest } = refusal else {
            panic!("{refusal}")
        };
        assert_eq!(device, "GPU 3 (Fake 8)");
        assert!(suggest.ends_with("held by python3 (process 7, 80.00 GiB)"), "{suggest}");
        (need, free)
    };
    assert_eq!(ask(100, Phase::Loading, Some(50)), (all, 100));
    assert_eq!(ask(100, Phase::Starting, Some(50)), (all - weights, 100));
    // What was lacking is there again: then that which could not be had is told.
    assert_eq!(ask(all, Phase::Loading, Some(50)), (50, 7));
    assert_eq!(ask(all, Phase::Loading, None), (margin, 7));
}
