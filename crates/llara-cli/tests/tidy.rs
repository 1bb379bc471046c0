//! The house rules that a compiler does not check: arrows between modules, where `unsafe` and
//! printing may stand, what files may be called, how long they may grow.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::path::{Path, PathBuf};

/// What each room may name of the crate besides itself, `Error` and its kin.
const ARROWS: [(&str, &[&str]); 14] = [
    ("storage", &[]),
    ("text", &["storage"]),
    ("data", &["storage"]),
    ("backend", &[]),
    ("dist", &["backend"]),
    ("loss", &["backend", "dist"]),
    ("model", &["backend", "data", "storage"]),
    ("biencoder", &["backend", "data", "dist", "loss", "model", "storage", "text"]),
    ("train", &["backend", "biencoder", "data", "dist", "loss", "model", "storage", "text"]),
    ("retrieval", &["backend", "biencoder", "data", "storage", "text"]),
    ("hub", &["storage"]),
    ("fuzzing", &["biencoder", "data", "hub", "model", "retrieval", "storage", "text"]),
    ("init", &["backend", "biencoder", "data", "model", "text"]),
    ("cli", &["llara"]),
];

/// Names that belong to the crate as a whole.
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
fn room(path: &Path) -> String {
    let Ok(below) = path.strip_prefix(library()) else { return "cli".to_owned() };
    let first = below.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// The code without its tests: unit tests stand at the end of a file.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

/// Lines of code, comments left out, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let not_comment = |(_, line): &(usize, &str)| !line.trim_start().starts_with("//");
    code(text).lines().enumerate().map(|(n, line)| (n + 1, line)).filter(not_comment)
}

/// First path segments after `crate::` on a line, braces opened: `crate::{a::X, b}` gives a and b.
fn named_rooms(line: &str) -> Vec<String> {
    let mut rooms = Vec::new();
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
                        ',' if depth == 0 => rooms.push(word(std::mem::take(&mut part).trim())),
                        _ if depth == 0 => part.push(c),
                        _ => {}
                    }
                }
                rooms.push(word(part.trim()));
            }
            None => rooms.push(word(rest)),
        }
    }
    rooms.retain(|room: &String| !room.is_empty());
    rooms
}

#[test]
fn arrows_point_one_way() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room(&path);
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == room) else {
            assert!(["lib", "main", "error"].contains(&room.as_str()), "{room} is not on the plan");
            continue;
        };
        for (number, line) in lines(&text) {
            for named in named_rooms(line) {
                // The program is one module here; its files name each other freely.
                let fine = named == room
                    || room == "cli"
                    || allowed.contains(&named.as_str())
                    || EVERYWHERE.contains(&named.as_str());
                // Types re-exported at the top stand for their rooms.
                let home = match named.as_str() {
                    "BiEncoderModel" | "BiEncoderOptions" | "Recipe" | "Probes" | "Loader" => {
                        "biencoder"
                    }
                    "Role" => "text",
                    other => other,
                };
                if !fine && home != room && !allowed.contains(&home) {
                    wrong.push(format!("{}:{number}: {room} names {named}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_reader_of_imports_reads_them() {
    assert_eq!(
        named_rooms("use crate::{Error, text::{Role, Template}, data};"),
        ["Error", "text", "data"]
    );
    assert_eq!(named_rooms("let x: crate::model::Decoder = crate::loss::f();"), ["model", "loss"]);
}

#[test]
fn each_power_has_its_room() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room(&path);
        let below = path.to_string_lossy().into_owned();
        for (number, line) in lines(&text) {
            let mut refuse = |what: &str, rooms: &[&str]| {
                if line.contains(what) && !rooms.contains(&room.as_str()) {
                    wrong.push(format!("{below}:{number}: `{what}` outside {rooms:?}"));
                }
            };
            refuse("unsafe ", &["backend"]);
            refuse("println!", &["cli"]);
            refuse("print!", &["cli"]);
            refuse("anyhow", &["cli"]);
            refuse("indicatif", &["cli"]);
            refuse("ureq", &["hub"]);
            refuse("clap", &["cli"]);
            if line.contains("std::fs")
                && room == "model"
                && !below.contains("model/weights/")
                && !below.ends_with("model/config.rs")
            {
                wrong.push(format!("{below}:{number}: files belong to model/weights"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_say_what_they_are_for_and_hold_one_idea() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if ["util", "utils", "common", "base", "helper", "helpers", "misc"].contains(&name.as_str())
        {
            wrong.push(format!("{}: a name that explains nothing", path.display()));
        }
        if !text.starts_with("//! ") {
            wrong.push(format!("{}: the first line should say what it is for", path.display()));
        }
        if text.lines().count() > 600 {
            wrong.push(format!("{}: longer than 600 lines", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
