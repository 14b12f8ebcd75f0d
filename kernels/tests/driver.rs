//! The door to the driver, on machines with and without a GPU.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use tandem_kernels::{CudaVersion, DriverError, driver};

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
    let folder = fake_libraries()?;
    let child = std::env::current_exe().expect("this test's program");
    let output = Command::new(child)
        .args([CHILD, "--exact", "--nocapture"])
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
