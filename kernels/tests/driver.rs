//! The door to the driver, on machines with and without a GPU.

use std::process::Command;
use tandem_kernels::{CudaVersion, DriverError, driver};

/// Runs everywhere: the answer depends on the machine, that there is a typed one does not.
#[test]
fn the_door_gives_a_typed_answer_on_any_machine() {
    match driver() {
        Ok(driver) => {
            let devices = driver.devices().expect("facts of an initialised driver's devices");
            assert_eq!(devices.len(), driver.device_count().expect("a count"));
            for (ordinal, device) in devices.iter().enumerate() {
                println!("{device:?}");
                assert_eq!(device.ordinal, ordinal);
                assert!(!device.name.is_empty());
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
    let names = driver().and_then(|driver| driver.devices());
    println!("answer: {names:?}");
}

/// What the door says in a process that finds the fake driver; `None` where it was not built.
#[allow(clippy::print_stdout, reason = "a test that is skipped says so")]
fn answer_of_fake(settings: &[(&str, &str)]) -> Option<String> {
    let child = std::env::current_exe().expect("this test's program");
    let folder = child.parent()?.parent()?.join("examples");
    if !folder.join("libcuda.so").exists() {
        println!("skipped: the fake driver is built by a full `cargo test` only");
        return None;
    }
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
        r#"ordinal: 1, name: "Fake 1", pci_address: "0000:00:00.0""#,
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
