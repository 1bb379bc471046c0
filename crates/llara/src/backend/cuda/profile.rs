//! Times of kernels, for profiling.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::driver::Context;
use crate::Result;

/// The environment variable that enables the measurement.
const VARIABLE: &str = "LLARA_CUDA_PROFILE";

/// Time of each kernel, if `LLARA_CUDA_PROFILE` is set: the host then waits for every kernel, so that a step
/// takes longer than without.
pub(super) struct Profile {
    times: Option<Mutex<BTreeMap<String, KernelTime>>>,
}

/// All launches of a kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelTime {
    /// Number of launches.
    pub launches: u64,
    /// Total time; includes some microseconds of waiting per launch.
    pub total: Duration,
}

impl Profile {
    pub(super) fn from_environment() -> Self {
        Profile { times: std::env::var_os(VARIABLE).map(|_| Mutex::default()) }
    }

    /// Runs a kernel, and measures it if the measurement is enabled.
    pub(super) fn measure<T>(
        &self,
        context: &Context,
        name: impl FnOnce() -> String,
        run: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(times) = &self.times else { return run() };
        context.synchronize()?;
        let start = Instant::now();
        let result = run()?;
        context.synchronize()?;
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        let time = times.entry(name()).or_default();
        time.launches += 1;
        time.total += start.elapsed();
        Ok(result)
    }

    /// Names and times since the last call, the longest time first.
    pub(super) fn take(&self) -> Vec<(String, KernelTime)> {
        let Some(times) = &self.times else { return Vec::new() };
        let times = std::mem::take(&mut *times.lock().unwrap_or_else(PoisonError::into_inner));
        let mut times: Vec<_> = times.into_iter().collect();
        times.sort_by_key(|(_, time)| std::cmp::Reverse(time.total));
        times
    }
}
