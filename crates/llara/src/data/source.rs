//! Where training rows come from: files and folders, and data set files, which give each of them a weight and
//! instructions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::storage::read_toml;
use crate::{Error, ErrorKind, Result};

/// What is prepended to texts, for models that are told which task a text belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instructions {
    /// Prepended to queries.
    #[serde(default)]
    pub query: String,
    /// Prepended to passages.
    #[serde(default)]
    pub passage: String,
}

impl Instructions {
    /// The longer one, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.query.len().max(self.passage.len())
    }
}

/// A file or folder of training rows, and what holds for all rows in it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DataSource {
    /// A file, or a folder of files whose names end in `.jsonl` or `.json`.
    pub path: PathBuf,
    /// Prepended to queries without a `prompt`; `None`: the run's instruction for queries.
    pub query_instruction: Option<String>,
    /// Prepended to passages; `None`: the run's instruction for passages.
    pub passage_instruction: Option<String>,
    /// The name under which the instructions are saved with the model. `None`: they are not saved.
    pub task: Option<String>,
    /// Share of the batches, if each batch has rows of one file. The files of a folder divide it in proportion to
    /// their rows.
    pub weight: Option<f64>,
}

impl From<PathBuf> for DataSource {
    fn from(path: PathBuf) -> Self {
        DataSource { path, ..DataSource::default() }
    }
}

/// The rows of a batch, in a data set file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchRows {
    /// Rows of all files together.
    Mixed,
    /// Rows of one file.
    PerFile,
}

/// All sources of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DataSources {
    /// The sources, in the order of their rows.
    pub sources: Vec<DataSource>,
    /// How rows are batched, if a data set file says so.
    pub batching: Option<BatchRows>,
    /// The instruction for queries of sources without one, if a data set file has it.
    pub query_instruction: Option<String>,
    /// The instruction for passages of sources without one, if a data set file has it.
    pub passage_instruction: Option<String>,
}

/// A data set file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DataSetFile {
    batching: Option<BatchRows>,
    query_instruction: Option<String>,
    passage_instruction: Option<String>,
    #[serde(default)]
    files: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    path: PathBuf,
    query_instruction: Option<String>,
    passage_instruction: Option<String>,
    task: Option<String>,
    weight: Option<f64>,
}

const EXPECTED: &str = "optional `batching` (\"mixed\" or \"per-file\"), `query_instruction` and \
    `passage_instruction`, and tables `[[files]]` with `path` and optionally `weight`, \
    `query_instruction`, `passage_instruction` and `task`";

impl DataSources {
    /// The sources that `paths` name: files, folders, and data set files, whose names end in `.toml`.
    ///
    /// A data set file lists files and folders; their paths are relative to its own folder:
    ///
    /// ```
    /// # use llara::data::{BatchRows, DataSources};
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("data.toml");
    /// # std::fs::write(&path, r#"
    /// batching = "per-file"
    ///
    /// [[files]]
    /// path = "nq.jsonl"
    /// weight = 2.0
    /// query_instruction = "Find the passage that answers the question: "
    ///
    /// [[files]]
    /// path = "quora"
    /// weight = 1.0
    /// query_instruction = "Find questions with the same meaning: "
    /// passage_instruction = "Question: "
    /// task = "duplicate-questions"
    /// # "#)?;
    /// let data = DataSources::read(&[path])?;
    /// assert_eq!(data.batching, Some(BatchRows::PerFile));
    /// assert_eq!(data.sources[0].task.as_deref(), Some("nq"));
    /// assert_eq!(data.sources[1].path, dir.path().join("quora"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// A data set file cannot be read, is not valid, or names no file; weights are missing for some sources or
    /// out of range; two sources have the same task and different instructions; or two data set files contradict
    /// each other.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut all = DataSources::default();
        for path in paths {
            if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml")) {
                all.add_data_set_file(path)?;
            } else {
                all.sources.push(path.clone().into());
            }
        }
        all.check_weights()?;
        all.tasks(&Instructions {
            query: all.query_instruction.clone().unwrap_or_default(),
            passage: all.passage_instruction.clone().unwrap_or_default(),
        })?;
        Ok(all)
    }

    fn add_data_set_file(&mut self, path: &Path) -> Result<()> {
        let file: DataSetFile = read_toml(path, "the data set file", EXPECTED)?;
        if file.files.is_empty() {
            return Err(Error::new(ErrorKind::Config, "the data set file names no files")
                .file(path)
                .expected("at least one table `[[files]]` with `path`"));
        }
        set_once(&mut self.batching, file.batching, "batching", path)?;
        set_once(&mut self.query_instruction, file.query_instruction, "query_instruction", path)?;
        set_once(
            &mut self.passage_instruction,
            file.passage_instruction,
            "passage_instruction",
            path,
        )?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for entry in file.files {
            self.sources.push(entry.source(folder).map_err(|e| e.file(path))?);
        }
        Ok(())
    }

    /// Either all sources have a weight or none, and weights are positive.
    fn check_weights(&self) -> Result<()> {
        let mut weights = self.sources.iter().map(|source| source.weight);
        if self.sources.iter().all(|source| source.weight.is_none()) {
            return Ok(());
        }
        let Some(at) = weights.position(|weight| !weight.is_some_and(is_share)) else {
            return Ok(());
        };
        let source = &self.sources[at];
        Err(Error::new(ErrorKind::Config, "the weight of a file is missing or out of range")
            .file(&source.path)
            .expected("a positive number as `weight` of every file, or no weights")
            .got(source.weight.map_or("no weight".to_owned(), |weight| weight.to_string()))
            .hint("list every file of the run in a data set file, with a `weight`"))
    }

    /// The instructions of each task; those that a source does not have are the run's, `of_run`.
    ///
    /// # Errors
    /// Two sources have the same task and different instructions, or a task has the name `TASK-passage` of another.
    pub fn tasks(&self, of_run: &Instructions) -> Result<BTreeMap<String, Instructions>> {
        let mut tasks = BTreeMap::new();
        for source in &self.sources {
            let Some(task) = &source.task else { continue };
            let own =
                |given: &Option<String>, of_run: &String| given.as_ref().unwrap_or(of_run).clone();
            let instructions = Instructions {
                query: own(&source.query_instruction, &of_run.query),
                passage: own(&source.passage_instruction, &of_run.passage),
            };
            let first = tasks.entry(task.clone()).or_insert_with(|| instructions.clone());
            if *first != instructions {
                return Err(Error::new(
                    ErrorKind::Config,
                    format!("two files with the task `{task}` have different instructions"),
                )
                .file(&source.path)
                .expected(format!("{first:?}"))
                .got(format!("{instructions:?}"))
                .hint("give one of them another `task`"));
            }
        }
        // Names of prompts in the files of sentence-transformers.
        let clash = tasks.keys().find(|task| tasks.contains_key(&passage_prompt_name(task)));
        match clash {
            None => Ok(tasks),
            Some(task) => Err(Error::new(
                ErrorKind::Config,
                format!("a task has the name of the passage prompt of the task `{task}`"),
            )
            .got(passage_prompt_name(task))
            .hint("give one of them another `task`")),
        }
    }

    /// The paths of all sources.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.sources.iter().map(|source| source.path.as_path())
    }
}

/// The name of a task's prompt for passages, in the files of sentence-transformers; that for queries has the name of
/// the task.
pub(crate) fn passage_prompt_name(task: &str) -> String {
    format!("{task}-passage")
}

impl Entry {
    fn source(self, folder: &Path) -> Result<DataSource> {
        let Entry { path, query_instruction, passage_instruction, task, weight } = self;
        if path.as_os_str().is_empty() {
            return Err(Error::new(ErrorKind::Config, "the `path` of a file is empty"));
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml")) {
            return Err(Error::new(
                ErrorKind::Config,
                "a data set file cannot contain another one",
            )
            .expected("files and folders of training rows")
            .got(path.display()));
        }
        let has_instructions = query_instruction.is_some() || passage_instruction.is_some();
        let task = task.or_else(|| has_instructions.then(|| default_task(&path)));
        if let Some(task) = task.as_ref().filter(|task| !is_task_name(task)) {
            return Err(Error::new(ErrorKind::Config, "this is not a task's name")
                .expected(format!(
                    "1 to 100 characters, no control characters, none of {}",
                    RESERVED.join(", ")
                ))
                .got(format!("{task:?}, for {}", path.display()))
                .hint("give the file another `task`; the default is its name"));
        }
        let path = folder.join(path);
        Ok(DataSource { path, query_instruction, passage_instruction, task, weight })
    }
}

/// The name of a file without the extension of training data, or of a folder.
fn default_task(path: &Path) -> String {
    let is_data = path.extension().is_some_and(|e| e == "jsonl" || e == "json");
    let name = if is_data { path.file_stem() } else { path.file_name() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

fn is_share(weight: f64) -> bool {
    weight.is_finite() && weight > 0.0
}

/// Names of prompts that sentence-transformers uses for queries and for passages by itself.
const RESERVED: [&str; 4] = ["query", "passage", "document", "corpus"];

fn is_task_name(task: &str) -> bool {
    let length = task.chars().count();
    (1..=100).contains(&length)
        && !task.chars().any(char::is_control)
        && !task.trim().is_empty()
        && !RESERVED.contains(&task)
}

/// Sets a value that only one data set file may have, or several the same.
fn set_once<T: PartialEq + std::fmt::Debug>(
    value: &mut Option<T>,
    new: Option<T>,
    key: &str,
    path: &Path,
) -> Result<()> {
    match (&*value, new) {
        (Some(first), Some(new)) if *first != new => {
            Err(Error::new(ErrorKind::Config, format!("two data set files differ in `{key}`"))
                .file(path)
                .expected(format!("{first:?}, as before"))
                .got(format!("{new:?}")))
        }
        (None, Some(new)) => {
            *value = Some(new);
            Ok(())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(texts: &[&str]) -> Result<DataSources> {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let path = dir.path().join(format!("{i}.toml"));
                std::fs::write(&path, text).unwrap();
                path
            })
            .collect();
        DataSources::read(&paths)
    }

    #[test]
    fn faults_are_named_with_their_file() {
        for (texts, part) in [
            (&["x"][..], "0.toml:1: the data set file is not valid"),
            (&["[[files]]\npath = \"a\"\nwieght = 1"], "0.toml:3: "),
            (&["[[files]]\nweight = 1.0"], "path"),
            (&["batching = \"mixed\""], "names no files"),
            (&["batching = \"perfile\"\n[[files]]\npath = \"a\""], "per-file"),
            (&["[[files]]\npath = \"\""], "is empty"),
            (&["[[files]]\npath = \"b.toml\""], "cannot contain another"),
            (
                &["[[files]]\npath = \".\"\nquery_instruction = \"\""],
                "give the file another `task`",
            ),
            (
                &[
                    "[[files]]\npath = \"a\"\ntask = \"x\"\n[[files]]\npath = \"b\"\ntask = \"x-passage\"",
                ],
                "passage prompt of the task `x`",
            ),
            (&["[[files]]\npath = \"a\"\ntask = \"\\n\""], "not a task's name"),
            (&["[[files]]\npath = \"a\"\ntask = \"document\""], "not a task's name"),
            (&["batching = \"per-file\"\n[[files]]\npath = \"a\"\nweight = -1.0"], "-1"),
            (&["batching = \"per-file\"\n[[files]]\npath = \"a\"\nweight = nan"], "NaN"),
            (
                &[
                    "batching = \"per-file\"\n[[files]]\npath = \"a\"\nweight = 1.0\n[[files]]\npath = \"b\"",
                ],
                "b: the weight of a file is missing",
            ),
            (
                &["[[files]]\npath = \"a/x\"\nquery_instruction = \"1\"\n\
                     [[files]]\npath = \"b/x\"\nquery_instruction = \"2\""],
                "the task `x`",
            ),
            (
                &[
                    "batching = \"mixed\"\n[[files]]\npath = \"a\"",
                    "batching = \"per-file\"\n[[files]]\npath = \"b\"",
                ],
                "1.toml: two data set files differ in `batching`",
            ),
        ] {
            let error = read(texts).unwrap_err().to_string();
            assert!(error.contains(part), "{texts:?}: {error}");
        }
    }

    #[test]
    fn a_task_has_the_runs_instruction_where_it_has_none() {
        let data = read(&["query_instruction = \"q: \"\n\
             [[files]]\npath = \"a.jsonl\"\npassage_instruction = \"p: \"\n\
             [[files]]\npath = \"b.jsonl\"\n\
             [[files]]\npath = \"c.jsonl\"\ntask = \"other\"\nquery_instruction = \"\"\n\
             [[files]]\npath = \"d-v1.0\"\nquery_instruction = \"q: \"\n\
             [[files]]\npath = \"d\"\ntask = \"d-v1.0\""])
        .unwrap();
        assert_eq!(data.query_instruction.as_deref(), Some("q: "));
        let of_run = Instructions { query: "q: ".into(), passage: String::new() };
        let tasks = data.tasks(&of_run).unwrap();
        let named = |query: &str, passage: &str| Instructions {
            query: query.into(),
            passage: passage.into(),
        };
        assert_eq!(
            tasks.into_iter().collect::<Vec<_>>(),
            [
                ("a".to_owned(), named("q: ", "p: ")),
                ("d-v1.0".to_owned(), named("q: ", "")),
                ("other".to_owned(), named("", "")),
            ]
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_text_is_read_or_refused(text: String) {
            drop(read(&[&text]));
        }
    }
}
