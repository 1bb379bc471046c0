//! Loading a model for `encode`, `evaluate` and `search`.

use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use llara::backend::{Cpu, Dtype};
use llara::retrieval::TextEmbedder;
use llara::text::Template;
use llara::{
    BiEncoderModel, BiEncoderOptions, Error, ErrorKind, Loader, Probes, Recipe, Result, Role, hub,
};

use super::compute::{Compute, Precision};
use super::talk::say;

/// The model and its encoding options.
#[derive(clap::Args)]
pub(super) struct TrainedModel {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    encoding: Encoding,
    #[command(flatten)]
    compute: Compute,
    #[command(flatten)]
    precision: Precision,
}

/// Which model.
#[derive(clap::Args)]
#[command(next_help_heading = "Model")]
pub(super) struct Source {
    /// Folder of the model, or its name on the Hugging Face Hub (org/name)
    #[arg(long, alias = "model-name-or-path", value_name = "DIR|HUB_ID")]
    model: String,
    /// Folder of a PEFT adapter that was trained on this model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Cache of the Hub [default: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Encoding")]
struct Encoding {
    /// Template of queries and passages: llara, e5-mistral, qwen3-embedding, or a TOML file
    /// [default: as the model was trained, or llara]
    #[arg(long, value_name = "NAME|FILE.toml")]
    template: Option<String>,
    /// Whether embeddings are L2-normalised [default: as the model was trained, or true]
    #[arg(long, alias = "normlized", value_name = "BOOL", num_args = 0..=1)]
    #[arg(default_missing_value = "true")]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true)]
    normalized: Option<bool>,
    /// Tokens encoded at a time; more is faster up to a point and needs more memory
    #[arg(long, value_name = "N", default_value_t = 8192)]
    batch_tokens: usize,
}

/// Lengths and instructions of both roles.
#[derive(clap::Args)]
#[command(next_help_heading = "Encoding")]
pub(super) struct Roles {
    /// Maximum length of a query in tokens, template included [default: as the model was trained,
    /// or 32]
    #[arg(long, value_name = "N")]
    query_max_len: Option<usize>,
    /// Maximum length of a passage in tokens, template included [default: as the model was trained,
    /// or 128]
    #[arg(long, value_name = "N")]
    passage_max_len: Option<usize>,
    /// Text put in front of every query [default: as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    query_instruction_for_retrieval: Option<String>,
    /// Text put in front of every passage [default: as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    passage_instruction_for_retrieval: Option<String>,
}

impl Roles {
    /// Sets them.
    pub(super) fn apply(&self, embedder: &mut TextEmbedder<'_, Cpu>) -> Result<()> {
        for (role, option, given, len) in [
            (Role::Query, "--query-max-len", self.query_max_len, &mut embedder.query_max_len),
            (
                Role::Passage,
                "--passage-max-len",
                self.passage_max_len,
                &mut embedder.passage_max_len,
            ),
        ] {
            *len = given.unwrap_or(*len);
            check_max_len(embedder.model, role, option, *len)?;
            warn_if_too_long(embedder.model, role, *len);
        }
        if let Some(instruction) = &self.query_instruction_for_retrieval {
            embedder.query_instruction.clone_from(instruction);
        }
        if let Some(instruction) = &self.passage_instruction_for_retrieval {
            embedder.passage_instruction.clone_from(instruction);
        }
        Ok(())
    }
}

impl Source {
    /// The model's name as it was given.
    pub(super) fn name(&self) -> &str {
        &self.model
    }

    /// The adapter's folder.
    ///
    /// # Errors
    /// When none is given.
    pub(super) fn require_adapter(&self) -> Result<&Path> {
        self.adapter.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Argument, "there is nothing to merge")
                .expected("--adapter DIR, a folder as PEFT or `llara finetune` writes it")
        })
    }

    /// Loads the model and, where nothing about it is changed, lets it check itself.
    pub(super) fn load(
        &self,
        (compute, precision): (&Compute, Dtype),
        template_name: Option<&str>,
        normalized: Option<bool>,
    ) -> Result<BiEncoderModel<Cpu>> {
        let dir = find(&self.model, self.cache_dir.as_deref(), "--adapter")?;
        // An adapter was trained with a recipe of its own.
        let recipe_dir = self.adapter.as_deref().unwrap_or(&dir);
        let saved = Recipe::read(recipe_dir)?;
        let mut loader = Loader::new(&dir)?.matrices(precision);
        if let Some(recipe) = &saved {
            loader = loader.with_recipe(recipe.clone());
        }
        if let Some(name) = template_name {
            loader = loader.template(template(name)?);
        }
        let normalized = normalized.unwrap_or(loader.recipe().normalized);
        let options = BiEncoderOptions { normalized, ..BiEncoderOptions::default() };
        let mut model = loader.load(compute.start(), options)?;
        if let Some(adapter) = &self.adapter {
            model.attach_adapter(adapter).map_err(|e| name_recorded_base(e, adapter))?;
        }
        model.freeze()?;
        model.set_precision(precision)?;
        match saved {
            Some(saved) if saved == *model.recipe() => {
                if let Some(probes) = Probes::read(recipe_dir)? {
                    probes.check(&model).map_err(|e| match &self.adapter {
                        Some(adapter) => name_recorded_base(e.file(adapter), adapter),
                        None => e.file(recipe_dir),
                    })?;
                }
            }
            Some(_) => {
                say!("note: template or normalisation differ from how the model was trained")
            }
            None => say!(
                "note: {} has no llara.json; it is used with template {}",
                recipe_dir.display(),
                model.recipe().template.name
            ),
        }
        Ok(model)
    }
}

impl TrainedModel {
    /// The model's name as it was given.
    pub(super) fn name(&self) -> &str {
        self.source.name()
    }

    /// What is read, for [`check_apart`](crate::paths::check_apart).
    pub(super) fn inputs(&self) -> Vec<(&str, &Path)> {
        let mut inputs = vec![("the model", Path::new(self.name()))];
        inputs.extend(self.source.adapter.as_deref().map(|dir| ("the adapter", dir)));
        let template = self.encoding.template.as_deref().map(Path::new);
        inputs.extend(template.map(|path| ("the template", path)));
        inputs
    }

    /// Refuses what can be refused without looking at files.
    pub(super) fn check(&self) -> Result<()> {
        if self.encoding.batch_tokens == 0 {
            return Err(Error::new(ErrorKind::Argument, "`--batch-tokens` is 0")
                .expected("1 token or more; a longer text goes alone")
                .hint("leave --batch-tokens out"));
        }
        self.compute.check()
    }

    /// Loads the model and, where nothing about it is changed, lets it check itself.
    pub(super) fn load(&self) -> Result<BiEncoderModel<Cpu>> {
        let Encoding { template, normalized, .. } = &self.encoding;
        let compute = (&self.compute, self.precision.dtype());
        self.source.load(compute, template.as_deref(), *normalized)
    }

    /// What embeds texts with `model`.
    pub(super) fn embedder<'m>(&self, model: &'m BiEncoderModel<Cpu>) -> TextEmbedder<'m, Cpu> {
        let mut embedder = TextEmbedder::new(model);
        embedder.batch_tokens = self.encoding.batch_tokens;
        embedder
    }
}

/// The folder of a model; prints which files are downloaded. `adapter_option` is named in the error
/// for a folder that is an adapter.
pub(super) fn find(model: &str, cache_dir: Option<&Path>, adapter_option: &str) -> Result<PathBuf> {
    let dir = hub::resolve_with(model, cache_dir, &mut |file| say!("fetching {file} of {model}"))?;
    refuse_adapter(dir, adapter_option)
}

/// The same without the weights, if the model is downloaded.
pub(super) fn find_outline(
    model: &str,
    cache_dir: Option<&Path>,
    adapter_option: &str,
) -> Result<PathBuf> {
    let say_so = &mut |file: &str| say!("fetching {file} of {model}");
    refuse_adapter(hub::resolve_outline_with(model, cache_dir, say_so)?, adapter_option)
}

fn refuse_adapter(dir: PathBuf, adapter_option: &str) -> Result<PathBuf> {
    if dir.join("adapter_config.json").is_file() && !dir.join("config.json").is_file() {
        return Err(Error::new(ErrorKind::Argument, "this is an adapter, not a model")
            .file(&dir)
            .hint(format!(
                "give the model that it was trained on too: --model BASE {adapter_option} {}",
                dir.display()
            )));
    }
    Ok(dir)
}

/// Adds the base model that an adapter was trained on, as its configuration records it, to an error
/// of using it with another one.
pub(super) fn name_recorded_base(error: Error, adapter: &Path) -> Error {
    let recorded = std::fs::read(adapter.join("adapter_config.json")).ok().and_then(|text| {
        let config: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Some(config.get("base_model_name_or_path")?.as_str()?.escape_debug().to_string())
    });
    match recorded {
        Some(base) if error.kind() == ErrorKind::Weights => {
            error.hint(format!("the adapter was trained on {base}: give that as --model"))
        }
        _ => error,
    }
}

/// The largest maximum length: more tokens than any model was made for.
pub(super) const MAX_LEN: usize = 1 << 24;

/// Refuses a length that leaves no token of a text, or is absurd, by the name of its option.
pub(super) fn check_max_len(
    model: &BiEncoderModel<Cpu>,
    role: Role,
    option: &str,
    max_len: usize,
) -> Result<()> {
    if max_len > MAX_LEN {
        return Err(Error::new(ErrorKind::Argument, "the maximum length is out of range")
            .expected(format!("at most {MAX_LEN} tokens"))
            .got(format!("{option} {max_len}")));
    }
    let checked = model.prompts().check_max_len(role, max_len);
    checked.map_err(|e| e.got(format!("{option} {max_len}")))
}

/// A template by the name of a preset or the path of a file.
pub(super) fn template(name: &str) -> Result<Template> {
    // A preset's name means the preset, also where a file happens to be called so.
    let unknown = match Template::preset(name) {
        Ok(template) => return Ok(template),
        Err(unknown) => unknown,
    };
    let path = Path::new(name);
    let file = path.extension().is_some_and(|e| e == "toml") || path.is_file();
    if file { Template::from_toml_file(path) } else { Err(unknown) }
}

/// Refuses `--top-k 0`.
pub(super) fn check_top_k(top_k: usize) -> Result<()> {
    if top_k > 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Argument, "`--top-k` is 0")
        .expected("1 passage or more")
        .hint("leave --top-k out"))
}

/// Warns if texts may be longer than the model supports.
pub(super) fn warn_if_too_long(model: &BiEncoderModel<Cpu>, role: Role, max_len: usize) {
    let positions = model.decoder().config().max_position_embeddings;
    if max_len > positions {
        say!(
            "warning: a {role} may have {max_len} tokens, the model supports {positions} \
             (max_position_embeddings): embeddings of longer texts may be poor"
        );
    }
}
