//! Reference implementations of the operations: the formulas in f64, as plain loops.

mod attention;
mod matrix;

pub(super) use attention::{Packed, attention, attention_backward};
pub(super) use matrix::Matrix;

use matrix::{dot, log_of_sum_of_exp};

use crate::backend::{AdamWStep, DistillationLoss, DropoutKey};

/// `a · b`
pub(super) fn product(a: &Matrix, b: &Matrix) -> Matrix {
    assert_eq!(a.cols, b.rows);
    let columns = b.transposed();
    Matrix::from_fn(a.rows, b.cols, |i, j| dot(a.row(i), columns.row(j)))
}

/// `x · wᵀ (+ bias) (+ residual)`
pub(super) fn linear(
    x: &Matrix,
    w: &Matrix,
    bias: Option<&Matrix>,
    residual: Option<&Matrix>,
) -> Matrix {
    Matrix::from_fn(x.rows, w.rows, |i, j| {
        let bias = bias.map_or(0.0, |bias| bias.row(0)[j]);
        let residual = residual.map_or(0.0, |residual| residual.row(i)[j]);
        dot(x.row(i), w.row(j)) + bias + residual
    })
}

pub(super) fn sum_of_rows(x: &Matrix) -> Matrix {
    Matrix::from_fn(1, x.cols, |_, j| (0..x.rows).map(|i| x.row(i)[j]).sum())
}

pub(super) fn gather_rows(x: &Matrix, rows: &[u32]) -> Matrix {
    Matrix::from_fn(rows.len(), x.cols, |i, j| x.row(rows[i] as usize)[j])
}

pub(super) fn scatter_add_rows(dy: &Matrix, rows: &[u32], mut dx: Matrix) -> Matrix {
    for (i, &row) in rows.iter().enumerate() {
        dx.row_mut(row as usize).iter_mut().zip(dy.row(i)).for_each(|(dx, dy)| *dx += dy);
    }
    dx
}

pub(super) fn segment_mean(x: &Matrix, offsets: &[u32]) -> Matrix {
    Matrix::from_fn(offsets.len() - 1, x.cols, |s, j| {
        let segment = offsets[s] as usize..offsets[s + 1] as usize;
        segment.clone().map(|row| x.row(row)[j]).sum::<f64>() / segment.len() as f64
    })
}

/// y and `1 / rms`, over groups of `w.cols` columns.
pub(super) fn rms_norm(x: &Matrix, w: &Matrix, eps: f64) -> (Matrix, Matrix) {
    let group = w.cols;
    let inv_rms = Matrix::from_fn(x.rows, x.cols / group, |i, g| {
        let x = &x.row(i)[g * group..(g + 1) * group];
        1.0 / (dot(x, x) / group as f64 + eps).sqrt()
    });
    let y = Matrix::from_fn(x.rows, x.cols, |i, j| {
        x.row(i)[j] * inv_rms.row(i)[j / group] * w.row(0)[j % group]
    });
    (y, inv_rms)
}

/// `dx = inv_rms · (dy∘w − x̂ · mean(dy∘w∘x̂))` and `dw = Σ_rows dy∘x̂`, with `x̂ = x · inv_rms`.
pub(super) fn rms_norm_backward(dy: &Matrix, x: &Matrix, w: &Matrix, eps: f64) -> (Matrix, Matrix) {
    let group = w.cols;
    let (_, inv_rms) = rms_norm(x, w, eps);
    let mut dx = Matrix::zeros(x.rows, x.cols);
    let mut dw = Matrix::zeros(1, group);
    for i in 0..x.rows {
        for g in 0..x.cols / group {
            let columns = g * group..(g + 1) * group;
            let inv_rms = inv_rms.row(i)[g];
            let unit: Vec<f64> = x.row(i)[columns.clone()].iter().map(|x| x * inv_rms).collect();
            let dy = &dy.row(i)[columns.clone()];
            let weighted: Vec<f64> = dy.iter().zip(w.row(0)).map(|(dy, w)| dy * w).collect();
            let mean = dot(&weighted, &unit) / group as f64;
            for j in 0..group {
                dx.row_mut(i)[columns.start + j] = inv_rms * (weighted[j] - unit[j] * mean);
                dw.row_mut(0)[j] += dy[j] * unit[j];
            }
        }
    }
    (dx, dw)
}

/// y and the reciprocal norm.
pub(super) fn normalize(x: &Matrix) -> (Matrix, Matrix) {
    let inv_norm =
        Matrix::from_fn(x.rows, 1, |i, _| 1.0 / dot(x.row(i), x.row(i)).sqrt().max(1e-12));
    let y = Matrix::from_fn(x.rows, x.cols, |i, j| x.row(i)[j] * inv_norm.row(i)[0]);
    (y, inv_norm)
}

/// `dx = (dy − y · (y·dy)) · inv_norm`
pub(super) fn normalize_backward(dy: &Matrix, x: &Matrix) -> Matrix {
    let (y, inv_norm) = normalize(x);
    let along: Vec<f64> = (0..x.rows).map(|i| dot(y.row(i), dy.row(i))).collect();
    Matrix::from_fn(x.rows, x.cols, |i, j| {
        (dy.row(i)[j] - y.row(i)[j] * along[i]) * inv_norm.row(i)[0]
    })
}

/// Features `i < hd/2` and `i + hd/2` of a head, as the real and imaginary part of a complex number, multiplied
/// by `cos + i·sin` of the angle.
pub(super) fn rope(x: &Matrix, positions: &[u32], cos: &Matrix, sin: &Matrix) -> Matrix {
    let half = cos.cols;
    Matrix::from_fn(x.rows, x.cols, |i, j| {
        let angle = j % half;
        let cos = cos.row(positions[i] as usize)[angle];
        let sin = sin.row(positions[i] as usize)[angle];
        if j % (2 * half) < half {
            x.row(i)[j] * cos - x.row(i)[j + half] * sin
        } else {
            x.row(i)[j] * cos + x.row(i)[j - half] * sin
        }
    })
}

/// `gate / (1 + e^-gate) ∘ up`
pub(super) fn swiglu(gate: &Matrix, up: &Matrix) -> Matrix {
    Matrix::from_fn(gate.rows, gate.cols, |i, j| {
        let gate = gate.row(i)[j];
        gate / (1.0 + (-gate).exp()) * up.row(i)[j]
    })
}

/// Gradients with respect to gate and up: `dy ∘ up ∘ σ ∘ (1 + gate ∘ (1 − σ))` and `dy ∘ gate ∘ σ`.
pub(super) fn swiglu_backward(dy: &Matrix, gate: &Matrix, up: &Matrix) -> (Matrix, Matrix) {
    let sigmoid = gate.clone().map(|gate| 1.0 / (1.0 + (-gate).exp()));
    let dgate = Matrix::from_fn(gate.rows, gate.cols, |i, j| {
        let (gate, sigmoid) = (gate.row(i)[j], sigmoid.row(i)[j]);
        dy.row(i)[j] * up.row(i)[j] * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    });
    let dup = Matrix::from_fn(gate.rows, gate.cols, |i, j| {
        dy.row(i)[j] * gate.row(i)[j] * sigmoid.row(i)[j]
    });
    (dgate, dup)
}

/// The mean loss.
pub(super) fn cross_entropy(scores: &Matrix, targets: &[u32]) -> f64 {
    let losses = targets.iter().enumerate().map(|(i, &target)| {
        let scores = scores.row(i);
        log_of_sum_of_exp(scores) - scores[target as usize]
    });
    losses.sum::<f64>() / scores.rows as f64
}

/// The mean over bags of `rows` rows of the loss of their sets of columns.
pub(super) fn set_cross_entropy(logits: &Matrix, rows: usize, sets: &[Vec<u32>]) -> f64 {
    let of_bag = |(bag, set): (usize, &Vec<u32>)| {
        let of_column = |v: usize| {
            let column = (bag * rows..(bag + 1) * rows).map(|row| logits.row(row)[v]);
            column.fold(f64::NEG_INFINITY, f64::max)
        };
        let maxima: Vec<f64> = (0..logits.cols).map(of_column).collect();
        let of_set: f64 = set.iter().map(|&v| maxima[v as usize]).sum();
        log_of_sum_of_exp(&maxima) - of_set / set.len() as f64
    };
    sets.iter().enumerate().map(of_bag).sum::<f64>() / sets.len() as f64
}

/// Its gradient, in the first row that has the maximum of a column.
pub(super) fn set_cross_entropy_grad(logits: &Matrix, rows: usize, sets: &[Vec<u32>]) -> Matrix {
    let mut grad = Matrix::zeros(logits.rows, logits.cols);
    for (bag, set) in sets.iter().enumerate() {
        let place = |v: usize| {
            let mut place = bag * rows;
            for row in bag * rows..(bag + 1) * rows {
                if logits.row(row)[v] > logits.row(place)[v] {
                    place = row;
                }
            }
            place
        };
        let places: Vec<usize> = (0..logits.cols).map(place).collect();
        let maxima: Vec<f64> = places.iter().enumerate().map(|(v, &p)| logits.row(p)[v]).collect();
        let lse = log_of_sum_of_exp(&maxima);
        for (v, &place) in places.iter().enumerate() {
            let in_set = if set.contains(&(v as u32)) { 1.0 / set.len() as f64 } else { 0.0 };
            grad.row_mut(place)[v] = ((maxima[v] - lse).exp() - in_set) / sets.len() as f64;
        }
    }
    grad
}

/// The mean over rows of the loss of a group, the columns from `firsts[i]` on.
pub(super) fn distillation(
    scores: &Matrix,
    firsts: &[u32],
    teacher: &Matrix,
    loss: DistillationLoss,
) -> f64 {
    let of_row = |i: usize| {
        let (s, t) = (&scores.row(i)[firsts[i] as usize..][..teacher.cols], teacher.row(i));
        let (s_lse, t_lse) = (log_of_sum_of_exp(s), log_of_sum_of_exp(t));
        let of_passage = |g: usize| match loss {
            DistillationLoss::KlDivergence => {
                (t[g] - t_lse).exp() * ((t[g] - t_lse) - (s[g] - s_lse))
            }
            DistillationLoss::MarginMse { scale } => {
                let error = f64::from(scale) * (s[0] - s[g]) - (t[0] - t[g]);
                error * error / (s.len() - 1).max(1) as f64
            }
        };
        (0..s.len()).map(of_passage).sum::<f64>()
    };
    (0..scores.rows).map(of_row).sum::<f64>() / scores.rows as f64
}

/// `(softmax − one-hot) / rows`
pub(super) fn cross_entropy_grad(scores: &Matrix, targets: &[u32]) -> Matrix {
    let lse: Vec<f64> = (0..scores.rows).map(|i| log_of_sum_of_exp(scores.row(i))).collect();
    Matrix::from_fn(scores.rows, scores.cols, |i, j| {
        let p = (scores.row(i)[j] - lse[i]).exp();
        let one_hot = if targets[i] as usize == j { 1.0 } else { 0.0 };
        (p - one_hot) / scores.rows as f64
    })
}

/// A parameter with its AdamW moments.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AdamW {
    pub(super) param: Matrix,
    pub(super) first: Matrix,
    pub(super) second: Matrix,
}

impl AdamW {
    pub(super) fn new(param: Matrix) -> Self {
        let zeros = Matrix::zeros(param.rows, param.cols);
        AdamW { param, first: zeros.clone(), second: zeros }
    }

    /// Algorithm 2 of Loshchilov and Hutter 2019, with the decay scaled by the learning rate.
    pub(super) fn update(&mut self, grad: &Matrix, factor: f64, step: &AdamWStep) {
        let count = step.step as i32;
        for at in 0..grad.data.len() {
            let g = grad.data[at] * factor;
            let (m, v) = (&mut self.first.data[at], &mut self.second.data[at]);
            *m = step.beta1 * *m + (1.0 - step.beta1) * g;
            *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
            let unbiased_m = *m / (1.0 - step.beta1.powi(count));
            let unbiased_v = *v / (1.0 - step.beta2.powi(count));
            let param = &mut self.param.data[at];
            *param -= step.learning_rate
                * (unbiased_m / (unbiased_v.sqrt() + step.epsilon) + step.weight_decay * *param);
        }
    }
}

/// Philox4x32-10 (Salmon et al. 2011), one counter at a time, for a token: its sequence and position.
pub(super) fn philox(key: &DropoutKey, block: u32, (sequence, position): (u32, u32)) -> [u32; 4] {
    let mut counter = [key.module << 16 | block, sequence, position, key.step as u32];
    let mut round_key = [key.seed as u32, (key.seed >> 32) as u32];
    for _ in 0..10 {
        let [a, b, c, d] = counter;
        let first = 0xD251_1F53_u64 * u64::from(a);
        let second = 0xCD9E_8D57_u64 * u64::from(c);
        let high = |product: u64| (product >> 32) as u32;
        counter = [
            high(second) ^ b ^ round_key[0],
            second as u32,
            high(first) ^ d ^ round_key[1],
            first as u32,
        ];
        round_key[0] = round_key[0].wrapping_add(0x9E37_79B9);
        round_key[1] = round_key[1].wrapping_add(0xBB67_AE85);
    }
    counter
}
