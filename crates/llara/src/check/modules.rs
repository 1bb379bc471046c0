//! The files of sentence-transformers in a folder: whether they give the embeddings of the recipe.

use std::path::{Component, Path};

use serde_json::Value;

use super::report::{Finding, Findings, Status};
use crate::biencoder::StLayout;
use crate::storage::read_limited;
use crate::{Error, ErrorKind, Result};

const CHECK: &str = "sentence-transformers";
pub(super) const MODULES_FILE: &str = "modules.json";
const SETTINGS_FILE: &str = "config_sentence_transformers.json";
const LENGTH_FILE: &str = "sentence_bert_config.json";
/// Largest of these files, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What `modules.json` and the files that it names say.
#[derive(Debug, Default, PartialEq)]
struct Modules {
    /// Name of the only pooling mode, such as `lasttoken`.
    pooling: Option<String>,
    /// Whether prompts are pooled, too.
    include_prompt: bool,
    normalize: bool,
    /// Modules besides the transformer, the pooling and the normalization.
    others: Vec<String>,
}

/// Reads the files and compares them with the layout of the recipe, where there is one. `dimension` is the
/// model's hidden size. Returns whether they can be used.
pub(super) fn check_modules(
    layout: Option<&StLayout>,
    has_recipe: bool,
    findings: &mut Findings<'_>,
) -> bool {
    let before = findings.list.len();
    match read_modules(findings.dir) {
        Ok(modules) => compare(&modules, layout, has_recipe, findings),
        Err(error) => findings.fail(CHECK, &error),
    }
    if let Some(layout) = layout {
        match read_json(&findings.dir.join(SETTINGS_FILE)) {
            Ok(settings) => compare_prompts(&settings, layout, findings),
            Err(error) => findings.fail(CHECK, &error),
        }
    }
    if let Err(error) = read_json(&findings.dir.join(LENGTH_FILE)) {
        // Then the length of the tokenizer's configuration is used.
        findings.add_error(Status::Warning, CHECK, &error);
    }
    let added = &findings.list[before..];
    let usable = added.iter().all(|finding| finding.status != Status::Error);
    if added.is_empty() {
        findings.ok(CHECK, MODULES_FILE, "the modules give the embeddings of the recipe");
    }
    usable
}

fn compare(
    modules: &Modules,
    layout: Option<&StLayout>,
    has_recipe: bool,
    findings: &mut Findings<'_>,
) {
    let mut error = |what: &str, expected: &str, got: String| {
        let finding = Finding::new(Status::Error, CHECK, MODULES_FILE, what.to_owned());
        findings.push(finding.expected(expected).got(got).hint(
            "remove modules.json and the folders that it names, or save the model again with llara",
        ));
    };
    let pooling = modules.pooling.as_deref().unwrap_or("none");
    match layout {
        None if has_recipe => {
            let what = "the modules cannot give the embeddings of llara.json; sentence-transformers loads \
                        them without an error";
            error(what, "no modules.json", format!("pooling {pooling}"));
        }
        None => {}
        Some(layout) => {
            if pooling != "lasttoken" {
                error("the pooling is not that of the recipe", "lasttoken", pooling.to_owned());
            }
            if !modules.include_prompt {
                error("prompts are left out of the pooling", "include_prompt true", "false".into());
            }
            if modules.normalize != layout.normalized {
                let expected =
                    if layout.normalized { "a Normalize module" } else { "no Normalize module" };
                error(
                    "the normalization is not that of the recipe",
                    expected,
                    "the opposite".into(),
                );
            }
            if !modules.others.is_empty() {
                error(
                    "there are modules that llara does not apply",
                    "none",
                    modules.others.join(", "),
                );
            }
        }
    }
}

fn compare_prompts(settings: &Value, layout: &StLayout, findings: &mut Findings<'_>) {
    let prompt = |name: &str| settings["prompts"][name].as_str().unwrap_or_default();
    for (name, expected) in &layout.prompts {
        if prompt(name) != expected {
            let what = format!("the prompt `{name}` is not that of the recipe");
            let finding = Finding::new(Status::Error, CHECK, SETTINGS_FILE, what);
            findings
                .push(finding.expected(format!("{expected:?}")).got(format!("{:?}", prompt(name))));
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = read_limited(path, "read the settings of sentence-transformers", MAX_BYTES)?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::new(ErrorKind::Config, "the file is not JSON").file(path).because(e))
}

fn read_modules(dir: &Path) -> Result<Modules> {
    let path = dir.join(MODULES_FILE);
    let json = read_json(&path)?;
    let bad = |what: &str| Error::new(ErrorKind::Config, what).file(&path);
    let list = json.as_array().ok_or_else(|| bad("the file is not a list of modules"))?;
    let mut modules = Modules { include_prompt: true, ..Modules::default() };
    let mut has_transformer = false;
    for module in list {
        let kind = module["type"].as_str().unwrap_or_default();
        let class = kind.rsplit('.').next().unwrap_or_default();
        let folder = module["path"].as_str().unwrap_or_default();
        let inside =
            Path::new(folder).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside {
            return Err(bad("a module outside of the folder").got(format!("{folder:?}")));
        }
        match class {
            "Transformer" => {
                has_transformer = true;
                if !folder.is_empty() {
                    return Err(bad("the transformer is in a subfolder, which is not checked")
                        .expected("an empty path")
                        .got(format!("{folder:?}")));
                }
            }
            "Pooling" => {
                let config = read_json(&dir.join(folder).join("config.json"))?;
                modules.pooling = Some(pooling_mode(&config));
                modules.include_prompt = config["include_prompt"].as_bool().unwrap_or(true);
            }
            "Normalize" => modules.normalize = true,
            _ => modules.others.push(class.escape_debug().to_string()),
        }
    }
    if !has_transformer {
        return Err(bad("there is no transformer among the modules"));
    }
    Ok(modules)
}

/// The modes that are on, in both spellings: `pooling_mode_lasttoken: true` and `pooling_mode: "lasttoken"`.
fn pooling_mode(config: &Value) -> String {
    if let Some(mode) = config["pooling_mode"].as_str() {
        return mode.escape_debug().to_string();
    }
    let modes = config.as_object().into_iter().flatten();
    let on = modes.filter(|(_, value)| value.as_bool() == Some(true));
    let names: Vec<&str> = on.filter_map(|(key, _)| key.strip_prefix("pooling_mode_")).collect();
    names.join(" and ")
}
