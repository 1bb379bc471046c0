//! A small model made by `llara init`, rows to train on, a test collection, and ways to run the program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

/// The program under test.
pub(crate) const LLARA: &str = env!("CARGO_BIN_EXE_llara");

/// The exit code and the output of a run of the program.
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// The JSON on standard output of a run that succeeded.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }

    /// Asserts that the run failed with a message that has all `parts`, and with no panic.
    #[track_caller]
    pub(crate) fn refused(&self, parts: &[&str]) {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        assert!(self.stderr.contains("error: "), "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in: {}", self.stderr);
        }
    }
}

/// The program with its kernels for bf16 fixed: those of a run that is not resumed are chosen by a measurement,
/// and on a busy machine two runs may choose differently.
pub(crate) fn with_fixed_kernels() -> Command {
    let mut command = Command::new(LLARA);
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if std::env::var_os("LLARA_CPU").is_none() && processor.contains("avx512_bf16") {
        command.env("LLARA_CPU", "avx512bf16");
    }
    command
}

/// Runs a prepared command.
pub(crate) fn outcome(command: &mut Command) -> Outcome {
    let output = command.output().expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs the program.
pub(crate) fn llara(args: &[&str]) -> Outcome {
    outcome(Command::new(LLARA).args(args))
}

/// A temporary folder with a copy of the base model, training rows and a test collection.
pub(crate) struct Bench {
    root: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let bench = Bench { root: TempDir::new().expect("a temporary folder") };
        bench.write("train.jsonl", rows(12));
        copy_folder(base_model(), &bench.at("base"));
        fs::create_dir_all(bench.at("beir/qrels")).unwrap();
        let lines = |range: std::ops::Range<usize>, line: fn(usize) -> String| -> String {
            range.map(line).collect()
        };
        bench.write(
            "beir/corpus.jsonl",
            lines(0..12, |i| {
                format!("{{\"_id\": \"d{i}\", \"title\": \"\", \"text\": \"{}\"}}\n", fact(i))
            }),
        );
        bench.write(
            "beir/queries.jsonl",
            lines(0..6, |i| format!("{{\"_id\": \"q{i}\", \"text\": \"{}\"}}\n", question(i))),
        );
        let judged = lines(0..6, |i| format!("q{i}\td{i}\t1\n"));
        bench.write("beir/qrels/test.tsv", format!("query-id\tcorpus-id\tscore\n{judged}"));
        bench
    }

    /// A path in the folder.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The same path as a string.
    pub(crate) fn path(&self, name: &str) -> String {
        self.at(name).to_str().expect("the path is UTF-8").to_owned()
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.at(name), contents).unwrap();
    }

    /// Names in a folder, sorted.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.at(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// A short training run of all weights from `base` to `out`. `rest` is appended and can override its
    /// options.
    pub(crate) fn finetune(&self, rest: &[&str]) -> Outcome {
        self.finetune_by(Command::new(LLARA), rest)
    }

    /// The same with a prepared command.
    pub(crate) fn finetune_by(&self, mut program: Command, rest: &[&str]) -> Outcome {
        let (model, data, out) = (self.path("base"), self.path("train.jsonl"), self.path("out"));
        let mut args = vec!["finetune", "--model", &model, "--train-data", &data];
        args.extend(["--output-dir", &out, "--max-steps", "3", "--sampling", "sequential"]);
        args.extend(["--train-group-size", "2", "--per-device-train-batch-size", "4"]);
        args.extend(["--query-max-len", "64", "--learning-rate", "1e-3", "--logging-steps", "1"]);
        args.extend(["--use-lora", "false"]);
        args.extend(rest);
        outcome(program.args(args))
    }
}

const ANIMALS: [&str; 6] = ["otter", "heron", "lynx", "badger", "toad", "marten"];
const PLACES: [&str; 4] = ["by the river", "in the old quarry", "under the bridge", "on the moor"];

fn fact(i: usize) -> String {
    format!("The {} sleeps {} in winter.", ANIMALS[i % 6], PLACES[i / 2 % 4])
}

fn question(i: usize) -> String {
    format!("Where does the {} sleep?", ANIMALS[i % 6])
}

/// Training rows, one positive and two negatives each.
pub(crate) fn rows(count: usize) -> String {
    let row = |i: usize| {
        let row = serde_json::json!({
            "query": question(i), "pos": [fact(i)], "neg": [fact(i + 1), fact(i + 2)],
        });
        format!("{row}\n")
    };
    (0..count).map(row).collect()
}

/// A tiny model, created once per test run, with a vocabulary of at most 400.
fn base_model() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli");
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("train.jsonl"), rows(12)).unwrap();
        let (data, model) = (root.join("train.jsonl"), root.join("base"));
        let mut command = Command::new(LLARA);
        command.args(["init", "--preset", "tiny", "--vocab-size", "400", "--train-data"]);
        let made = outcome(command.arg(data).arg("--output-dir").arg(&model)).json();
        assert!(made["vocab_size"].as_u64().unwrap() <= 400);
        model
    })
}

/// Copies a folder with those in it.
pub(crate) fn copy_folder_deep(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy_folder_deep(&path, &target),
            false => drop(fs::copy(&path, target).unwrap()),
        }
    }
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
