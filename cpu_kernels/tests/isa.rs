//! Instruction sets: names, detection, and refusal of what the CPU lacks.

use tandem_cpu_kernels::{DType, Isa, Kernels, Layout, layout_for};

#[test]
fn names_lead_back_to_their_instruction_set() {
    for isa in Isa::ALL {
        assert_eq!(isa.to_string().parse(), Ok(isa));
    }
    let named = ["scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx"];
    assert_eq!(Isa::ALL.map(Isa::name), named);
    assert!(Isa::ALL.is_sorted());
    let error = "neon".parse::<Isa>().unwrap_err();
    assert!(error.to_string().contains("avx512vnni"), "{error}");
}

#[test]
fn a_table_exists_exactly_for_what_the_cpu_has() {
    for isa in Isa::ALL {
        match Kernels::for_isa(isa) {
            Ok(kernels) => {
                assert!(isa.is_available());
                assert_eq!(kernels.isa(), isa);
            }
            Err(error) => {
                assert!(!isa.is_available());
                assert_eq!((error.wanted, error.best), (isa, Isa::detect()));
            }
        }
    }
    assert_eq!(Kernels::best().isa(), Isa::detect());
    // AMX only by name: one stream is slower with it where memory is fast.
    assert_eq!(Isa::available().filter(|isa| *isa != Isa::Amx).last(), Some(Isa::detect()));
}

#[test]
fn only_quantised_types_are_interleaved_and_only_for_vectors() {
    for dtype in DType::ALL {
        assert_eq!(layout_for(dtype, Isa::Scalar), Layout::RowMajor);
        let interleaved = layout_for(dtype, Isa::Avx2) == Layout::Rows16;
        assert_eq!(interleaved, dtype.is_quantized());
    }
}

#[test]
fn tiles_are_for_many_workers() {
    assert_eq!(Isa::for_workers(2), Isa::detect());
    let is_amx = Isa::for_workers(16) == Isa::Amx;
    assert_eq!(is_amx, Isa::Amx.is_available());
}
