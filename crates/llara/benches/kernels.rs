//! Every fused kernel of the backend on the shapes of a training step: time, and the rate of memory traffic or of
//! operations.
//!
//! `cargo bench --bench kernels -- [FILTER…]`. Dtypes are those of a training step: with bf16, the residual
//! stream and trainable parameters stay f32. Bytes are those that an operation must read and write, each once;
//! operations of attention are those of the pairs of a query and a key that it attends to.

mod timing;

use llara::Result;
use llara::backend::{
    AdamWStep, AttentionInput, AttentionShape, Backend, Cpu, DropoutKey, Dtype, Layout,
    RopeDirection, RopeTable, ScatterPlan, ScatterRows, Shape, TokenIds,
};

use timing::Cases;

type Tensor = <Cpu as Backend>::Tensor;

/// Lengths of the sequences: together as many tokens as a step of `bench/compare`.
const SEQUENCES: [usize; 24] = [143; 24];
const TOKENS: usize = 24 * 143;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCABULARY: usize = 8192;
const SHAPE: AttentionShape =
    AttentionShape { heads: 9, kv_heads: 3, head_dim: 64, window: None, scale: 0.125 };

/// The work of one run of a kernel.
#[derive(Clone, Copy)]
enum Work {
    Bytes(usize),
    Flops(usize),
}

/// Times kernels in one precision.
struct Kernels<'a> {
    cases: &'a Cases,
    cpu: Cpu,
    precision: Dtype,
}

fn main() -> Result<()> {
    let Some(cases) = Cases::from_args() else { return Ok(()) };
    println!("kernel                           ms      rate   fastest");
    for precision in [Dtype::F32, Dtype::Bf16] {
        let kernels = Kernels { cases: &cases, cpu: Cpu::new(), precision };
        kernels.rows()?;
        kernels.norms()?;
        kernels.attention()?;
        kernels.pointwise()?;
    }
    Kernels { cases: &cases, cpu: Cpu::new(), precision: Dtype::F32 }.objective()
}

impl Kernels<'_> {
    fn time<T>(&self, name: &str, work: Work, run: impl FnMut() -> Result<T>) -> Result<()> {
        let name = format!("{name} {}", self.precision);
        if !self.cases.include(&name) {
            return Ok(());
        }
        let times = timing::time(run)?;
        let (amount, unit) = match work {
            Work::Bytes(bytes) => (bytes, "GB/s"),
            Work::Flops(flops) => (flops, "GFLOP/s"),
        };
        let [median, fastest] =
            [times.median, times.fastest].map(|seconds| amount as f64 / seconds / 1e9);
        println!("{name:25} {:9.3} {median:9.1} {fastest:9.1} {unit}", times.median * 1e3);
        Ok(())
    }

    /// Random values between -1 and 1 in the dtype of activations.
    fn values(&self, rows: usize, cols: usize) -> Result<Tensor> {
        self.cpu.cast(&self.singles(rows, cols)?, self.precision)
    }

    /// The same in f32.
    fn singles(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let value = |i: u32| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        self.cpu.upload(&(0..(rows * cols) as u32).map(value).collect::<Vec<_>>(), rows, cols)
    }

    /// Bytes of an element.
    fn element(&self) -> usize {
        self.precision.bytes()
    }

    fn rows(&self) -> Result<()> {
        let (cpu, elements) = (&self.cpu, TOKENS * HIDDEN);
        let table = self.values(VOCABULARY, HIDDEN)?;
        let ids: Vec<u32> =
            (0..TOKENS as u32).map(|i| i.wrapping_mul(2_654_435_761) % 8192).collect();
        let plan = ScatterPlan::upload(&ScatterRows::new(&ids), cpu)?;
        let [ids] = cpu.upload_indices([&ids])?;
        let both = Work::Bytes(2 * self.element() * elements);
        self.time("gather_rows", both, || cpu.gather_rows(&table, &ids))?;
        let (dy, mut dtable) =
            (self.values(TOKENS, HIDDEN)?, cpu.zeros(VOCABULARY, HIDDEN, Dtype::F32)?);
        let scattered = Work::Bytes((self.element() + 2 * 4) * elements);
        self.time("scatter_add_rows", scattered, || cpu.scatter_add_rows(&dy, &plan, &mut dtable))?;
        let other = if self.precision == Dtype::F32 { Dtype::Bf16 } else { Dtype::F32 };
        let cast = Work::Bytes((4 + 2) * elements);
        self.time("cast from", cast, || cpu.cast(&dy, other))
    }

    fn norms(&self) -> Result<()> {
        let (cpu, elements) = (&self.cpu, TOKENS * HIDDEN);
        let (x, dy, w) = (
            self.singles(TOKENS, HIDDEN)?,
            self.values(TOKENS, HIDDEN)?,
            cpu.upload(&[1.0; HIDDEN], 1, HIDDEN)?,
        );
        let forward = Work::Bytes((4 + self.element()) * elements);
        self.time("rms_norm", forward, || cpu.rms_norm(x.view(), &w, 1e-6, self.precision))?;
        let (_, inv_rms) = cpu.rms_norm(x.view(), &w, 1e-6, self.precision)?;
        // Accumulates into the gradient of the residual stream, which is read and written in place.
        let (mut dw, mut dx) =
            (cpu.zeros(1, HIDDEN, Dtype::F32)?, Some(cpu.zeros(TOKENS, HIDDEN, Dtype::F32)?));
        let backward = Work::Bytes((self.element() + 3 * 4) * elements);
        self.time("rms_norm_backward", backward, || {
            dx = Some(cpu.rms_norm_backward(&dy, &x, &w, &inv_rms, Some(&mut dw), dx.take())?);
            Ok(())
        })
    }

    fn attention(&self) -> Result<()> {
        let cpu = &self.cpu;
        let kv = SHAPE.kv_heads * SHAPE.head_dim;
        // q, k and v in one matrix, as one product computes them.
        let mut qkv = self.values(TOKENS, HIDDEN + 2 * kv)?;
        let dout = self.values(TOKENS, HIDDEN)?;
        let longest = SEQUENCES.into_iter().max().unwrap_or(0);
        let offsets = SEQUENCES.iter().scan(0, |end, length| {
            *end += *length as u32;
            Some(*end)
        });
        let offsets: Vec<u32> = std::iter::once(0).chain(offsets).collect();
        let positions: Vec<u32> = SEQUENCES.iter().flat_map(|length| 0..*length as u32).collect();
        let [device_offsets, positions] = cpu.upload_indices([&offsets, &positions])?;
        let layout = Layout { bounds: offsets, offsets: device_offsets, positions, longest };

        let half = SHAPE.head_dim / 2;
        let angles = (0..longest * half).map(|i| (i / half) as f32 / (1 + i % half) as f32);
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
        let table = RopeTable {
            cos: cpu.upload(&cos, longest, half)?,
            sin: cpu.upload(&sin, longest, half)?,
        };
        let in_place = Work::Bytes(2 * self.element() * TOKENS * HIDDEN);
        self.time("rope", in_place, || {
            let q = qkv.view_mut().with_cols(0..HIDDEN);
            cpu.rope(q, &layout.positions, &table, RopeDirection::Forward)
        })?;

        let pairs: usize = SEQUENCES.iter().map(|length| length * (length + 1) / 2).sum();
        let product = 2 * pairs * SHAPE.heads * SHAPE.head_dim;
        let input = AttentionInput {
            q: qkv.view().with_cols(0..HIDDEN),
            k: qkv.view().with_cols(HIDDEN..HIDDEN + kv),
            v: qkv.view().with_cols(HIDDEN + kv..HIDDEN + 2 * kv),
            queries: &layout,
            keys: &layout,
            shape: &SHAPE,
        };
        let forward = || cpu.attention(&input);
        self.time("attention", Work::Flops(2 * product), forward)?;
        // The gradients of the two products: four products. Recomputing the scores is not counted.
        let attended = forward()?;
        self.time("attention_backward", Work::Flops(4 * product), || {
            cpu.attention_backward(&dout, &input, &attended)
        })
    }

    fn pointwise(&self) -> Result<()> {
        let cpu = &self.cpu;
        let gate_up = self.values(TOKENS, 2 * INTERMEDIATE)?;
        let mut in_place =
            Some((self.values(TOKENS, INTERMEDIATE)?, self.values(TOKENS, 2 * INTERMEDIATE)?));
        let x = self.values(TOKENS, INTERMEDIATE)?;
        let matrices = |count| Work::Bytes(count * self.element() * TOKENS * INTERMEDIATE);
        self.time("swiglu", matrices(3), || cpu.swiglu(&gate_up))?;
        // In place: the results of one call are the input of the next.
        self.time("swiglu_backward", matrices(6), || {
            let Some((dy, gate_up)) = in_place.take() else { unreachable!("put back below") };
            let (gate_up, dy) = cpu.swiglu_backward(dy, gate_up)?;
            in_place = Some((dy, gate_up));
            Ok(())
        })?;
        let [indices] = cpu.upload_indices([&(0..TOKENS as u32).collect::<Vec<_>>()])?;
        let tokens = || TokenIds { sequences: &indices, positions: &indices };
        let key = DropoutKey { seed: 42, step: 1, module: 1, probability: 0.1 };
        self.time("dropout", matrices(2), || cpu.dropout(&x, tokens(), &key, None))
    }

    /// Operations that are f32 in either precision.
    fn objective(&self) -> Result<()> {
        let cpu = &self.cpu;
        let (queries, passages) = (512, 4096);
        let scores = self.singles(queries, passages)?;
        let targets: Vec<u32> = (0..queries as u32).map(|i| i * 8).collect();
        let [targets] = cpu.upload_indices([&targets])?;
        let read_and_written = Work::Bytes(2 * 4 * queries * passages);
        self.time("cross_entropy", read_and_written, || cpu.cross_entropy(&scores, &targets))?;

        let matrix = || self.singles(VOCABULARY, HIDDEN);
        let elements = VOCABULARY * HIDDEN;
        let (mut param, grad, mut first, mut second) = (
            matrix()?,
            matrix()?,
            cpu.zeros(VOCABULARY, HIDDEN, Dtype::F32)?,
            cpu.zeros(VOCABULARY, HIDDEN, Dtype::F32)?,
        );
        let mut sum = cpu.zeros(1, 1, Dtype::F32)?;
        let read = Work::Bytes(4 * elements);
        self.time("add_sum_of_squares", read, || {
            cpu.add_sum_of_squares(&grad, 0..elements, &mut sum)
        })?;
        let clip = cpu.clip_factor(&sum, Some(1.0))?;
        let update = AdamWStep {
            learning_rate: 1e-5,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: 1,
        };
        self.time("adamw", Work::Bytes(7 * 4 * elements), || {
            cpu.adamw(&mut param, 0..elements, &grad, (&mut first, &mut second), &clip, &update)
        })
    }
}
