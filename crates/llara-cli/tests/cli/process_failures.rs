//! Runs on several processes of which one is killed or hangs.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::fixture::{Bench, Outcome};
use crate::processes::{arguments, assert_equal_runs, bench, mpirun, train};

/// Starts a run, and returns it when its log has `lines` lines.
fn started(bench: &Bench, out: &str, lines: usize, rest: &[&str]) -> Option<Child> {
    let mut command = mpirun(3)?;
    command.args(arguments(bench, out, 3, rest)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let log = bench.at(out).join("log.jsonl");
    while fs::read_to_string(&log).unwrap_or_default().lines().count() < lines {
        assert!(Instant::now() < deadline, "the run does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    Some(child)
}

/// The process of a rank among the children of `mpirun`.
fn process_of_rank(mpirun: &Child, rank: usize) -> u32 {
    find_process_of_rank(mpirun, rank).unwrap()
}

fn find_process_of_rank(mpirun: &Child, rank: usize) -> Option<u32> {
    let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
    let parent = format!("PPid:\t{}", mpirun.id());
    let is_it = |pid: &u32| {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        status.lines().any(|line| line == parent)
            && read("environ").split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    };
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.into_iter().find(is_it)
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([name, &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits for a run to end, but no longer than `limit`; returns its exit code and messages.
fn ended(mut child: Child, limit: Duration) -> Outcome {
    let deadline = Instant::now() + limit;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= deadline {
            child.kill().unwrap();
            panic!("the run hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Outcome {
        code: output.status.code(),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    }
}

/// Saves after every second step, and resumes if there is a checkpoint.
const RESUMABLE: [&str; 6] =
    ["--save-steps", "2", "--save-total-limit", "2", "--resume-from-checkpoint", "latest"];

fn file(bench: &Bench, out: &str) -> Vec<u8> {
    fs::read(bench.at(out).join("model.safetensors")).unwrap()
}

/// Ends runs at several moments by `end`, which gets the process of rank 1, and resumes each.
fn resumed_after(end: &str, moments: &[usize], limit: Duration, part: &str) {
    let bench = bench();
    let Some(whole) = train(&bench, "whole", 3, &RESUMABLE) else { return };
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let rest = [&RESUMABLE[..], &["--collective-timeout", "8s"]].concat();
    for (number, &lines) in moments.iter().enumerate() {
        let out = format!("out-{number}");
        let Some(child) = started(&bench, &out, lines, &rest) else { return };
        signal(process_of_rank(&child, 1), end);
        let failed = ended(child, limit);
        assert_ne!(failed.code, Some(0), "{}", failed.stderr);
        assert!(failed.stderr.contains(part), "{}", failed.stderr);
        assert!(!bench.at(&out).join("model.safetensors").exists());
        let resumed = train(&bench, &out, 3, &RESUMABLE).unwrap();
        assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
        assert!(file(&bench, &out) == file(&bench, "whole"), "after {lines} lines");
    }
}

#[test]
fn a_killed_process_ends_the_run_which_resumes_to_the_same_bytes() {
    resumed_after("-KILL", &[1, 4, 9], Duration::from_secs(60), "received signal");
}

#[test]
fn a_stopped_process_ends_the_run_within_the_timeout() {
    resumed_after("-STOP", &[3, 8], Duration::from_secs(60), "did not complete");
}

#[test]
fn a_run_is_stopped_by_a_signal_and_resumed_with_another_number_of_processes() {
    let bench = bench();
    let Some(whole) = train(&bench, "whole", 3, &RESUMABLE) else { return };
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let Some(child) = started(&bench, "out", 3, &RESUMABLE) else { return };
    // mpirun passes it on to every process.
    signal(child.id(), "-USR1");
    let stopped = ended(child, Duration::from_secs(60));
    assert_eq!(stopped.code, Some(138), "{}", stopped.stderr);
    assert!(stopped.stderr.contains("stopped after step"), "{}", stopped.stderr);
    let resumed = train(&bench, "out", 2, &RESUMABLE).unwrap();
    assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
    assert!(resumed.stderr.contains("processes: 3 in the checkpoint, 2 now"), "{}", resumed.stderr);
    assert_equal_runs(&bench, ("whole", "out"), "model.safetensors");
}

/// Random numbers (xorshift), so that every run of the tests tries other moments.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end.max(1)
    }
}

/// `LLARA_MPI_KILLS` is the number of moments, 4 by default.
#[test]
fn a_process_that_ends_or_hangs_at_any_moment_loses_nothing() {
    let bench = bench();
    let start = Instant::now();
    let Some(whole) = train(&bench, "whole", 3, &RESUMABLE) else { return };
    let length = start.elapsed().as_millis() as u64;
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let moments = std::env::var("LLARA_MPI_KILLS").map_or(4, |number| number.parse().unwrap());
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}, {moments} moments");
    let mut random = Random(seed);
    let rest = [&RESUMABLE[..], &["--collective-timeout", "8s"]].concat();
    for number in 0..moments {
        let out = format!("out-{number}");
        let Some(mut command) = mpirun(3) else { return };
        command.args(arguments(&bench, &out, 3, &rest));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (delay, rank) = (random.below(length), random.below(3) as usize);
        let end = if number % 2 == 0 { "-KILL" } else { "-STOP" };
        std::thread::sleep(Duration::from_millis(delay));
        let what = format!("seed {seed}, moment {number}: rank {rank}, {end}, {delay} ms");
        println!("{what}");
        // It may not have been started yet, or have ended.
        if let Some(pid) = find_process_of_rank(&child, rank) {
            let _ = Command::new("kill").args([end, &pid.to_string()]).status();
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() >= deadline {
                child.kill().unwrap();
                panic!("{what}: the run hangs");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let resumed = train(&bench, &out, 3, &rest).unwrap();
        assert_eq!(resumed.code, Some(0), "{what}: {}", resumed.stderr);
        assert!(file(&bench, &out) == file(&bench, "whole"), "{what}");
        fs::remove_dir_all(bench.at(&out)).unwrap();
    }
}
