//! What the kernels of a GPU reach, beside its copy roof measured in the same run.
//!
//! `cargo bench -p tandem-kernels --bench gpu_kernels -- [products] [experts] [attention]
//! [--type Q4_0,…] [--columns 1,8,…] [--shape ROWSxCOLS,…] [--kv f16,q8_0,…]
//! [--shared-kib 99]`: without words, all; with a limit on a block's shared memory, as on a smaller
//! GPU, which holds for products with up to 128 columns.
//! Products take their weights from 400 MB or more of matrices in turn, so that no cache holds
//! them; those of experts are of a layer of Qwen3 30B A3B or Mixtral 8x7B, whose tokens take others
//! each time.

#![allow(clippy::print_stdout, reason = "a bench and its figures")]

#[path = "gpu_kernels/experts.rs"]
mod experts;

use half::f16;
use std::hint::black_box;
use tandem_cpu_kernels::attention::KvDType;
use tandem_cpu_kernels::{DType, quantize_row};
use tandem_kernels::{
    Attend, Columns, DeviceMatrix, DeviceMemory, EightBits, Gpu, GpuError, HeadCounts, KvSpans,
    Product, RoundRows, Runs, Span, Staging, TokenTables, driver, half_bytes,
};

const F32: usize = size_of::<f32>();
const WEIGHT_BYTES: usize = 400 << 20;
const REPEATS: usize = 5;

type Outcome<T> = Result<T, GpuError>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let driver = match driver() {
        Ok(driver) => driver,
        Err(error) => {
            println!("no GPU: {error}");
            return Ok(());
        }
    };
    let mut gpu = Gpu::open(&driver, 0)?;
    let copy = copy_roof(&gpu)?;
    println!("copy roof: {copy:.0} GB/s read and written");
    let list = |name: &str, default: &str| -> Vec<String> {
        let at = arguments.iter().position(|argument| argument == name);
        let given = at.and_then(|at| arguments.get(at + 1)).map_or(default, String::as_str);
        given.split(',').map(str::to_owned).collect()
    };
    let number =
        |text: &String| text.parse::<usize>().unwrap_or_else(|_| panic!("no number: {text}"));
    if let Some(kib) = list("--shared-kib", "").iter().find(|kib| !kib.is_empty()) {
        gpu.limit_shared_bytes(number(kib) << 10);
    }
    let wants = |word: &str| {
        let words = ["products", "experts", "attention"];
        arguments.iter().all(|a| !words.contains(&a.as_str()))
            || arguments.iter().any(|a| a == word)
    };
    if wants("products") {
        println!("| rows x cols | type | columns | us | GB/s | of the roof | T multiply-adds/s |");
        println!("|---|---|---|---|---|---|---|");
        for shape in list("--shape", "6144x4096,4096x4096,28672x4096,4096x14336") {
            let (rows, cols) = shape.split_once('x').unwrap_or_else(|| panic!("no shape: {shape}"));
            let shape = (number(&rows.to_owned()), number(&cols.to_owned()));
            for dtype in list("--type", "Q4_0").iter().map(type_of) {
                let matrices = Matrices::new(&gpu, dtype, shape)?;
                for columns in list("--columns", "1,8,16,32,64,128,512,2048").iter().map(number) {
                    matrices.measure(&gpu, columns, copy)?;
                }
            }
        }
    }
    if wants("experts") {
        let tokens = list("--columns", "1,2,4,8,16,32,64,128,512,2048");
        experts::measure(&gpu, &list("--type", "Q4_0"), tokens.iter().map(number).collect())?;
    }
    if wants("attention") {
        let names = list("--kv", "f16");
        let dtype = |name: &String| name.parse().unwrap_or_else(|error| panic!("{error}"));
        attentions(&gpu, names.iter().map(dtype).collect())?;
    }
    Ok(())
}

/// How tokens of a sequence attend.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// Each for itself.
    Alone,
    /// In tiles, on tensor cores.
    Together,
    /// The same, where several blocks divide a tile's positions.
    Divided,
}

fn type_of(name: &String) -> DType {
    let dtype = DType::ALL.into_iter().find(|dtype| dtype.name() == name);
    dtype.unwrap_or_else(|| panic!("no type: {name}"))
}

/// Median microseconds of one of `count` runs of `work`, recorded once and replayed.
fn time(gpu: &Gpu, count: usize, work: impl Fn() -> Outcome<()>) -> Outcome<f64> {
    work()?;
    gpu.synchronize()?;
    let graph = gpu.record(&work)?.expect("an undisturbed record");
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let start = gpu.mark()?;
        // SAFETY: what was recorded is borrowed by `work`, which lives.
        unsafe { gpu.replay(&graph)? };
        times.push(start.us_until(&gpu.mark()?)? / count as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}

/// GB/s that copies between two pieces of 1 GiB read and write.
fn copy_roof(gpu: &Gpu) -> Outcome<f64> {
    let (from, to) = (gpu.alloc(1 << 30)?, gpu.alloc(1 << 30)?);
    let mut rates = Vec::new();
    for _ in 0..REPEATS {
        let start = gpu.mark()?;
        gpu.copy(from.span(), to.span())?;
        rates.push(2.0 * f64::from(1 << 30) / start.us_until(&gpu.mark()?)? / 1e3);
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[REPEATS / 2])
}

/// Numbers in ±1 that look random.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let next = |state: &mut u32| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some((*state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_n((), count).scan(seed, |state, ()| next(state)).collect()
}

fn floats(gpu: &Gpu, count: usize) -> Outcome<DeviceMemory> {
    let memory = gpu.alloc(count * F32)?;
    gpu.upload(&noise(count, 7), memory.span())?;
    Ok(memory)
}

struct Matrices {
    shape: (usize, usize),
    dtype: DType,
    all: Vec<DeviceMatrix>,
}

impl Matrices {
    fn new(gpu: &Gpu, dtype: DType, shape: (usize, usize)) -> Outcome<Self> {
        let (rows, cols) = shape;
        let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
        let mut row = vec![0; row_bytes];
        let mut file = Vec::with_capacity(rows * row_bytes);
        for index in 0..rows {
            if index < 16 {
                let values = noise(cols, index as u32);
                match dtype {
                    DType::F32 => row.copy_from_slice(bytemuck_bytes(&values)),
                    DType::F16 => {
                        let halves = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes());
                        row = halves.collect();
                    }
                    DType::BF16 => {
                        let halves =
                            values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes());
                        row = halves.collect();
                    }
                    _ => quantize_row(dtype, &values, &mut row),
                }
                file.extend_from_slice(&row);
            } else {
                file.extend_from_within((index % 16) * row_bytes..(index % 16 + 1) * row_bytes);
            }
        }
        let staging = Staging::new(gpu)?;
        let count = WEIGHT_BYTES.div_ceil(file.len()).max(2);
        let all = (0..count).map(|_| DeviceMatrix::upload(gpu, &staging, dtype, shape, &file));
        Ok(Self { shape, dtype, all: all.collect::<Result<_, _>>()? })
    }

    /// Prints the row of the products with some columns.
    fn measure(&self, gpu: &Gpu, columns: usize, copy: f64) -> Outcome<()> {
        let ((rows, cols), n) = (self.shape, self.all.len());
        let (values, out) = (floats(gpu, columns * cols)?, gpu.alloc(columns * rows * F32)?);
        let (quants, scales) = (
            gpu.alloc(EightBits::quant_bytes(columns, cols, 1))?,
            gpu.alloc(EightBits::scale_bytes(columns, cols, 1))?,
        );
        let halves = gpu.alloc(half_bytes(columns, cols))?;
        let is_wide = columns > gpu.narrow_max();
        let eight_bits = EightBits { quants: quants.span(), scales: scales.span(), passes: 1 };
        let pass = RoundRows {
            values: values.span(),
            up: None,
            out: None,
            eight_bits: Some(eight_bits),
            halves: Some(halves.span()),
            rows: columns,
            cols,
        };
        gpu.round_rows(&pass)?;
        let x = Columns {
            columns,
            cols,
            values: Some(values.span()),
            eight_bits: (!is_wide).then_some(eight_bits),
            halves: is_wide.then_some(halves.span()),
        };
        let us = time(gpu, n, || {
            self.all.iter().try_for_each(|matrix| {
                let product = Product { matrix, bias: None, out: out.span(), stride: rows };
                gpu.multiply(&[product], &x)
            })
        })?;
        let bytes = self.all[0].bytes() as f64;
        let rate = bytes / us / 1e3;
        let macs = (rows * cols * columns) as f64 / us / 1e6;
        println!(
            "| {rows}x{cols} | {} | {columns} | {us:.1} | {rate:.0} | {:.0} % | {macs:.0} |",
            self.dtype,
            100.0 * rate / copy
        );
        Ok(())
    }
}

fn bytemuck_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four bytes, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Bytes that are moderate numbers of every type of KV elements.
fn kept(gpu: &Gpu, bytes: usize) -> Outcome<DeviceMemory> {
    const AT_ONCE: usize = 1 << 20;
    let numbers: Vec<u8> = (0..AT_ONCE).map(|i| 0x2c + (i * 7 % 12) as u8).collect();
    let memory = gpu.alloc(bytes)?;
    for start in (0..bytes).step_by(AT_ONCE) {
        let count = AT_ONCE.min(bytes - start);
        gpu.upload(&numbers[..count], memory.span().part(start, count))?;
    }
    Ok(memory)
}

/// Positions and block tables of all tokens of an attention, and its sequences' tokens.
fn places(
    (sequences, tokens, context): (usize, usize, usize),
    blocks_each: usize,
) -> (Vec<u32>, Vec<u32>, Vec<[u32; 2]>) {
    let (mut positions, mut tables, mut runs) = (Vec::new(), Vec::new(), Vec::new());
    for sequence in 0..sequences {
        runs.push([positions.len() as u32, tokens as u32]);
        positions.extend((context - tokens..context).map(|position| position as u32));
        tables.extend(std::iter::repeat_n((sequence * blocks_each) as u32, tokens));
    }
    (positions, tables, runs)
}

/// Prints the rows of all attentions, with each type of KV.
fn attentions(gpu: &Gpu, dtypes: Vec<KvDType>) -> Outcome<()> {
    println!(
        "| heads, KV heads, elements | KV | way | tokens | context | us | GB/s of KV | TFLOP/s |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let heads = HeadCounts { n_heads: 32, n_kv_heads: 8, head_dim: 128 };
    let alone = [(1, 1, 100), (1, 1, 1000), (1, 1, 8000), (32, 1, 1000), (128, 1, 100)];
    let together = [(1, 512, 512), (1, 2048, 2048), (4, 512, 512)];
    let behind = [256, 1000, 4000, 32000];
    let either = [16, 32, 64, 128].into_iter().flat_map(|n| behind.map(|context| (1, n, context)));
    let ways = [Way::Alone, Way::Together, Way::Divided];
    let cases = alone.into_iter().map(|case| (case, Way::Alone));
    let cases = cases.chain(together.into_iter().map(|case| (case, Way::Together)));
    for (case, way) in cases.chain(either.flat_map(|case| ways.map(|way| (case, way)))) {
        dtypes.iter().try_for_each(|dtype| attention(gpu, (heads, *dtype), case, way))?;
    }
    Ok(())
}

/// Prints the row of an attention: `sequences` with `tokens` new tokens each, the last at
/// `context - 1`. 32 layers of KV in turn.
fn attention(
    gpu: &Gpu,
    (heads, dtype): (HeadCounts, KvDType),
    (sequences, tokens, context): (usize, usize, usize),
    way: Way,
) -> Outcome<()> {
    const LAYERS: usize = 32;
    let block_tokens = 32;
    let each = context.div_ceil(block_tokens);
    let blocks = sequences * each;
    let bytes = blocks * KvSpans::block_bytes(heads, block_tokens, dtype);
    let layers = (0..LAYERS).map(|_| Ok((kept(gpu, bytes)?, kept(gpu, bytes)?)));
    let layers = layers.collect::<Outcome<Vec<_>>>()?;
    let (positions, tables, runs) = places((sequences, tokens, context), each);
    let numbers: Vec<u32> = (0..blocks as u32).rev().collect();
    let upload = |numbers: &[u32]| {
        let memory = gpu.alloc(size_of_val(numbers))?;
        gpu.upload(numbers, memory.span())?;
        Ok::<_, GpuError>(memory)
    };
    let (positions, tables, numbers) = (upload(&positions)?, upload(&tables)?, upload(&numbers)?);
    let on_gpu = upload(runs.as_flattened())?;
    let all = sequences * tokens;
    let (positions, tables, blocks_of) = (positions.span(), tables.span(), numbers.span());
    let table = TokenTables { tokens: all, positions, tables, blocks: blocks_of };
    let width = (heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim;
    let (rows, out) =
        (floats(gpu, all * width)?, gpu.alloc(all * heads.n_heads * heads.head_dim * F32)?);
    let partials = gpu.alloc(Attend::partial_bytes(heads, all, context))?;
    let pass = Attend {
        heads: rows.span(),
        chosen: None,
        out: out.span(),
        eight_bits: None,
        halves: None,
        partials: partials.span(),
        scale: 0.1,
        softcap: None,
        window: None,
        positions_max: context,
    };
    let us = time(gpu, LAYERS, || {
        layers.iter().try_for_each(|(keys, values)| {
            let (keys, values): (Span<'_>, Span<'_>) = (keys.span(), values.span());
            let store = KvSpans { keys, values, blocks, block_tokens, dtype };
            let blocks = match way {
                Way::Alone => return gpu.attend(&pass, heads, (&table, &store), None),
                Way::Together => 1,
                Way::Divided => gpu.run_blocks_max(),
            };
            let runs = Runs { lengths: &runs, on_gpu: on_gpu.span(), blocks };
            gpu.attend_runs(&pass, heads, (&table, &store), &runs)
        })
    })?;
    let kv = (2 * sequences * context * heads.n_kv_heads * dtype.head_bytes(heads.head_dim)) as f64;
    let seen = (tokens * (2 * context - tokens + 1) / 2 * sequences) as f64;
    let flops = 4.0 * seen * (heads.n_heads * heads.head_dim) as f64;
    let HeadCounts { n_heads, n_kv_heads, head_dim } = heads;
    println!(
        "| {n_heads}, {n_kv_heads}, {head_dim} | {dtype} | {way:?} | {sequences} x {tokens} | \
         {context} | {us:.1} | {:.0} | {:.0} |",
        kv / us / 1e3,
        flops / us / 1e6
    );
    black_box(&layers);
    Ok(())
}
