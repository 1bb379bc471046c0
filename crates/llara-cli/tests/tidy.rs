//! Rules for the source code that the compiler does not check: dependencies between modules and files, where
//! `unsafe`, printing and some crates may be used, names and lengths of files.

#![allow(clippy::unwrap_used, reason = "a test fails at the line of the panic")]

#[path = "tidy/imports.rs"]
mod imports;

use std::fs;
use std::path::{Path, PathBuf};

use imports::{ImportGraph, without_tests};

/// The modules that each module may use, besides itself and [`EVERYWHERE`].
const DEPENDENCIES: [(&str, &[&str]); 16] = [
    ("storage", &[]),
    ("text", &["storage"]),
    ("data", &["storage"]),
    ("backend", &[]),
    ("dist", &["backend"]),
    ("loss", &["backend", "dist"]),
    ("model", &["backend", "data", "storage"]),
    ("biencoder", &["backend", "data", "dist", "loss", "model", "storage", "text"]),
    (
        "train",
        &["backend", "biencoder", "data", "dist", "loss", "model", "retrieval", "storage", "text"],
    ),
    ("retrieval", &["backend", "biencoder", "data", "dist", "storage", "text"]),
    ("check", &["backend", "biencoder", "model", "storage", "text", "train"]),
    ("inspect", &["data", "storage", "text"]),
    ("hub", &["storage"]),
    ("fuzzing", &["biencoder", "data", "hub", "model", "retrieval", "storage", "text", "train"]),
    ("init", &["backend", "biencoder", "data", "model", "text"]),
    ("cli", &["llara"]),
];

/// Names that every module may use.
const EVERYWHERE: [&str; 4] = ["Error", "ErrorKind", "Result", "self"];

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
        let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push((path.clone(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut out = Vec::new();
    walk(&library(), &mut out);
    walk(&program(), &mut out);
    out
}

/// The sources of the program.
fn program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The sources of the library.
fn library() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../llara/src")
}

/// The module that a file belongs to: the first part of its path below `src` of the library, or
/// `cli` for a file of the program.
fn module(path: &Path) -> String {
    let Ok(below) = path.strip_prefix(library()) else { return "cli".to_owned() };
    let first = below.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// Lines of code without unit tests and comments, with their numbers.
fn lines(text: &str) -> Vec<(usize, String)> {
    let code = without_tests(text);
    let lines = code.lines().enumerate().map(|(n, line)| (n + 1, line.to_owned()));
    lines.filter(|(_, line)| !line.trim_start().starts_with("//")).collect()
}

/// First path segments after `crate::` on a line, braces opened: `crate::{a::X, b}` gives a and b.
fn named_modules(line: &str) -> Vec<String> {
    let mut modules = Vec::new();
    for rest in line.split("crate::").skip(1) {
        let word = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        match rest.strip_prefix('{') {
            Some(list) => {
                let mut depth = 0;
                let mut part = String::new();
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => modules.push(word(std::mem::take(&mut part).trim())),
                        _ if depth == 0 => part.push(c),
                        _ => {}
                    }
                }
                modules.push(word(part.trim()));
            }
            None => modules.push(word(rest)),
        }
    }
    modules.retain(|module: &String| !module.is_empty());
    modules
}

#[test]
fn dependencies_between_modules_have_one_direction() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let module = module(&path);
        let Some((_, allowed)) = DEPENDENCIES.iter().find(|(name, _)| *name == module) else {
            assert!(
                ["lib", "main", "error"].contains(&module.as_str()),
                "the module {module} has no entry in DEPENDENCIES"
            );
            continue;
        };
        for (number, line) in lines(&text) {
            for named in named_modules(&line) {
                // The program is one module here: its files may use each other.
                let fine = named == module
                    || module == "cli"
                    || allowed.contains(&named.as_str())
                    || EVERYWHERE.contains(&named.as_str());
                // Types that are re-exported by the crate belong to their modules.
                let home = match named.as_str() {
                    "BiEncoderModel" | "BiEncoderOptions" | "Recipe" | "Probes" | "Loader"
                    | "RunFacts" => "biencoder",
                    "Role" => "text",
                    other => other,
                };
                if !fine && home != module && !allowed.contains(&home) {
                    wrong.push(format!("{}:{number}: {module} uses {named}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn module_names_are_parsed() {
    assert_eq!(
        named_modules("use crate::{Error, text::{Role, Template}, data};"),
        ["Error", "text", "data"]
    );
    assert_eq!(
        named_modules("let x: crate::model::Decoder = crate::loss::f();"),
        ["model", "loss"]
    );
}

#[test]
fn some_features_are_used_only_in_their_modules() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let module = module(&path);
        let below = path.to_string_lossy().into_owned();
        for (number, line) in lines(&text) {
            let mut refuse = |what: &str, modules: &[&str]| {
                if line.contains(what) && !modules.contains(&module.as_str()) {
                    wrong.push(format!("{below}:{number}: `{what}` outside {modules:?}"));
                }
            };
            if !below.ends_with("dist/mpi/library.rs") {
                refuse("unsafe ", &["backend"]);
            }
            refuse("println!", &["cli"]);
            refuse("print!", &["cli"]);
            refuse("anyhow", &["cli"]);
            refuse("indicatif", &["cli"]);
            refuse("ureq", &["hub"]);
            refuse("clap", &["cli"]);
            if line.contains("std::fs")
                && module == "model"
                && !below.contains("model/weights/")
                && !below.ends_with("model/config.rs")
            {
                wrong
                    .push(format!("{below}:{number}: files are read and written in model/weights"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_have_a_description_a_specific_name_and_at_most_600_lines() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if ["util", "utils", "common", "base", "helper", "helpers", "misc"].contains(&name.as_str())
        {
            wrong.push(format!("{}: the name is not specific", path.display()));
        }
        if !text.starts_with("//! ") {
            wrong.push(format!("{}: the first line should be a description (//!)", path.display()));
        }
        if text.lines().count() > 600 {
            wrong.push(format!("{}: longer than 600 lines", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_between_files_have_no_cycle() {
    let (root, sources) = (library(), sources());
    let files = sources.iter().filter(|(path, _)| path.starts_with(&root));
    let graph = ImportGraph::new(&root, files.map(|(path, text)| (path.as_path(), text.as_str())));
    let described = graph.cycles().into_iter().map(|cycle| {
        let others: Vec<&String> =
            cycle.files.iter().filter(|file| !cycle.shortest.contains(file)).collect();
        format!("cycle: {}; other files: {others:?}", cycle.shortest.join(" → "))
    });
    let wrong: Vec<String> = described.collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
