//! Options of `llara finetune` about the optimizer and the learning-rate schedule.

use clap::ValueEnum;
use llara::train::{AdamWConfig, Decay, Warmup};

use super::steps::whole_steps;

#[derive(clap::Args)]
#[command(next_help_heading = "Optimizer")]
pub(crate) struct OptimizerArgs {
    /// Learning rate after the warm-up
    #[arg(long, value_name = "X", default_value_t = 5e-5)]
    pub(crate) learning_rate: f64,
    /// Learning-rate schedule after the warm-up: linear (to 0), cosine (to 0), constant_with_warmup, or
    /// constant (without warm-up)
    #[arg(long, value_name = "NAME", value_enum, default_value_t = Scheduler::Linear)]
    #[arg(hide_possible_values = true)]
    lr_scheduler_type: Scheduler,
    /// Warm-up, in which the learning rate increases from 0, as a fraction of the steps
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) warmup_ratio: f64,
    /// Number of warm-up steps; if it is not 0, it is used instead of --warmup-ratio
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole_steps)]
    pub(crate) warmup_steps: u64,
    /// Decoupled weight decay of all parameters except norms and biases
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) weight_decay: f64,
    /// AdamW's beta1, the decay rate of the first moment
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    pub(crate) adam_beta1: f64,
    /// AdamW's beta2, the decay rate of the second moment
    #[arg(long, value_name = "X", default_value_t = 0.999)]
    pub(crate) adam_beta2: f64,
    /// AdamW's epsilon, added to the square root of the second moment
    #[arg(long, value_name = "X", default_value_t = 1e-8)]
    pub(crate) adam_epsilon: f64,
    /// Maximum global norm of the gradients; 0: no clipping
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) max_grad_norm: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scheduler {
    /// Warm-up, then a linear decrease to 0
    Linear,
    /// Warm-up, then a decrease to 0 along half a cosine
    Cosine,
    /// Constant, without warm-up
    Constant,
    /// Warm-up, then constant
    #[value(name = "constant_with_warmup", alias = "constant-with-warmup")]
    ConstantWithWarmup,
}

impl OptimizerArgs {
    /// The settings of AdamW.
    pub(crate) fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            epsilon: self.adam_epsilon,
            weight_decay: self.weight_decay,
            max_grad_norm: Some(self.max_grad_norm as f32).filter(|&norm| norm != 0.0),
        }
    }

    /// The shape of the learning-rate schedule after the warm-up.
    pub(crate) fn decay(&self) -> Decay {
        match self.lr_scheduler_type {
            Scheduler::Linear => Decay::Linear,
            Scheduler::Cosine => Decay::Cosine,
            Scheduler::Constant | Scheduler::ConstantWithWarmup => Decay::Constant,
        }
    }

    /// The warm-up of the learning rate.
    pub(crate) fn warmup(&self) -> Warmup {
        match (self.lr_scheduler_type, self.warmup_steps) {
            (Scheduler::Constant, _) => Warmup::Steps(0),
            (_, 0) => Warmup::Ratio(self.warmup_ratio),
            (_, steps) => Warmup::Steps(steps),
        }
    }

    /// Whether a warm-up is given with a schedule that has none.
    pub(crate) fn ignores_warmup(&self) -> bool {
        self.lr_scheduler_type == Scheduler::Constant
            && (self.warmup_steps > 0 || self.warmup_ratio > 0.0)
    }
}
