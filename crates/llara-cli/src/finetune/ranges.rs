//! Checks that the numbers in the options of `llara finetune` are in range, before files are read.

use llara::Result;

use super::args::Args;
use crate::trained_model::MAX_LEN;
use crate::training::{check_loop, require};

/// Checks all numbers.
///
/// # Errors
/// The first number that is out of range.
pub(super) fn check(args: &Args) -> Result<()> {
    let (data, training) = (&args.data, &args.common.training);
    let temperature = args.contrastive.temperature;
    require(
        data.train_group_size >= 1,
        ("--train-group-size", data.train_group_size),
        "the group size is too small",
        "at least 1: 1 positive and group size − 1 hard negatives",
    )?;
    require(
        data.train_group_size > 1 || training.per_device_train_batch_size != 1,
        ("--train-group-size 1 with --per-device-train-batch-size", 1),
        "there are no negatives",
        "2 or more passages per step: increase the batch size or the group size",
    )?;
    for (option, value) in
        [("--query-max-len", data.query_max_len), ("--passage-max-len", data.passage_max_len)]
    {
        let value = value.unwrap_or(1);
        require(
            value <= MAX_LEN,
            (option, value),
            "the maximum length is out of range",
            &format!("at most {MAX_LEN} tokens"),
        )?;
    }
    require(
        (training.per_device_train_batch_size as u128 * data.train_group_size as u128)
            < u128::from(u32::MAX),
        (
            "--per-device-train-batch-size",
            format!(
                "{} with --train-group-size {}",
                training.per_device_train_batch_size, data.train_group_size
            ),
        ),
        "batch size × group size is too large",
        "fewer than 4,294,967,295 passages per step",
    )?;
    require(
        temperature.is_finite() && temperature > 0.0,
        ("--temperature", temperature),
        "the temperature is out of range",
        "a positive number, such as 0.02",
    )?;
    check_loop(training, &args.common.optimizer, &args.common.output)
}
