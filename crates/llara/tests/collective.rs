//! The operations of a process group: threads of one process, and processes over MPI, pass the same checks and get
//! the same bits.
//!
//! The tests over MPI start themselves again with `mpirun`. Without it they are skipped, unless `LLARA_MPI_TESTS` is
//! `required`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use llara::backend::{Backend, Cpu, Shape};
use llara::dist::{
    Bucket, Collective, FlatPart, Launch, MpiRank, MpiWorld, ThreadGroup, ThreadRank,
};
use llara::{Error, ErrorKind};

/// Where a process of a group writes what it found.
const FOLDER: &str = "LLARA_TEST_FOLDER";
/// What a process of a group does.
const TASK: &str = "LLARA_TEST_TASK";

fn part(tensor: &mut <Cpu as Backend>::Tensor) -> FlatPart<'_, Cpu> {
    FlatPart { tensor, elements: 1..101, start: 2 }
}

/// A number that depends on rank and position, and whose sums are rounded.
fn number(rank: usize, at: usize) -> f32 {
    ((rank * 31 + at * 17) % 101) as f32 / 7.0 - 6.5
}

/// Calls every operation and checks its result; returns the bits of all results as text.
fn operations(group: &dyn Collective<Cpu>) -> String {
    let backend = Cpu::new();
    let (rank, size) = (group.rank(), group.size());
    let mut bits = String::new();
    let mut add = |name: &str, values: &[f32]| {
        let words: Vec<_> = values.iter().map(|x| format!("{:08x}", x.to_bits())).collect();
        writeln!(bits, "{name} {}", words.join(" ")).unwrap();
    };
    let numbers =
        |rank: usize, count: usize| -> Vec<f32> { (0..count).map(|at| number(rank, at)).collect() };
    let summed = |at: usize| (0..size).fold(0.0f32, |sum, rank| sum + number(rank, at));

    // Rows, with a rank that has none, and more data than fits in one message with its header.
    for cols in [3, 700] {
        let counts: Vec<usize> = (0..size).map(|rank| [2, 0, 3, 1][rank % 4]).collect();
        let own = numbers(rank, counts[rank] * cols);
        let x = backend.upload(&own, counts[rank], cols).unwrap();
        let all = group.all_gather_rows(x, &counts).unwrap();
        let expected: Vec<f32> = (0..size).flat_map(|of| numbers(of, counts[of] * cols)).collect();
        assert_eq!(backend.download(&all).unwrap(), expected);
        add("gathered", &expected);

        let total: usize = counts.iter().sum();
        let x = backend.upload(&numbers(rank, total * cols), total, cols).unwrap();
        let mine = group.reduce_scatter_rows(x, &counts).unwrap();
        assert_eq!(mine.shape(), (counts[rank], cols));
        let first = counts[..rank].iter().sum::<usize>() * cols;
        let expected: Vec<f32> = (first..).take(counts[rank] * cols).map(summed).collect();
        let got = backend.download(&mine).unwrap();
        assert_eq!(got, expected);
        add("scattered", &got);
    }

    let mut x = backend.upload(&numbers(rank, 6), 2, 3).unwrap();
    group.all_reduce(&mut x).unwrap();
    let got = backend.download(&x).unwrap();
    assert_eq!(got, (0..6).map(summed).collect::<Vec<f32>>());
    add("reduced", &got);
    let root = size - 1;
    group.broadcast(&mut x, root).unwrap();
    let mut x = backend.upload(&numbers(rank, 600), 600, 1).unwrap();
    group.broadcast(&mut x, root).unwrap();
    assert_eq!(backend.download(&x).unwrap(), numbers(root, 600));

    let mut totals = [0.1 * rank as f64, 1.0];
    group.all_reduce_scalars(&mut totals).unwrap();
    assert_eq!(totals[1], size as f64);
    let expected = (0..size).map(|rank| 0.1 * rank as f64).sum::<f64>();
    assert_eq!(totals[0].to_bits(), expected.to_bits());
    let lists = group.all_gather_words(&vec![u64::MAX - rank as u64; rank]).unwrap();
    let list = |rank: usize| vec![u64::MAX - rank as u64; rank];
    assert_eq!(lists, (0..size).map(list).collect::<Vec<_>>());

    gradients(group, &backend);
    group.agree(Ok(())).unwrap();
    let last = size - 1;
    let status = match rank == last {
        true => Err(Error::new(ErrorKind::Data, "a bad row")),
        false => Ok(()),
    };
    let error = group.agree(status).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Data);
    let text = error.to_string();
    let expected = format!("rank {last} failed");
    assert!(text.contains("a bad row") && text.contains(&expected) != (rank == last), "{text}");
    group.barrier().unwrap();
    bits
}

/// Two sums of gradients at a time, and the weights.
fn gradients(group: &dyn Collective<Cpu>, backend: &Cpu) {
    let (rank, size) = (group.rank(), group.size());
    // With several ranks, rank 0 owns 64 of these, rank 1 the others, and further ranks none.
    let bucket = Bucket { range: 2..102, ranks: size };
    let values: Vec<f32> = (0..101).map(|at| number(rank, at)).collect();
    let mut tensors = [(); 2].map(|()| backend.upload(&values, 1, 101).unwrap());
    let mut sums = Vec::new();
    for tensor in &mut tensors {
        let mut sum = group.gradient_sum(&bucket).unwrap();
        sum.add(part(tensor)).unwrap();
        sum.start().unwrap();
        sums.push(sum);
    }
    // Another operation may run in between.
    group.barrier().unwrap();
    let own = bucket.owned_by(rank);
    for (tensor, sum) in tensors.iter_mut().zip(sums) {
        sum.finish(&mut [part(tensor)]).unwrap();
        let got = backend.download(tensor).unwrap();
        assert_eq!(got[0], number(rank, 0));
        for flat in own.clone() {
            let at = flat - 1;
            let summed = (0..size).fold(0.0f32, |sum, rank| sum + number(rank, at));
            assert_eq!(got[at].to_bits(), summed.to_bits());
        }
        group.all_gather_weights(&bucket, &mut [part(tensor)]).unwrap();
        let got = backend.download(tensor).unwrap();
        for (at, got) in got.iter().enumerate().skip(1) {
            let summed = (0..size).fold(0.0f32, |sum, rank| sum + number(rank, at));
            assert_eq!(got.to_bits(), summed.to_bits());
        }
    }
}

/// Calls `f` on a thread of each rank.
fn in_threads<T: Send>(size: usize, f: impl Fn(ThreadRank<Cpu>) -> T + Sync) -> Vec<T> {
    let ranks = ThreadGroup::ranks(size, &Cpu::new(), Duration::from_secs(60));
    let f = &f;
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || f(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Runs `task` in processes that `mpirun` starts; `None` if there is no `mpirun` and it is not required.
fn in_processes(size: usize, task: &str, folder: &Path) -> Option<Output> {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &size.to_string()]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "a_process_of_a_group", "--ignored", "--nocapture"]);
    match command.env(FOLDER, folder).env(TASK, task).output() {
        Ok(output) => Some(output),
        Err(e) if std::env::var_os("LLARA_MPI_TESTS").is_none() => {
            println!("skipped: mpirun: {e}");
            None
        }
        Err(e) => panic!("mpirun: {e}"),
    }
}

/// One of the processes that the other tests start.
#[test]
#[ignore = "started by the other tests, through mpirun"]
fn a_process_of_a_group() {
    let launch = Launch::from_environment().unwrap().unwrap();
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let write = |text: &str| fs::write(folder.join(launch.rank.to_string()), text).unwrap();
    let task = std::env::var(TASK).unwrap();
    let timeout = Duration::from_secs(if task == "operations" { 60 } else { 5 });
    let world = MpiWorld::start(&launch, timeout).unwrap();
    let group = MpiRank::new(world.clone(), Cpu::new());
    let group: &dyn Collective<Cpu> = &group;
    // So that no process fails before the others have started.
    group.barrier().unwrap();
    match task.as_str() {
        "operations" => {
            let text = operations(group);
            // A step's tags are used again after many operations.
            for _ in 0..100 {
                group.barrier().unwrap();
            }
            assert!(world.bytes_sent() > 0 && !world.has_failed());
            write(&text);
            world.finish().unwrap();
        }
        "different" => {
            world.set_step(3);
            let result = match launch.rank {
                0 => group.barrier(),
                _ => group.agree(Ok(())),
            };
            write(&result.unwrap_err().to_string());
            // Later operations fail at once.
            assert!(group.barrier().is_err() && world.has_failed());
            world.abort("different", 3);
        }
        "late" => {
            world.set_step(7);
            match launch.rank {
                1 => std::thread::sleep(Duration::from_secs(60)),
                _ => {
                    let start = Instant::now();
                    let error = group.barrier().unwrap_err();
                    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
                    write(&error.to_string());
                }
            }
            world.abort("late", 3);
        }
        "failed" => {
            world.set_step(9);
            match launch.rank {
                1 => {
                    // The others may not have left the first barrier yet.
                    let is_ready = |rank: usize| folder.join(format!("ready-{rank}")).exists();
                    while !(is_ready(0) && is_ready(2)) {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    world.abort("the disk is full", 3);
                }
                rank => {
                    fs::write(folder.join(format!("ready-{rank}")), "").unwrap();
                    let error = group.barrier().unwrap_err();
                    write(&error.to_string());
                    world.abort("another rank has failed", 3);
                }
            }
        }
        other => panic!("{other}"),
    }
}

#[test]
fn threads_and_processes_get_the_same_bits() {
    for size in [1, 2, 3, 4] {
        let of_threads = in_threads(size, |rank| operations(&rank));
        if size == 1 {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let Some(output) = in_processes(size, "operations", dir.path()) else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for (rank, expected) in of_threads.iter().enumerate() {
            let got = fs::read_to_string(dir.path().join(rank.to_string())).unwrap();
            assert_eq!(&got, expected, "rank {rank} of {size}");
        }
    }
}

/// Runs a task in which processes fail; returns what each rank has written.
fn failing(size: usize, task: &str) -> Option<Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let output = in_processes(size, task, dir.path())?;
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert!(!output.status.success());
    let of_rank = |rank: usize| fs::read_to_string(dir.path().join(rank.to_string()));
    Some((0..size).map(|rank| of_rank(rank).unwrap_or_default()).collect())
}

#[test]
fn processes_that_call_different_operations_fail() {
    let Some(errors) = failing(2, "different") else { return };
    for error in &errors {
        assert!(error.contains("of step 3"), "{errors:?}");
    }
    // Each names its own operation and that of the other.
    let names_both = |error: &String| error.contains("barrier") && error.contains("agree");
    assert!(errors.iter().any(names_both), "{errors:?}");
}

#[test]
fn a_process_that_is_late_is_named_with_step_and_operation() {
    let Some(errors) = failing(3, "late") else { return };
    for rank in [0, 2] {
        let error = &errors[rank];
        assert!(error.contains(&format!("rank {rank}: barrier of step 7")), "{errors:?}");
        assert!(
            error.contains("none from rank 1") || error.contains("failed in step 7"),
            "{error}"
        );
    }
}

#[test]
fn a_process_that_fails_alone_tells_the_others_why() {
    let Some(errors) = failing(3, "failed") else { return };
    for rank in [0, 2] {
        let error = &errors[rank];
        assert!(error.contains(&format!("rank {rank}: barrier of step 9")), "{errors:?}");
        assert!(error.contains("rank 1 failed in step 9"), "{error}");
        assert!(error.contains("the disk is full"), "{error}");
    }
}

#[test]
fn a_thread_that_has_ended_or_is_late_is_named() {
    let backend = Cpu::new();
    let mut ranks = ThreadGroup::ranks(3, &backend, Duration::from_millis(50));
    let error = Collective::<Cpu>::barrier(&ranks[1]).unwrap_err().to_string();
    assert!(error.contains("barrier") && error.contains("rank 0, 2"), "{error}");
    drop(ranks.remove(2));
    let error = Collective::<Cpu>::barrier(&ranks[0]).unwrap_err().to_string();
    // Rank 1 has called the operation.
    assert!(error.contains("rank 2 has ended"), "{error}");
}

#[test]
fn threads_that_call_different_operations_are_refused() {
    let errors = in_threads(2, |rank| match Collective::<Cpu>::rank(&rank) {
        0 => Collective::<Cpu>::barrier(&rank).err(),
        _ => Collective::<Cpu>::agree(&rank, Ok(())).err(),
    });
    assert!(errors.iter().all(Option::is_some));
    let texts: Vec<_> = errors.into_iter().flatten().map(|e| e.to_string()).collect();
    assert!(texts.iter().any(|text| text.contains("different operations")), "{texts:?}");
}
