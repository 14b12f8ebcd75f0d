//! The door to the driver, on machines with and without a GPU.

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
