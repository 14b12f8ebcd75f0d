//! Log-probabilities of folders against those of GGUF files with the same weights, and of a
//! reference in f32.

use super::hf_folder::{Folder, Format};
use super::reference::{Reference, distance_from};
use super::stage::{Model, options, plan_tokens, run, score_next};
use super::tiny_model::{Family, TinyModel, split_mix};
use tandem::executor::{Program, StagePart};
use tandem::formats::Checkpoint;
use tandem::step::{RowOutput, StepPlan};
use tandem::tensor::DType;
use tandem::units::TokenId;

fn tokens(model: &Model) -> Vec<TokenId> {
    let (mut seed, vocab) = (11, model.spec.vocab_size as u64);
    (0..45).map(|_| TokenId((split_mix(&mut seed) % vocab) as u32)).collect()
}

fn rows(model: &Model) -> Vec<RowOutput> {
    let tokens = tokens(model);
    let mut stage = model.stage(&options(2, 128));
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 0), &tokens, 0..tokens.len(), score_next(&tokens, 20));
    run(&mut stage, &plan).rows
}

/// Mean and largest distance of what is likely from the reference.
fn distance(model: &Model, rows: &[RowOutput]) -> (f64, f64) {
    let program = Program::lower(&model.spec, &StagePart::whole(model.spec.layers.len())).unwrap();
    distance_from(&Reference::new(&model.checkpoint, &program).logits(&tokens(model)), rows)
}

/// Opens both forms of a model and compares them.
fn compare(model: &TinyModel, format: Format) {
    let gguf = model.gguf();
    let folder = Folder::new(model, &gguf, format).write();
    let ours = Model::open(Checkpoint::open(folder.path()).unwrap());
    let name = format!("{:?} {} as {format:?}", model.family, model.dtype);
    let got = rows(&ours);
    let (mean, largest) = distance(&ours, &got);
    println!("{name}: {mean:.6} mean, {largest:.6} largest from exact");
    let exact = !model.dtype.is_quantized();
    let (mean_max, largest_max) = if exact { (1e-3, 1e-2) } else { (0.04, 0.3) };
    assert!(mean < mean_max && largest < largest_max, "{name}: {mean} mean, {largest} largest");
    // Private type ids let a test's GGUF file hold the very blocks that the folder becomes.
    let theirs = rows(&Model::from_bytes(&gguf.bytes()));
    let bits = |rows: &[RowOutput]| {
        let all = rows.iter().flat_map(|row| std::iter::once(&row.token).chain(&row.top));
        all.map(|token| (token.id, token.logprob.to_bits())).collect::<Vec<_>>()
    };
    if matches!(model.family, Family::Llama | Family::Mixtral) {
        // Query and key elements are in another order, and so are the sums over them.
        for (got, wanted) in got.iter().zip(&theirs) {
            let off = (got.token.logprob - wanted.token.logprob).abs();
            assert!(off < if exact { 1e-2 } else { 0.3 }, "{name}: {off}");
        }
    } else {
        assert_eq!(bits(&got), bits(&theirs), "{name}");
    }
}

#[test]
fn floats_of_every_family_answer_as_in_a_gguf_file() {
    for family in Family::ALL {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            compare(&TinyModel::new(family).dtype(dtype), Format::Floats);
        }
    }
}

#[test]
fn four_bits_of_every_family_answer_as_the_same_blocks() {
    for family in Family::ALL {
        for format in [Format::Awq, Format::Gptq, Format::GptqV2, Format::Packed] {
            for dtype in [DType::INT4_128, DType::INT4_64, DType::INT4_32] {
                let mut model = TinyModel::new(family).dtype(dtype).with_all_experts();
                model.embedding_dtype = DType::F16;
                compare(&model, format);
            }
        }
    }
}

#[test]
fn fp8_of_every_family_answers_as_the_same_blocks() {
    for family in Family::ALL {
        for dtype in [DType::E4M3_128, DType::E4M3_32] {
            let mut model = TinyModel::new(family).dtype(dtype);
            model.embedding_dtype = DType::BF16;
            compare(&model, Format::Fp8);
        }
    }
}

#[test]
fn a_folder_of_two_files_and_one_of_its_files_are_the_whole_model() {
    let model = TinyModel::new(Family::Qwen3Moe).dtype(DType::F16);
    let folder = Folder::new(&model, &model.gguf(), Format::Floats);
    let (one, two) = (folder.write(), folder.write_in_two());
    let whole = Checkpoint::open(one.path()).unwrap();
    let shard = two.path().join("model-00002-of-00002.safetensors");
    for path in [one.path().join("model.safetensors"), two.path().to_owned(), shard] {
        let other = Checkpoint::open(&path).unwrap();
        assert_eq!(other.tensors().len(), whole.tensors().len(), "{}", path.display());
        for info in whole.tensors() {
            let read = |checkpoint: &Checkpoint| {
                let mut bytes = vec![0; info.bytes.unwrap()];
                checkpoint.read_rows(info.name, 0..info.shape.rows(), &mut bytes).unwrap();
                bytes
            };
            assert!(read(&whole) == read(&other), "{} of {}", info.name, path.display());
        }
    }
}
