//! What is measured of a machine, and how long that holds. Never how fast anything is.

use std::fs;
use std::time::Duration;
use tandem::config::GpuChoice;
use tandem::hardware::{
    CopyRates, Fingerprint, GPU_TOKENS_MEASURED, GpuProductRates, HardwareProfile, MacRate,
    Measured, Probe, ProductRates, ReadRate, TOKENS_MEASURED, choose_cpus, disk_read_rate,
    load_measured, probe_file, roofs, store_measured,
};
use tandem::tensor::DType;
use tandem_cpu_kernels::{Isa, Kernels};

#[test]
fn a_probe_measures_every_part_of_this_machine() {
    let hardware = HardwareProfile::detect();
    let cpus = choose_cpus(&hardware.topology, 3);
    let mut memory = vec![0; 4 << 20];
    // More threads than processors are as good as any here.
    let team = roofs::Team { threads: 3, cpus };
    let probe = Probe {
        team,
        cpus_of: &|threads| choose_cpus(&hardware.topology, threads),
        kernels: Kernels::best(),
        memory: &mut memory,
        copy_bytes: (8 << 20) + 16,
    };
    let measured = probe.measure(&hardware.gpus);
    println!("{measured:#?}");
    let threads: Vec<usize> = measured.reads.iter().map(|read| read.threads).collect();
    assert_eq!(threads, [1, 2, 3]);
    let is_rate = |rate: f64| rate.is_finite() && rate > 0.0;
    assert!(measured.reads.iter().all(|read| is_rate(read.bytes_per_second)));
    assert!(is_rate(measured.cpu.per_second) && is_rate(measured.seconds));
    let dtypes: Vec<_> = measured.products.iter().map(|rates| rates.dtype.as_str()).collect();
    assert_eq!(dtypes, DType::ALL.map(DType::name));
    let products = measured.products.iter().flat_map(|rates| rates.macs_per_second);
    assert!(products.into_iter().all(is_rate));
    assert_eq!(measured.notes, [""; 0]);
    assert_eq!(measured.gpus.len(), hardware.gpus.devices.len());
    for gpu in &measured.gpus {
        let copies = [gpu.pinned, gpu.both_ways, gpu.pageable];
        assert!(
            copies
                .iter()
                .all(|CopyRates { to_gpu, from_gpu }| { is_rate(*to_gpu) && is_rate(*from_gpu) })
        );
        assert!(is_rate(gpu.beside_reads.to_gpu) && is_rate(gpu.beside_reads.reads));
        assert!(is_rate(gpu.read_bytes_per_second) && is_rate(gpu.macs.per_second));
        assert!(is_rate(gpu.crossing_us));
        let rates = gpu.products.iter().flat_map(|products| products.macs_per_second);
        assert!(rates.into_iter().all(is_rate) && gpu.products.len() == measured.products.len());
    }
}

#[test]
fn rates_of_products_lie_between_those_that_were_measured() {
    let rates = ProductRates { dtype: "Q4_0".into(), macs_per_second: [1.0, 8.0, 9.0, 5.0] };
    let measured = TOKENS_MEASURED.map(|tokens| rates.with_tokens(tokens as f64));
    assert_eq!(measured, rates.macs_per_second);
    let wanted = [(0.1, 1.0), (4.5, 4.5), (20.0, 8.5), (144.0, 7.0), (1e9, 5.0)];
    for (tokens, rate) in wanted {
        assert!((rates.with_tokens(tokens) - rate).abs() < 1e-12, "{tokens}");
    }
}

#[test]
fn times_of_a_gpus_products_lie_between_those_that_were_measured() {
    let macs_per_second = [1.0, 4.0, 8.0, 8.0, 64.0];
    let rates = GpuProductRates { dtype: "Q4_0".into(), macs_per_second };
    let seconds = GPU_TOKENS_MEASURED.map(|tokens| rates.seconds_per_weight(tokens as f64));
    assert_eq!(seconds, [1.0, 2.0, 4.0, 8.0, 8.0]);
    // One token takes no less; beyond the last number each takes as long as there.
    for (tokens, wanted) in [(0.5, 1.0), (20.0, 3.0), (48.0, 6.0), (288.0, 8.0), (1024.0, 16.0)] {
        assert!((rates.seconds_per_weight(tokens) - wanted).abs() < 1e-12, "{tokens}");
    }
}

#[test]
fn what_was_measured_is_kept_until_the_machine_is_another() {
    let here = Fingerprint::of(&HardwareProfile::detect(), (2, &[]), Isa::Scalar);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = probe_file(&folder.path().join("tandem"));
    assert_eq!(load_measured(&file, &here), None);
    let measured = Measured {
        reads: vec![ReadRate { threads: 1, bytes_per_second: 2.5e10 }],
        cpu: MacRate { numbers: "int8".into(), per_second: 1e12 },
        products: vec![ProductRates { dtype: "Q4_0".into(), macs_per_second: [0.5; 4] }],
        ..Measured::default()
    };
    store_measured(&file, &here, &measured).expect("a folder of ours");
    assert_eq!(load_measured(&file, &here), Some(measured.clone()));
    // Where no GPU is wanted, whatever was measured of them is of no account.
    let off = HardwareProfile::detect_for(&GpuChoice::Off);
    let without = Fingerprint::of(&off, (2, &[]), Isa::Scalar);
    assert_eq!((&without.gpus, &without.driver), (&None, &None));
    let memory_total_bytes = here.memory_total_bytes;
    let without = Fingerprint { memory_total_bytes, ..without };
    assert_eq!(load_measured(&file, &without), Some(measured));
    let changes: [fn(&mut Fingerprint); 10] = [
        |other| other.cpu.push('2'),
        |other| other.processors.push(4096),
        |other| other.cpu_quota_thousandths = Some(1),
        |other| other.workers = 3,
        |other| other.worker_processors.push(1),
        |other| other.isa = "avx2".into(),
        |other| other.memory_total_bytes += 1,
        |other| other.gpus = Some(vec!["Fake 8".into()]),
        |other| other.version.push('1'),
        |other| other.figures -= 1,
    ];
    for change in changes {
        let mut other = here.clone();
        change(&mut other);
        assert_eq!(load_measured(&file, &other), None, "{other:?}");
    }
    let left = fs::read_dir(folder.path().join("tandem")).expect("a folder").count();
    assert_eq!(left, 1, "nothing but the file");
    fs::write(&file, "{\"fingerprint\":").expect("a file");
    assert_eq!(load_measured(&file, &here), None);
}

#[test]
fn a_file_is_read_to_its_end_or_for_its_time() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (file, empty) = (folder.path().join("file"), folder.path().join("empty"));
    // No whole number of pieces, nor of what direct reads want.
    fs::write(&file, vec![7; (9 << 20) + 5]).expect("a file");
    for most in [Duration::from_micros(1), Duration::from_secs(10)] {
        let rate = disk_read_rate(&file, most).expect("a file that can be read");
        println!("{rate:?}");
        assert!(rate.bytes_per_second.is_finite() && rate.file == file);
    }
    fs::write(&empty, "").expect("a file");
    assert!(disk_read_rate(&empty, Duration::from_secs(1)).is_err());
    assert!(disk_read_rate(&folder.path().join("none"), Duration::from_secs(1)).is_err());
}
