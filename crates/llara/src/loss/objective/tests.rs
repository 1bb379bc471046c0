//! Every combination of terms against its formula in f64, its gradient against finite differences, and several
//! processes against one.

use std::time::Duration;

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::backend::Cpu;
use crate::dist::{Solo, ThreadGroup};
use crate::loss::{DistillationKind, FalseNegatives, MatryoshkaPrefix};

const ROWS: usize = 6;
const GROUP: usize = 3;
const DIMENSION: usize = 12;
const TEMPERATURE: f32 = 0.2;

/// A batch with equal texts: rows 0 and 3 have the same query; passage 5 is a copy of row 0's positive, passage
/// 14 of row 3's, and passage 7 is a positive of row 2 that was not drawn.
struct Batch {
    queries: Vec<Vec<f64>>,
    passages: Vec<Vec<f64>>,
    keys: TextKeys,
    teacher: Vec<f32>,
}

fn unit(rng: &mut ChaCha8Rng) -> Vec<f64> {
    let x: Vec<f64> = (0..DIMENSION).map(|_| rng.random::<f64>() - 0.4).collect();
    let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
    x.iter().map(|x| f64::from((x / norm) as f32)).collect()
}

fn batch() -> Batch {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut passage_keys: Vec<u64> = (100..).take(ROWS * GROUP).collect();
    let mut passages: Vec<Vec<f64>> = (0..ROWS * GROUP).map(|_| unit(&mut rng)).collect();
    for (copy, of) in [(5, 0), (14, 9)] {
        passage_keys[copy] = passage_keys[of];
        passages[copy] = passages[of].clone();
    }
    let mut positives = vec![Vec::new(); ROWS];
    positives[2] = vec![passage_keys[6], passage_keys[7]];
    let keys = TextKeys { queries: vec![1, 2, 3, 1, 4, 5], passages: passage_keys, positives };
    let teacher = (0..ROWS * GROUP).map(|_| rng.random::<f32>() * 4.0 - 2.0).collect();
    Batch { queries: (0..ROWS).map(|_| unit(&mut rng)).collect(), passages, keys, teacher }
}

impl Batch {
    /// Of row `row`, passages that are known to answer its query, by the definition.
    fn knows(&self, row: usize, passage: usize) -> bool {
        let keys = &self.keys;
        (0..ROWS).filter(|&other| keys.queries[other] == keys.queries[row]).any(|other| {
            let key = keys.passages[passage];
            keys.passages[other * GROUP] == key || keys.positives[other].contains(&key)
        })
    }

    /// The loss as its formulas read. Scores that exceed a margin are those at `fixed`, where the gradient is
    /// taken: the mask has none.
    fn loss(&self, fixed: &Batch, options: &ObjectiveOptions, normalized: bool) -> f64 {
        let whole = [MatryoshkaPrefix { dimension: DIMENSION, weight: 1.0 }];
        let is_whole = options.matryoshka.is_empty();
        let prefixes = if is_whole { &whole[..] } else { &options.matryoshka };
        let of_prefix = |prefix: &MatryoshkaPrefix| {
            let cut = |x: &Vec<f64>| -> Vec<f64> {
                let x = &x[..prefix.dimension];
                let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let renormalized = normalized && !is_whole;
                x.iter().map(|x| if renormalized { x / norm } else { *x }).collect()
            };
            let similarity = |batch: &Batch, i: usize, j: usize| -> f64 {
                let (q, p) = (cut(&batch.queries[i]), cut(&batch.passages[j]));
                q.iter().zip(&p).map(|(q, p)| q * p).sum()
            };
            let s = |i, j| similarity(self, i, j);
            let exceeds = |i: usize, j: usize, positive: (usize, usize)| {
                options.false_negatives.margin.is_some_and(|margin| {
                    let (i_positive, j_positive) = positive;
                    similarity(fixed, i, j)
                        > similarity(fixed, i_positive, j_positive) + f64::from(margin)
                })
            };
            let equal = options.false_negatives.mask_equal;
            let t = f64::from(TEMPERATURE);
            let mut sum = 0.0;
            for row in 0..ROWS {
                let positive = row * GROUP;
                let passages = (0..ROWS * GROUP).filter(|&j| {
                    let outside = !options.in_batch_negatives && j / GROUP != row;
                    let masked =
                        outside || equal && self.knows(row, j) || exceeds(row, j, (row, positive));
                    j == positive || !masked
                });
                let denominator: f64 = passages.map(|j| (s(row, j) / t).exp()).sum();
                let forward = denominator.ln() - s(row, positive) / t;
                let queries = (0..ROWS).filter(|&k| {
                    let masked =
                        equal && self.knows(k, positive) || exceeds(k, positive, (row, positive));
                    k == row || !masked
                });
                let denominator: f64 = queries.map(|k| (s(k, positive) / t).exp()).sum();
                let reverse = denominator.ln() - s(row, positive) / t;
                sum += if options.symmetric { (forward + reverse) / 2.0 } else { forward };
                if let Some(distillation) = options.distillation {
                    sum += f64::from(distillation.weight)
                        * self.distance(row, &distillation, |g| s(row, positive + g));
                }
            }
            f64::from(prefix.weight) * sum / ROWS as f64
        };
        prefixes.iter().map(of_prefix).sum()
    }

    fn distance(&self, row: usize, options: &Distillation, s: impl Fn(usize) -> f64) -> f64 {
        let teacher =
            |g: usize| f64::from(self.teacher[row * GROUP + g]) / f64::from(options.temperature);
        let log_softmax = |x: &dyn Fn(usize) -> f64, g: usize| {
            x(g) - (0..GROUP).map(|g| x(g).exp()).sum::<f64>().ln()
        };
        let student = |g: usize| s(g) / f64::from(TEMPERATURE);
        match options.kind {
            DistillationKind::Kl => (0..GROUP)
                .map(|g| {
                    let log_p = log_softmax(&teacher, g);
                    log_p.exp() * (log_p - log_softmax(&student, g))
                })
                .sum(),
            DistillationKind::MarginMse => (1..GROUP)
                .map(|g| (s(0) - s(g) - (teacher(0) - teacher(g))).powi(2) / (GROUP - 1) as f64)
                .sum(),
        }
    }

    /// The rows of a rank.
    fn part(&self, rows: Range<usize>) -> Batch {
        let passages = rows.start * GROUP..rows.end * GROUP;
        Batch {
            queries: self.queries[rows.clone()].to_vec(),
            passages: self.passages[passages.clone()].to_vec(),
            keys: TextKeys {
                queries: self.keys.queries[rows.clone()].to_vec(),
                passages: self.keys.passages[passages.clone()].to_vec(),
                positives: self.keys.positives[rows].to_vec(),
            },
            teacher: self.teacher[passages].to_vec(),
        }
    }
}

/// Loss, and gradients by queries and passages.
struct Outcome {
    loss: f64,
    dqueries: Vec<f32>,
    dpassages: Vec<f32>,
}

/// Also checks that the blocks of queries make no difference but in rounding.
fn evaluate(
    batch: &Batch,
    options: &ObjectiveOptions,
    (normalized, negatives_cross_device): (bool, bool),
    rows: &RowsPerRank,
    collective: Arc<dyn Collective<Cpu>>,
) -> Outcome {
    let cpu = Cpu::new();
    let upload = |x: &[Vec<f64>]| {
        let data: Vec<f32> = x.iter().flatten().map(|&x| x as f32).collect();
        cpu.upload(&data, x.len(), DIMENSION).unwrap()
    };
    let positives: Vec<u32> = (0..batch.queries.len()).map(|row| (row * GROUP) as u32).collect();
    let labels = Labels {
        positives: &positives,
        text_keys: Some(&batch.keys),
        teacher_scores: Some(&batch.teacher),
    };
    // All queries, four or fewer, one.
    let blocks = [Contrastive::<Cpu>::BLOCK_SCORES, 4 * ROWS * GROUP, 1].map(|block_scores| {
        let objective = Contrastive {
            info_nce: InfoNce { temperature: TEMPERATURE },
            options: options.clone(),
            normalized,
            negatives_cross_device,
            collective: Arc::clone(&collective),
            block_scores,
        };
        let embeddings =
            Embeddings { queries: upload(&batch.queries), passages: upload(&batch.passages) };
        let out = objective.loss_and_gradient(&cpu, embeddings, &labels, rows).unwrap();
        Outcome {
            loss: f64::from(cpu.download(&out.loss).unwrap()[0]),
            dqueries: cpu.download(&out.dqueries).unwrap(),
            dpassages: cpu.download(&out.dpassages).unwrap(),
        }
    });
    let [whole, others @ ..] = blocks;
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
    for other in others {
        assert!((other.loss - whole.loss).abs() <= 1e-6 * whole.loss);
        if !batch.queries.is_empty() {
            assert!(relative_error(&other.dqueries, &wide(&whole.dqueries)) <= 2e-6);
            assert!(relative_error(&other.dpassages, &wide(&whole.dpassages)) <= 2e-6);
        }
    }
    whole
}

/// Every term alone and several together, with a name.
fn combinations() -> Vec<(&'static str, ObjectiveOptions)> {
    let plain = ObjectiveOptions::default();
    let equal = FalseNegatives { mask_equal: true, margin: None };
    let margin = FalseNegatives { mask_equal: false, margin: Some(0.1) };
    let both = FalseNegatives { mask_equal: true, margin: Some(-0.05) };
    let matryoshka: Vec<MatryoshkaPrefix> = [(3, 0.7), (8, 1.0), (DIMENSION, 1.5)]
        .map(|(dimension, weight)| MatryoshkaPrefix { dimension, weight })
        .to_vec();
    let distilled = |kind| Some(Distillation { kind, weight: 0.6, temperature: 1.5 });
    let (kl, mse) = (distilled(DistillationKind::Kl), distilled(DistillationKind::MarginMse));
    let group =
        ObjectiveOptions { in_batch_negatives: false, false_negatives: both, ..plain.clone() };
    let all = ObjectiveOptions {
        false_negatives: both,
        symmetric: true,
        matryoshka: matryoshka.clone(),
        distillation: kl,
        ..plain.clone()
    };
    vec![
        ("own group", ObjectiveOptions { in_batch_negatives: false, ..plain.clone() }),
        ("own group, masked", group.clone()),
        ("equal", ObjectiveOptions { false_negatives: equal, ..plain.clone() }),
        ("margin", ObjectiveOptions { false_negatives: margin, ..plain.clone() }),
        ("symmetric", ObjectiveOptions { symmetric: true, ..plain.clone() }),
        (
            "symmetric, masked",
            ObjectiveOptions { symmetric: true, false_negatives: both, ..plain.clone() },
        ),
        ("matryoshka", ObjectiveOptions { matryoshka: matryoshka.clone(), ..plain.clone() }),
        ("divergence", ObjectiveOptions { distillation: kl, ..plain.clone() }),
        ("margins", ObjectiveOptions { distillation: mse, ..plain.clone() }),
        ("own group, all", ObjectiveOptions { matryoshka, distillation: mse, ..group }),
        ("all", all),
        ("plain", plain),
    ]
}

fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - w)).sum();
    (difference / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
}

#[test]
fn losses_are_their_formulas_and_gradients_their_finite_differences() {
    const STEP: f64 = 1e-6;
    let rows = RowsPerRank::one(ROWS, GROUP);
    let mut losses = Vec::new();
    for (name, options) in combinations() {
        for normalized in [true, false] {
            let (base, mut moved) = (batch(), batch());
            let got = evaluate(&base, &options, (normalized, false), &rows, Arc::new(Solo));
            let want = base.loss(&base, &options, normalized);
            assert!((got.loss - want).abs() <= 2e-5 * want, "{name}: {} not {want}", got.loss);
            losses.push(got.loss);
            let mut by_differences = |side: fn(&mut Batch) -> &mut Vec<Vec<f64>>| -> Vec<f64> {
                let mut gradient = Vec::new();
                for row in 0..side(&mut moved).len() {
                    for column in 0..DIMENSION {
                        let x = side(&mut moved)[row][column];
                        side(&mut moved)[row][column] = x + STEP;
                        let above = moved.loss(&base, &options, normalized);
                        side(&mut moved)[row][column] = x - STEP;
                        let below = moved.loss(&base, &options, normalized);
                        side(&mut moved)[row][column] = x;
                        gradient.push((above - below) / (2.0 * STEP));
                    }
                }
                gradient
            };
            let error = relative_error(&got.dqueries, &by_differences(|b| &mut b.queries));
            assert!(error <= 2e-5, "{name}, queries: {error:e}");
            let error = relative_error(&got.dpassages, &by_differences(|b| &mut b.passages));
            assert!(error <= 2e-5, "{name}, passages: {error:e}");
        }
    }
    // Every option makes a difference on this batch.
    let normalized: Vec<f64> = losses.iter().step_by(2).copied().collect();
    for (at, loss) in normalized.iter().enumerate() {
        let other = normalized[..at].iter().find(|other| (*other - loss).abs() < 1e-6);
        assert!(other.is_none(), "{normalized:?}");
    }
}

#[test]
fn several_processes_compute_what_one_does() {
    let whole = batch();
    for (name, options) in combinations() {
        // Without in-batch negatives no row depends on another one.
        let cross_device = options.in_batch_negatives;
        let one = RowsPerRank::one(ROWS, GROUP);
        let want = evaluate(&whole, &options, (true, false), &one, Arc::new(Solo));
        let rows = RowsPerRank { queries: vec![4, 0, 2], group_size: GROUP };
        let ranks = ThreadGroup::ranks(3, &Cpu::new(), Duration::from_secs(60));
        let (rows, options, whole) = (&rows, &options, &whole);
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let run = |rank| {
                let number = Collective::<Cpu>::rank(&rank);
                let first = rows.before(number);
                let part = whole.part(first..first + rows.queries[number]);
                evaluate(&part, options, (true, cross_device), rows, Arc::new(rank))
            };
            let threads: Vec<_> =
                ranks.into_iter().map(|rank| scope.spawn(move || run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let loss: f64 =
            outcomes.iter().enumerate().map(|(rank, out)| rows.share(rank) * out.loss).sum();
        assert!((loss - want.loss).abs() <= 1e-5 * want.loss, "{name}: {loss}, {}", want.loss);
        let joined = |of: fn(&Outcome) -> &Vec<f32>| -> Vec<f32> {
            outcomes.iter().flat_map(|out| of(out).clone()).collect()
        };
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let error = relative_error(&joined(|out| &out.dqueries), &wide(&want.dqueries));
        assert!(error <= 1e-5, "{name}, queries: {error:e}");
        let error = relative_error(&joined(|out| &out.dpassages), &wide(&want.dpassages));
        assert!(error <= 1e-5, "{name}, passages: {error:e}");
    }
}

#[test]
fn labels_that_are_missing_are_an_error() {
    let cpu = Cpu::new();
    for (name, options) in
        combinations().into_iter().filter(|(name, _)| ["equal", "margins"].contains(name))
    {
        let objective = Contrastive {
            info_nce: InfoNce { temperature: 1.0 },
            options,
            normalized: true,
            negatives_cross_device: false,
            collective: Arc::new(Solo),
            block_scores: 1,
        };
        let [queries, passages] = [1, 2].map(|n| cpu.upload(&vec![0.5; n * 4], n, 4).unwrap());
        let labels = Labels { positives: &[0], text_keys: None, teacher_scores: None };
        let rows = RowsPerRank::one(1, 2);
        let embeddings = Embeddings { queries, passages };
        let result = objective.loss_and_gradient(&cpu, embeddings, &labels, &rows);
        assert!(result.is_err_and(|e| e.to_string().contains("has no")), "{name}");
    }
}
