//! `--processes N --network SPEED` of both plans: memory and communication of one of several processes.

use llara::train::plan::MemoryBudget;
use llara::train::{FlatLayout, StepTraffic, bucket_elements};
use serde_json::{Value, json};

use crate::talk::bytes;
use crate::training::Forecast;

/// Bytes of an f32.
const F32: u64 = 4;

/// How many processes there are, and how fast they are connected.
#[derive(clap::Args)]
#[command(next_help_heading = "Several processes (mpirun, srun)")]
pub(super) struct NetworkArgs {
    /// Number of processes that the run is planned for [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    processes: Option<u32>,
    /// Speed at which a process sends, per second, such as 25GB/s; for the time of the communication of a step
    #[arg(long, value_name = "SPEED", value_parser = speed, requires = "processes")]
    network: Option<f64>,
    /// Time that a step of one process takes to compute, such as 0.8 seconds; for the share of communication
    #[arg(long, value_name = "SECONDS", value_parser = seconds, requires = "network")]
    step_seconds: Option<f64>,
}

fn speed(text: &str) -> Result<f64, String> {
    let wrong = || "expected a speed such as 25GB/s, 800MB/s or 12GiB/s".to_owned();
    let amount = text.trim().strip_suffix("/s").ok_or_else(wrong)?;
    match amount.parse() {
        Ok(MemoryBudget::Bytes(bytes)) => Ok(bytes as f64),
        _ => Err(wrong()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|s: &f64| s.is_finite() && *s > 0.0);
    seconds.ok_or_else(|| "expected a positive number of seconds".to_owned())
}

impl NetworkArgs {
    /// Number of processes.
    pub(super) fn processes(&self) -> usize {
        self.processes.unwrap_or(1) as usize
    }

    /// Memory and communication of the first of the processes; `None` without `--processes`. `traffic` says what a
    /// step exchanges with this division of the parameters.
    pub(super) fn plan(
        &self,
        forecast: &Forecast,
        traffic: impl FnOnce(FlatLayout) -> StepTraffic,
    ) -> Option<NetworkPlan> {
        let processes = self.processes? as usize;
        let training = &forecast.plan.training;
        let elements = (training.gradients / F32) as usize;
        let layout = FlatLayout::new([elements], processes, bucket_elements(processes));
        let sent = traffic(layout).bytes_sent(0);
        let seconds = self.network.map(|speed| sent as f64 / speed);
        let share =
            seconds.zip(self.step_seconds).map(|(sending, step)| sending / (sending + step));
        let (optimizer, communication) = (training.optimizer, training.communication);
        let peak = training.total();
        Some(NetworkPlan { processes, optimizer, communication, peak, sent, seconds, share })
    }
}

/// Memory and communication of the first of several processes.
pub(super) struct NetworkPlan {
    processes: usize,
    /// Moments of the parameters that the process owns.
    optimizer: u64,
    /// Gradients on their way, and passages of other processes with their gradients and scores.
    communication: u64,
    /// Peak memory of a step.
    peak: u64,
    /// Bytes sent in a step.
    sent: u64,
    /// Time of the communication of a step, if it overlapped with nothing.
    seconds: Option<f64>,
    /// Its share of a step.
    share: Option<f64>,
}

impl NetworkPlan {
    /// The plan in a few lines.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!(
                "processes {}: peak {} each while training, of it moments {}, communication {}",
                self.processes,
                bytes(self.peak),
                bytes(self.optimizer),
                bytes(self.communication)
            ),
            format!("network   {} sent per step by each process", bytes(self.sent)),
        ];
        if let Some(seconds) = self.seconds {
            let share = self.share.map_or(String::new(), |share| {
                format!(", {:.0} % of a step if nothing overlaps", 100.0 * share)
            });
            lines.push(format!("          {seconds:.3} s per step{share}"));
        }
        lines
    }

    /// The plan as JSON.
    pub(super) fn json(&self) -> Value {
        json!({
            "processes": self.processes,
            "peak_bytes": self.peak,
            "optimizer_bytes": self.optimizer,
            "communication_bytes": self.communication,
            "bytes_sent_per_step": self.sent,
            "communication_seconds": self.seconds,
            "communication_share": self.share,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_amounts_per_second() {
        assert_eq!(speed("25GB/s"), Ok(25e9));
        assert_eq!(speed("1 GiB/s"), Ok(f64::from(1 << 30)));
        for text in ["25GB", "fast", "50%/s", "0/s", "-1GB/s"] {
            assert!(speed(text).is_err(), "{text}");
        }
        assert!(seconds("0").is_err() && seconds("nan").is_err() && seconds("0.5") == Ok(0.5));
    }
}
