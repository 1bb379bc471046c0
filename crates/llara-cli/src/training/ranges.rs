//! Checks that the numbers in the options of a training run are in range, before files are read.

use std::fmt::Display;

use llara::{Error, ErrorKind, Result};

use super::optimizer_args::OptimizerArgs;
use super::output_args::OutputArgs;
use super::training_args::{ChunkTokens, TrainingArgs};

/// Fails unless `fits`.
///
/// # Errors
/// [`ErrorKind::Argument`] with `what`, the `expected` values, and the option with its value.
pub(crate) fn require(
    fits: bool,
    (option, value): (&str, impl Display),
    what: &str,
    expected: &str,
) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Argument, what).expected(expected).got(format!("{option} {value}")))
}

/// Checks the numbers of the options of the training loop.
///
/// # Errors
/// The first number that is out of range.
pub(crate) fn check_loop(
    training: &TrainingArgs,
    optimizer: &OptimizerArgs,
    output: &OutputArgs,
) -> Result<()> {
    require(
        training.max_steps > 0 || training.max_steps == -1,
        ("--max-steps", training.max_steps),
        "the number of steps is out of range",
        "a positive number of steps, or −1 to use --num-train-epochs",
    )?;
    let epochs = training.num_train_epochs;
    require(
        training.max_steps > 0 || epochs.is_finite() && epochs > 0.0,
        ("--num-train-epochs", epochs),
        "the number of epochs is out of range",
        "a positive number",
    )?;
    require(
        training.per_device_train_batch_size > 0,
        ("--per-device-train-batch-size", training.per_device_train_batch_size),
        "the batch size is 0",
        "at least 1",
    )?;
    require(
        training.chunk_tokens != ChunkTokens::Tokens(0),
        ("--chunk-tokens", 0),
        "the chunk size is 0",
        "1 or more, such as 4096, or auto",
    )?;
    require(
        output.logging_steps > 0,
        ("--logging-steps", 0),
        "the logging interval is 0",
        "1 or more",
    )?;
    check_optimizer(optimizer)
}

fn check_optimizer(optimizer: &OptimizerArgs) -> Result<()> {
    let share = |x: f64| (0.0..1.0).contains(&x);
    for (option, value, fits, name, expected) in [
        (
            "--learning-rate",
            optimizer.learning_rate,
            optimizer.learning_rate.is_finite() && optimizer.learning_rate > 0.0,
            "the learning rate",
            "a positive number, such as 5e-5",
        ),
        (
            "--warmup-ratio",
            optimizer.warmup_ratio,
            (0.0..=1.0).contains(&optimizer.warmup_ratio),
            "the warm-up ratio",
            "a fraction of the steps, from 0 to 1",
        ),
        (
            "--weight-decay",
            optimizer.weight_decay,
            optimizer.weight_decay.is_finite() && optimizer.weight_decay >= 0.0,
            "the weight decay",
            "0 or a positive number",
        ),
        (
            "--adam-beta1",
            optimizer.adam_beta1,
            share(optimizer.adam_beta1),
            "beta1",
            "at least 0 and below 1",
        ),
        (
            "--adam-beta2",
            optimizer.adam_beta2,
            share(optimizer.adam_beta2),
            "beta2",
            "at least 0 and below 1",
        ),
        (
            "--adam-epsilon",
            optimizer.adam_epsilon,
            optimizer.adam_epsilon > 0.0 && share(optimizer.adam_epsilon),
            "epsilon",
            "above 0, below 1",
        ),
        (
            "--max-grad-norm",
            optimizer.max_grad_norm,
            is_valid_norm(optimizer.max_grad_norm),
            "the maximum gradient norm",
            "a positive number within the range of f32, or 0 for no clipping",
        ),
    ] {
        require(fits, (option, value), &format!("{name} is out of range"), expected)?;
    }
    Ok(())
}

/// Whether this is 0 or a positive f32. A positive number that is 0 in f32 would disable clipping.
fn is_valid_norm(norm: f64) -> bool {
    norm == 0.0 || ((norm as f32).is_finite() && norm as f32 > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zero_disables_clipping() {
        for (norm, fits) in [(0.0, true), (1.0, true), (1e-30, true), (1e-60, false)] {
            assert_eq!(is_valid_norm(norm), fits, "{norm}");
        }
        assert!([-1.0, 1e60, f64::NAN, f64::INFINITY].iter().all(|&norm| !is_valid_norm(norm)));
    }
}
