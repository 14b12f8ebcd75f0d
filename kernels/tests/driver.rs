//! The door to the driver, on machines with and without a GPU.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use tandem_kernels::{CudaVersion, DriverError, Gpu, GpuError, driver};

/// Runs everywhere: the answer depends on the machine, that there is a typed one does not.
#[test]
fn the_door_gives_a_typed_answer_on_any_machine() {
    match driver() {
        Ok(driver) => {
            for ordinal in 0..driver.device_count().expect("a count") {
                let device = driver.device(ordinal);
                println!("{device:?}");
                let name = driver.device_name(ordinal).expect("a name");
                assert!(!name.is_empty());
                let device = match device {
                    Ok(device) => device,
                    // One that others have filled is no fault of the door's.
                    Err(unusable) => {
                        assert_eq!((unusable.ordinal, unusable.name), (ordinal, name));
                        continue;
                    }
                };
                assert_eq!((device.ordinal, &device.name), (ordinal, &name));
                assert!(device.memory_free_bytes <= device.memory_total_bytes);
                assert!(device.compute_capability.major >= 5);
                assert!(device.multiprocessors > 0);
            }
        }
        Err(error) => {
            println!("{error}");
            assert!(!error.to_string().is_empty());
            assert_eq!(driver().map(|_| ()), Err(error), "the answer does not change");
        }
    }
}

#[test]
fn asking_from_many_threads_gives_one_answer() {
    let answers: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| format!("{:?}", driver().map(|driver| driver.version()))))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
}

#[test]
fn errors_say_what_to_do() {
    let old = DriverError::DriverTooOld {
        found: CudaVersion::from_driver_number(12_080),
        wanted: CudaVersion { major: 13, minor: 0 },
    };
    let said = "the NVIDIA driver supports CUDA 12.8, and 13.0 is needed: update the driver";
    assert_eq!(old.to_string(), said);
    let said = "no NVIDIA driver: the library libcuda was not found";
    assert_eq!(DriverError::NoDriverLibrary.to_string(), said);
    let failed = DriverError::InitFailed { function: "cuInit", code: 803 };
    assert!(failed.to_string().starts_with("cuInit failed with CUDA error 803 (kernel module"));
    let unknown = DriverError::InitFailed { function: "cuInit", code: 12345 };
    assert_eq!(unknown.to_string(), "cuInit failed with CUDA error 12345");
}

#[test]
fn driver_numbers_decode_to_versions() {
    for (number, text) in [(13_000, "13.0"), (12_080, "12.8"), (9_020, "9.2"), (-5, "0.0")] {
        assert_eq!(CudaVersion::from_driver_number(number).to_string(), text);
    }
}

const CHILD: &str = "child_prints_what_the_door_says";

/// The child of the tests below; on its own it only prints.
#[test]
fn child_prints_what_the_door_says() {
    let devices = driver().and_then(|driver| {
        let count = driver.device_count()?;
        Ok((0..count).map(|ordinal| driver.device(ordinal)).collect::<Vec<_>>())
    });
    println!("answer: {devices:?}");
}

const OPENING_CHILD: &str = "child_opens_a_gpu";

/// The child of tests below, which opens a GPU, loads its kernels and asks for memory.
#[test]
fn child_opens_a_gpu() {
    let opened = || {
        let gpu = Gpu::open(&driver()?, 0)?;
        gpu.load_kernels()?;
        let memory = gpu.alloc(12_345)?;
        let page = vec![0u8; 1 << 16];
        // SAFETY: the memory outlives what is registered of it.
        let registered = unsafe { gpu.register(&page)? };
        Ok::<_, GpuError>((memory.bytes(), registered.bytes()))
    };
    if std::env::var_os("FAKE_CUDA_FAILS").is_some() {
        println!("answer: {:?}", opened());
    }
}

/// A folder with the fake driver under the names of both libraries; `None` where it was not built.
#[allow(clippy::print_stdout, reason = "a test that is skipped says so")]
fn fake_libraries() -> Option<PathBuf> {
    let child = std::env::current_exe().expect("this test's program");
    let profile = child.parent()?.parent()?;
    let built = profile.join("examples/libcuda.so");
    if !built.exists() {
        println!("skipped: the fake driver is built by a full `cargo test` only");
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(profile.file_name()?);
    std::fs::create_dir_all(&folder).expect("a folder of ours");
    for name in ["libcuda.so", "libnvidia-ml.so.1"] {
        // Tests and runs of them share the folder.
        if let Err(error) = symlink(&built, folder.join(name)) {
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{name}");
        }
    }
    Some(folder)
}

/// What the door says in a process that finds the fake driver; `None` where there is none.
fn answer_of_fake(settings: &[(&str, &str)]) -> Option<String> {
    answer_of(CHILD, settings)
}

/// The same of one of the children.
fn answer_of(test: &str, settings: &[(&str, &str)]) -> Option<String> {
    let folder = fake_libraries()?;
    let child = std::env::current_exe().expect("this test's program");
    let output = Command::new(child)
        .args([test, "--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .envs(settings.iter().copied())
        .output()
        .expect("the child runs");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.split_once("answer: ")).map(|(_, said)| said);
    Some(line.expect("an answer").to_owned())
}

#[test]
fn a_working_driver_tells_its_devices() {
    let Some(said) = answer_of_fake(&[]) else { return };
    for part in [
        r#"ordinal: 1, name: "Fake 1", pci_address: "0000:01:00.0""#,
        "memory_total_bytes: 85899345920",
        "memory_free_bytes: 64424509440",
        "ComputeCapability { major: 9, minor: 0 }, multiprocessors: 132",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
}

#[test]
fn every_way_of_not_working_has_its_answer() {
    for (name, value, wanted) in [
        ("FAKE_CUDA_INIT", "100", "Err(NoDevice)"),
        ("FAKE_CUDA_INIT", "803", r#"Err(InitFailed { function: "cuInit", code: 803 })"#),
        ("FAKE_CUDA_INIT", "77777", r#"Err(InitFailed { function: "cuInit", code: 77777 })"#),
        ("FAKE_CUDA_DEVICES", "0", "Err(NoDevice)"),
        ("FAKE_CUDA_VERSION", "12080", "Err(DriverTooOld { found: CudaVersion { major: 12"),
    ] {
        let Some(said) = answer_of_fake(&[(name, value)]) else { return };
        assert!(said.starts_with(wanted), "{name}={value}: {said}");
    }
}

#[test]
fn a_full_gpu_leaves_the_others_and_tells_who_fills_it() {
    // No context of this process is open when the holders are asked.
    let holders = "holders: [MemoryHolder { pid: 4242, bytes: Some(6442450944) }]";
    for (full, other) in [("0", "1"), ("1", "0")] {
        let Some(said) = answer_of_fake(&[("FAKE_CUDA_FULL", full)]) else { return };
        let usable = format!("Ok(DeviceFacts {{ ordinal: {other}, name: \"Fake {other}\"");
        let unusable = format!(
            "Err(UnusableDevice {{ ordinal: {full}, name: \"Fake {full}\", \
             reason: QueryFailed {{ ordinal: {full}, question: \"context\", "
        );
        assert!(said.contains(&usable) && said.contains(&unusable), "{said}");
        assert_eq!(said.matches(holders).count(), 2, "{said}");
    }
}

#[test]
fn too_little_memory_is_told_as_such_wherever_it_comes_to_light() {
    let lacks = |what: &str, need: &str, free: &str| {
        let figures = format!("need_bytes: {need}, free_bytes: {free}");
        format!("Err(OutOfMemory {{ ordinal: 0, what: {what:?}, {figures} }})")
    };
    let free = "Some(64424509440)";
    for (function, wanted) in [
        ("none", "Ok((12345, 65536))".to_owned()),
        ("cuDevicePrimaryCtxRetain", lacks("opening a context", "None", "None")),
        ("cuStreamCreate", lacks("making a stream", "None", free)),
        ("cuModuleLoadData", lacks("loading the kernels", "None", free)),
        ("cuModuleGetFunction", lacks("finding a kernel", "None", free)),
        ("cuFuncLoad", lacks("loading a kernel", "None", free)),
        ("cuMemAlloc_v2", lacks("allocating memory", "Some(12345)", free)),
        ("cuMemHostRegister_v2", "Err(HostOutOfMemory { ordinal: 0, need_bytes: ".to_owned()),
    ] {
        let Some(said) = answer_of(OPENING_CHILD, &[("FAKE_CUDA_FAILS", function)]) else { return };
        assert!(said.starts_with(&wanted), "{function}: {said}");
    }
}

#[test]
fn a_gpu_that_lacks_nothing_but_kernels_is_unsupported() {
    // `CUDA_ERROR_NO_BINARY_FOR_GPU`, and a fault that ends the context.
    for (code, wanted) in
        [("209", "Err(Unsupported { ordinal: 0, name: \"Fake 0\""), ("700", "Err(Lost {")]
    {
        let settings = [("FAKE_CUDA_FAILS", "cuModuleLoadData"), ("FAKE_CUDA_CODE", code)];
        let Some(said) = answer_of(OPENING_CHILD, &settings) else { return };
        assert!(said.starts_with(wanted), "{code}: {said}");
    }
}
