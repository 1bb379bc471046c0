//! The graph of imports between source files, and its cycles.
//!
//! A file has an edge to the file that defines an item which it names: in a `use` declaration, or by a path
//! that starts with `crate`, `super` or `self`, or in a `mod.rs` with a child module. An item is looked up
//! like the compiler does it: re-exports are followed to the definition. Three kinds of lines give no edge:
//! unit tests and comments; `mod child;`; and re-exports (`pub use`, `pub(crate) use`, `pub(super) use`) of
//! names that the file itself does not use, because other files are linked to the definition. Nor does the
//! path of a visibility (`pub(in path)`). What cannot
//! be resolved further (macros, enum variants, glob imports) belongs to the last module of the path that is a
//! file.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

/// A source file by the path of its module: `["backend", "cpu"]` is `backend/cpu/mod.rs`.
pub(crate) type Module = Vec<String>;

/// A name that a `use` declaration brings into scope, and its path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Import {
    name: String,
    path: Vec<String>,
}

#[derive(Debug, Default)]
struct Source {
    file: PathBuf,
    definitions: BTreeSet<String>,
    /// All `use` declarations, re-exports too: they are followed when an item is looked up.
    imports: Vec<Import>,
    /// Paths that give edges.
    uses: BTreeSet<Vec<String>>,
}

/// Files that import each other.
#[derive(Debug)]
pub(crate) struct Cycle {
    /// All files of the group, sorted.
    pub(crate) files: BTreeSet<String>,
    /// A shortest cycle through one of them, which is at both ends.
    pub(crate) shortest: Vec<String>,
}

/// The imports between the files of one crate.
pub(crate) struct ImportGraph {
    sources: BTreeMap<Module, Source>,
}

impl ImportGraph {
    /// The graph of the files below `root`, given with their texts.
    pub(crate) fn new<'t>(
        root: &Path,
        files: impl IntoIterator<Item = (&'t Path, &'t str)>,
    ) -> Self {
        let mut sources = BTreeMap::new();
        for (file, text) in files {
            let below = file.strip_prefix(root).expect("a file below the root");
            let mut module: Module = below
                .with_extension("")
                .components()
                .map(|part| part.as_os_str().to_string_lossy().into_owned())
                .collect();
            let is_mod_file =
                module.last().is_some_and(|name| ["mod", "lib", "main"].contains(&&**name));
            if is_mod_file {
                module.pop();
            }
            sources.insert(module, parse(below.to_owned(), is_mod_file, text));
        }
        ImportGraph { sources }
    }

    /// The groups of files that import each other, directly or through others of the group.
    pub(crate) fn cycles(&self) -> Vec<Cycle> {
        let edges: BTreeMap<&Module, BTreeSet<&Module>> =
            self.sources.keys().map(|module| (module, self.edges(module))).collect();
        let name = |module: &Module| self.sources[module].file.display().to_string();
        let mut done: BTreeSet<&Module> = BTreeSet::new();
        let mut cycles = Vec::new();
        for start in self.sources.keys() {
            if done.contains(start) {
                continue;
            }
            if let Some(shortest) = shortest_cycle(start, &edges) {
                let reachable = reach(start, &edges);
                let is_in_cycle = |module: &&Module| reach(module, &edges).contains(start);
                let group: Vec<&Module> = reachable.into_iter().filter(is_in_cycle).collect();
                let files = group.iter().map(|module| name(module)).collect();
                done.extend(group);
                cycles.push(Cycle { files, shortest: shortest.into_iter().map(name).collect() });
            }
        }
        cycles
    }

    fn edges(&self, module: &Module) -> BTreeSet<&Module> {
        let source = &self.sources[module];
        let found = source.uses.iter().filter_map(|path| self.definition(module, path, 0));
        found.filter(|target| *target != module).collect()
    }

    /// The file that defines the item which `path` names in `module`; `None` for other crates.
    fn definition(&self, module: &Module, path: &[String], depth: usize) -> Option<&Module> {
        const MAX_REEXPORTS: usize = 16;
        let (mut at, mut rest) = self.start(module, path)?;
        // Modules first, then an item of the last one.
        while let Some(name) = rest.first() {
            let mut child = at.clone();
            child.push(name.clone());
            if !self.sources.contains_key(&child) {
                break;
            }
            at = child;
            rest = &rest[1..];
        }
        let (at, source) = self.sources.get_key_value(&at)?;
        let Some(name) = rest.first() else { return Some(at) };
        if source.definitions.contains(name) || depth > MAX_REEXPORTS {
            return Some(at);
        }
        let import = source.imports.iter().find(|import| import.name == *name);
        match import.filter(|import| import.path != path) {
            Some(import) => {
                let path = [&import.path[..], &rest[1..]].concat();
                self.definition(at, &path, depth + 1)
            }
            None => Some(at),
        }
    }

    /// The module in which a path starts, and the rest of the path.
    fn start<'p>(&self, module: &Module, path: &'p [String]) -> Option<(Module, &'p [String])> {
        let mut at = module.clone();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => at.clear(),
            "self" => {}
            "super" => {
                at.pop();
            }
            first => {
                let child = [&module[..], &[first.to_owned()]].concat();
                return self.sources.contains_key(&child).then_some((at, path));
            }
        }
        rest = &rest[1..];
        while rest.first().is_some_and(|part| part == "super") {
            at.pop();
            rest = &rest[1..];
        }
        Some((at, rest))
    }
}

fn reach<'m>(
    from: &'m Module,
    edges: &BTreeMap<&'m Module, BTreeSet<&'m Module>>,
) -> BTreeSet<&'m Module> {
    let (mut seen, mut queue) = (BTreeSet::new(), VecDeque::from([from]));
    while let Some(module) = queue.pop_front() {
        for &next in edges.get(module).into_iter().flatten() {
            if seen.insert(next) {
                queue.push_back(next);
            }
        }
    }
    seen
}

/// The shortest path from `start` back to it, with `start` at both ends.
fn shortest_cycle<'m>(
    start: &'m Module,
    edges: &BTreeMap<&'m Module, BTreeSet<&'m Module>>,
) -> Option<Vec<&'m Module>> {
    let mut before: BTreeMap<&Module, &'m Module> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(module) = queue.pop_front() {
        for &next in edges.get(module).into_iter().flatten() {
            if next == start {
                let mut cycle = vec![start, module];
                while let Some(&earlier) = before.get(cycle[cycle.len() - 1]) {
                    cycle.push(earlier);
                }
                cycle.reverse();
                return Some(cycle);
            }
            if !before.contains_key(next) {
                before.insert(next, module);
                queue.push_back(next);
            }
        }
    }
    None
}

/// Reads the definitions, imports and paths of a file.
fn parse(file: PathBuf, is_mod_file: bool, text: &str) -> Source {
    let mut source = Source { file, ..Source::default() };
    let (mut statement, mut reexports) = (String::new(), Vec::new());
    let mut words = BTreeSet::new();
    for line in without_tests(text).lines() {
        let line = without_visibility(line.split("//").next().unwrap_or_default().trim());
        let line = line.as_ref();
        if statement.is_empty() && !is_use(line) {
            if is_module(line) {
                continue;
            }
            source.definitions.extend(definition(line));
            for path in paths(line) {
                words.insert(path[0].clone());
                let is_qualified = ["crate", "self", "super"].contains(&&*path[0]);
                if path.len() > 1 && (is_qualified || is_mod_file) {
                    source.uses.insert(path);
                }
            }
            continue;
        }
        statement.push_str(line);
        statement.push(' ');
        if line.ends_with(';') {
            let is_reexport = statement.starts_with("pub");
            let (_, tree) = statement.split_once("use ").unwrap_or_default();
            let mut imports = Vec::new();
            expand(tree.trim().trim_end_matches(';'), &[], &mut imports);
            if is_reexport {
                reexports.extend(imports.iter().cloned());
            } else {
                source.uses.extend(imports.iter().map(|import| import.path.clone()));
            }
            source.imports.extend(imports);
            statement.clear();
        }
    }
    let is_used = |import: &Import| words.contains(&import.name);
    source.uses.extend(reexports.into_iter().filter(is_used).map(|import| import.path));
    source
}

/// A line of code without the path of a `pub(in path)`, which says who may use an item and uses nothing.
fn without_visibility(line: &str) -> Cow<'_, str> {
    let parts = line.split_once("pub(in ").and_then(|(before, rest)| {
        let (_, after) = rest.split_once(')')?;
        Some(format!("{before}pub{after}"))
    });
    parts.map_or(Cow::Borrowed(line), Cow::Owned)
}

/// Whether a line declares a module that is another file.
fn is_module(line: &str) -> bool {
    let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
    words.next() == Some("mod") && line.ends_with(';')
}

/// Whether a line starts a `use` declaration.
fn is_use(line: &str) -> bool {
    let rest = match line.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => rest.split_once(')').map_or(rest, |(_, rest)| rest),
        Some(rest) => rest,
        None => line,
    };
    rest.trim_start().starts_with("use ")
}

/// Expands a use tree: `a::{b, c::d as e}` imports `b` from `a::b` and `e` from `a::c::d`.
fn expand(tree: &str, prefix: &[String], imports: &mut Vec<Import>) {
    let tree = tree.trim();
    if let Some((head, list)) = tree.split_once('{') {
        let mut prefix = prefix.to_vec();
        prefix.extend(head.split("::").map(str::trim).filter(|p| !p.is_empty()).map(str::to_owned));
        let list = list.rsplit_once('}').map_or(list, |(list, _)| list);
        let (mut depth, mut start) = (0, 0);
        for (i, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    expand(&list[start..i], &prefix, imports);
                    start = i + 1;
                }
                _ => {}
            }
        }
        expand(&list[start..], &prefix, imports);
        return;
    }
    let (path, alias) = match tree.split_once(" as ") {
        Some((path, alias)) => (path, Some(alias.trim().to_owned())),
        None => (tree, None),
    };
    let mut path: Vec<String> =
        prefix.iter().cloned().chain(path.split("::").map(|p| p.trim().to_owned())).collect();
    path.retain(|part| !part.is_empty());
    if path.len() > 1 && path.last().is_some_and(|last| last == "self" || last == "*") {
        path.pop();
    }
    if let Some(last) =
        path.last().cloned().filter(|_| path.len() > prefix.len() || !prefix.is_empty())
    {
        imports.push(Import { name: alias.unwrap_or(last), path });
    }
}

/// The name of an item that a line defines.
fn definition(line: &str) -> Option<String> {
    const KINDS: [&str; 9] =
        ["fn", "struct", "enum", "trait", "const", "static", "type", "union", "macro_rules!"];
    let words: Vec<&str> = line
        .split(|c: char| c.is_whitespace() || "(<:{=;".contains(c))
        .filter(|word| !word.is_empty())
        .collect();
    let at = words.iter().position(|word| KINDS.contains(word))?;
    // `const fn`, `unsafe fn`: the last keyword is followed by the name.
    let at = at + words[at..].iter().take_while(|word| KINDS.contains(word)).count();
    words.get(at).map(|name| (*name).to_owned())
}

/// The paths in a line of code; also single words.
fn paths(line: &str) -> Vec<Vec<String>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(start) = rest.find(is_word) {
        rest = &rest[start..];
        let mut path = Vec::new();
        loop {
            let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
            path.push(rest[..end].to_owned());
            rest = &rest[end..];
            match rest.strip_prefix("::") {
                Some(next) if next.starts_with(is_word) => rest = next,
                _ => break,
            }
        }
        found.push(path);
    }
    found
}

/// The text without items under `#[cfg(test)]`.
pub(crate) fn without_tests(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        // Removed lines are kept as empty ones, so that line numbers are right.
        kept.push('\n');
        let indent = line.len() - line.trim_start().len();
        let ends = |line: &str| {
            let own = line.len() - line.trim_start().len();
            own == indent && (line.ends_with('}') || line.ends_with(';'))
        };
        for line in lines.by_ref() {
            kept.push('\n');
            if ends(line) {
                break;
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycles(files: &[(&str, &str)]) -> Vec<Vec<String>> {
        let root = Path::new("src");
        let files: Vec<(PathBuf, &str)> =
            files.iter().map(|(name, text)| (root.join(name), *text)).collect();
        let graph =
            ImportGraph::new(root, files.iter().map(|(path, text)| (path.as_path(), *text)));
        graph.cycles().into_iter().map(|cycle| cycle.shortest).collect()
    }

    #[test]
    fn cycles_are_found_by_every_kind_of_path() {
        for a in [
            "use crate::b::Beta;\n",
            "use super::b::{self, Beta};\n",
            "use crate::{\n    b::{Beta, c},\n};\n",
            "fn f() -> crate::b::Beta {}\n",
            "use crate::Beta as Other;\n",
        ] {
            let files = [
                ("lib.rs", "mod a;\nmod b;\npub use b::Beta;\n"),
                ("a.rs", &format!("{a}pub struct Alpha;\n")),
                ("b.rs", "use crate::a::Alpha;\npub struct Beta;\n"),
            ];
            assert_eq!(cycles(&files), [["a.rs", "b.rs", "a.rs"]], "{a}");
        }
    }

    #[test]
    fn declarations_reexports_comments_and_tests_are_no_imports() {
        let files = [
            ("lib.rs", "pub mod a;\n"),
            (
                "a/mod.rs",
                "mod b;\nmod c;\nmod d;\npub(crate) use b::{Beta, b};\npub trait Alpha {}\nfn f() { d::d() }\n",
            ),
            ("a/b.rs", "use super::Alpha;\npub struct Beta;\npub fn b() {}\n"),
            // `super::Beta` is that of b.rs, not of mod.rs.
            ("a/c.rs", "use super::Beta;\n// use crate::d::Delta;\n"),
            ("a/d.rs", "pub(in crate::a) fn d() {}\n"),
            ("d.rs", "use crate::a::b;\n#[cfg(test)]\nmod tests {\n    use crate::e::E;\n}\n"),
            ("e.rs", "use crate::d;\npub struct E;\n"),
        ];
        assert!(cycles(&files).is_empty(), "{:?}", cycles(&files));
    }

    #[test]
    fn a_parent_that_uses_its_children_is_in_a_cycle_with_those_that_use_it() {
        let child = ("a/b.rs", "use super::Alpha;\npub fn beta(_: Alpha) {}\n");
        for parent in [
            "mod b;\nuse b::beta;\npub struct Alpha;\n",
            "mod b;\npub struct Alpha;\nfn f() { b::beta(Alpha) }\n",
            "mod b;\nuse self::b::beta;\npub const Alpha: u8 = 0;\n",
            "mod b;\npub use b::beta;\npub struct Alpha;\nfn f() { beta(Alpha) }\n",
        ] {
            let files = [("lib.rs", "mod a;\n"), ("a/mod.rs", parent), child];
            assert_eq!(cycles(&files), [["a/mod.rs", "a/b.rs", "a/mod.rs"]], "{parent}");
        }
    }

    #[test]
    fn a_longer_cycle_is_reported_once() {
        let files = [
            ("lib.rs", ""),
            ("a.rs", "use crate::b::B;\npub struct A;\n"),
            ("b.rs", "use crate::c::C;\npub struct B;\n"),
            ("c.rs", "use crate::a::A;\npub struct C;\n"),
            ("d.rs", "use crate::a::A;\n"),
        ];
        assert_eq!(cycles(&files), [["a.rs", "b.rs", "c.rs", "a.rs"]]);
    }

    #[test]
    fn only_the_item_under_the_attribute_is_removed() {
        let text = "a\n#[cfg(test)]\nmod tests;\nb\n#[cfg(test)]\nfn f() {\n    x;\n}\nc\n";
        assert_eq!(without_tests(text), "a\n\n\nb\n\n\n\n\nc\n");
    }
}
