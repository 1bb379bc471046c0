//! What is in the folder: its kind, files that cannot be read, leftovers of interrupted saves.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::report::{Finding, Findings, FolderKind, Status};
use crate::biencoder::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PROBES_FILE, RECIPE_FILE};
use crate::storage::{INDEX_FILE, WEIGHTS_FILE, is_leftover, open_file, read_limited};

const CHECK: &str = "folder";
/// Largest JSON file that is parsed here, in bytes. `tokenizer.json` has its own check.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// What Git writes in the place of a large file that was not downloaded.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// What a folder contains, by the names of its files.
pub(super) struct Listing {
    pub(super) kind: FolderKind,
    pub(super) is_checkpoint: bool,
    names: Vec<String>,
}

impl Listing {
    /// Lists the folder, and opens every file that tools read.
    pub(super) fn new(findings: &mut Findings<'_>) -> Self {
        let dir = findings.dir;
        let names = match names(dir) {
            Ok(names) => names,
            Err(error) => {
                findings.fail(CHECK, &crate::Error::io("read the folder", dir, error));
                Vec::new()
            }
        };
        let has = |name: &str| names.iter().any(|n| n == name);
        let kind = match (has("config.json"), has(ADAPTER_CONFIG_FILE)) {
            (true, _) => FolderKind::Model,
            (false, true) => FolderKind::Adapter,
            (false, false) => FolderKind::Unknown,
        };
        let is_checkpoint = has("trainer_state.json") || has("manifest.json");
        let listing = Listing { kind, is_checkpoint, names };
        listing.check(findings);
        listing
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names.iter().any(|n| n == name)
    }

    fn check(&self, findings: &mut Findings<'_>) {
        let mut error = |status, file: &str, what: &str, hint: &str| {
            findings.push(Finding::new(status, CHECK, file, what.to_owned()).hint(hint));
        };
        if self.kind == FolderKind::Unknown {
            let what = "this is neither a model nor an adapter: there is no config.json and no adapter_config.json";
            error(Status::Error, ".", what, "check the path, and that the folder is complete");
        }
        for name in self.names.iter().filter(|name| is_leftover(name)) {
            let what = "files of a save that was interrupted or is in progress";
            let hint = "the next load or save of this folder by llara finishes or removes them";
            error(Status::Warning, name, what, hint);
        }
        if self.has("config.json") && self.has(ADAPTER_CONFIG_FILE) {
            let what = "a model and an adapter are in one folder; transformers attaches the adapter to the model";
            error(Status::Warning, ADAPTER_CONFIG_FILE, what, "keep them in separate folders");
        }
        if self.has(WEIGHTS_FILE) && self.has(INDEX_FILE) {
            let what = "there are sharded weights beside model.safetensors; they are not read";
            error(
                Status::Warning,
                INDEX_FILE,
                what,
                "remove the weights that are not this model's",
            );
        }
        if self.has(ADAPTER_WEIGHTS_FILE) && !self.has(ADAPTER_CONFIG_FILE) {
            let what = "adapter weights without an adapter_config.json";
            error(Status::Warning, ADAPTER_WEIGHTS_FILE, what, "remove them, or restore the file");
        }
        let unread = self
            .names
            .iter()
            .filter(|name| name.starts_with("pytorch_model") && name.ends_with(".bin"));
        for name in unread {
            let what = "weights in PyTorch's pickle format are not read, and can run code when they are loaded";
            error(
                Status::Warning,
                name,
                what,
                "remove the file if its weights are in safetensors files too",
            );
        }
        let mut readable = 0;
        for name in self.names.iter().filter(|name| is_read_by_tools(name)) {
            readable += usize::from(self.check_file(name, findings));
        }
        if readable > 0 && !findings.has_errors(&[CHECK]) {
            findings.ok(CHECK, ".", format!("{readable} files can be read"));
        }
    }

    /// Opens a file, and parses it if it is JSON. Returns whether it is as it should be.
    fn check_file(&self, name: &str, findings: &mut Findings<'_>) -> bool {
        let path = findings.dir.join(name);
        let mut start = Vec::new();
        let opened = open_file(&path)
            .and_then(|file| file.take(LFS_POINTER.len() as u64).read_to_end(&mut start));
        if let Err(e) = opened {
            findings.fail(CHECK, &crate::Error::io("read the file", &path, e));
            return false;
        }
        if start == LFS_POINTER {
            let what = "the file is a Git LFS pointer, not the file itself".to_owned();
            let finding = Finding::new(Status::Error, CHECK, name, what);
            findings.push(finding.hint("download it: git lfs pull, or hf download"));
            return false;
        }
        let parsed_elsewhere = ["config.json", "tokenizer.json", ADAPTER_CONFIG_FILE, INDEX_FILE];
        let own = [RECIPE_FILE, PROBES_FILE, "manifest.json", "trainer_state.json"];
        if !name.ends_with(".json") || parsed_elsewhere.contains(&name) || own.contains(&name) {
            return true;
        }
        let parsed = read_limited(&path, "read the file", MAX_JSON_BYTES).and_then(|text| {
            serde_json::from_slice::<Value>(&text).map_err(|e| {
                let error = crate::Error::new(crate::ErrorKind::Config, "the file is not JSON");
                error.file(&path).because(e).hint("restore it from the base model's folder")
            })
        });
        if let Err(error) = &parsed {
            findings.fail(CHECK, error);
        }
        parsed.is_ok()
    }
}

/// Whether transformers, PEFT, sentence-transformers or this program read a file of this name.
fn is_read_by_tools(name: &str) -> bool {
    const OTHERS: [&str; 4] = ["tokenizer.model", "merges.txt", "chat_template.jinja", "README.md"];
    let known = name.ends_with(".json") || name.ends_with(".safetensors") || OTHERS.contains(&name);
    known && !name.starts_with('.')
}

/// Names in a folder, sorted. Names that are not UTF-8 are left out: no tool reads such a file.
fn names(dir: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.extend(entry?.file_name().into_string().ok());
    }
    names.sort_unstable();
    Ok(names)
}
