//! Options for a model, and loading it, for `encode`, `evaluate`, `search` and `merge`.

use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use llara::backend::{Backend, Dtype};
use llara::retrieval::TextEmbedder;
use llara::text::Template;
use llara::{
    BiEncoderModel, BiEncoderOptions, Error, ErrorKind, Loader, Probes, Recipe, Result, Role, hub,
    read_text_file,
};

use super::compute::{Compute, Precision};
use super::processes::Processes;
use super::talk::say;

/// The model and its encoding options.
#[derive(clap::Args)]
pub(super) struct TrainedModel {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    encoding: Encoding,
    #[command(flatten)]
    pub(super) compute: Compute,
    #[command(flatten)]
    precision: Precision,
}

/// The model and its adapter.
#[derive(clap::Args)]
#[command(next_help_heading = "Model")]
pub(super) struct Source {
    /// Folder of the model, or its name on the Hugging Face Hub (org/name)
    #[arg(long, alias = "model-name-or-path", value_name = "DIR|HUB_ID")]
    model: String,
    /// Folder of a PEFT adapter that was trained on this model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Cache folder of the Hub [default: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub]
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
    /// Whether embeddings are L2-normalized [default: as the model was trained, or true]
    #[arg(long, alias = "normlized", value_name = "BOOL", num_args = 0..=1)]
    #[arg(default_missing_value = "true")]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true)]
    normalized: Option<bool>,
    /// Maximum number of tokens in a batch; larger batches can be faster and need more memory
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
    /// Use the instructions of a task that the model was trained on; its README.md lists them
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Instruction that is prepended to every query [default: as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    query_instruction_for_retrieval: Option<String>,
    /// Instruction that is prepended to every passage [default: as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    passage_instruction_for_retrieval: Option<String>,
}

impl Roles {
    /// Applies the options to `embedder`.
    pub(super) fn apply<B: Backend>(&self, embedder: &mut TextEmbedder<'_, B>) -> Result<()> {
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
        if let Some(task) = &self.task {
            let instructions = embedder.model.recipe().task(task)?.clone();
            embedder.use_instructions(instructions);
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
    /// No adapter is given.
    pub(super) fn require_adapter(&self) -> Result<&Path> {
        self.adapter.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Argument, "no adapter is given")
                .expected("--adapter DIR, the folder of an adapter of PEFT or `llara finetune`")
        })
    }

    /// Loads the model. If its recipe is not changed, verifies it with its probes.
    pub(super) fn load<B: Backend>(
        &self,
        (backend, precision): (B, Dtype),
        template_name: Option<&str>,
        normalized: Option<bool>,
    ) -> Result<BiEncoderModel<B>> {
        let dir = find(&self.model, self.cache_dir.as_deref(), "--adapter")?;
        // An adapter has its own recipe.
        let recipe_dir = self.adapter.as_deref().unwrap_or(&dir);
        let saved = Recipe::read(recipe_dir)?;
        let mut loader = Loader::new(&dir)?.matrices(precision);
        if let Some(recipe) = &saved {
            loader = loader.with_recipe(recipe.clone());
        }
        if let Some(adapter) = &self.adapter {
            loader = loader.with_adapter(adapter);
        }
        if let Some(name) = template_name {
            loader = loader.template(template(name)?);
        }
        let normalized = normalized.unwrap_or(loader.recipe().normalized);
        let options = BiEncoderOptions { normalized, ..BiEncoderOptions::default() };
        let mut model = loader.load(backend, options).map_err(|e| match &self.adapter {
            Some(adapter) => name_recorded_base(e, adapter),
            None => e,
        })?;
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
                say!("note: the template or the normalization differs from that of the training")
            }
            None => say!(
                "note: {} has no llara.json; template {} is used",
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

    /// The inputs, for [`check_apart`](crate::paths::check_apart).
    pub(super) fn inputs(&self) -> Vec<(&str, &Path)> {
        let mut inputs = vec![("the model", Path::new(self.name()))];
        inputs.extend(self.source.adapter.as_deref().map(|dir| ("the adapter", dir)));
        let template = self.encoding.template.as_deref().map(Path::new);
        inputs.extend(template.map(|path| ("the template", path)));
        inputs
    }

    /// Checks the options that can be checked without reading files.
    pub(super) fn check(&self) -> Result<()> {
        if self.encoding.batch_tokens == 0 {
            return Err(Error::new(ErrorKind::Argument, "`--batch-tokens` is 0")
                .expected("1 or more")
                .hint("omit --batch-tokens to use the default"));
        }
        Ok(())
    }

    /// Loads the model. If its recipe is not changed, verifies it with its probes.
    pub(super) fn load<B: Backend>(&self, backend: B) -> anyhow::Result<BiEncoderModel<B>> {
        self.load_on(backend, &Processes::one())
    }

    /// [`load`](Self::load) on each of several processes, which compute alike.
    pub(super) fn load_on<B: Backend>(
        &self,
        backend: B,
        processes: &Processes,
    ) -> anyhow::Result<BiEncoderModel<B>> {
        let Encoding { template, normalized, .. } = &self.encoding;
        let Source { model, cache_dir, .. } = &self.source;
        download_once(model, cache_dir.as_deref(), "--adapter", processes)?;
        let precision = processes.shared_precision(self.precision.dtype(&backend), &backend)?;
        Ok(self.source.load((backend, precision), template.as_deref(), *normalized)?)
    }

    /// An embedder for `model`.
    pub(super) fn embedder<'m, B: Backend>(
        &self,
        model: &'m BiEncoderModel<B>,
    ) -> TextEmbedder<'m, B> {
        let mut embedder = TextEmbedder::new(model);
        embedder.batch_tokens = self.encoding.batch_tokens;
        embedder
    }
}

/// The folder of a model; prints the files that are downloaded. `adapter_option` is the option for adapters,
/// which the error for an adapter's folder suggests.
pub(super) fn find(model: &str, cache_dir: Option<&Path>, adapter_option: &str) -> Result<PathBuf> {
    let on_fetch = &mut |file: &str| say!("downloading {file} of {model}");
    refuse_adapter(hub::resolve_with(model, cache_dir, on_fetch)?, adapter_option)
}

/// Lets the first of several processes download the model, before the others find it in the cache.
///
/// # Errors
/// It cannot be downloaded; on every process.
pub(super) fn download_once(
    model: &str,
    cache_dir: Option<&Path>,
    adapter_option: &str,
    processes: &Processes,
) -> anyhow::Result<()> {
    if processes.size() > 1 {
        processes.first(|| Ok(find(model, cache_dir, adapter_option)?))?;
    }
    Ok(())
}

/// Like [`find`], but does not download the weights.
pub(super) fn find_outline(
    model: &str,
    cache_dir: Option<&Path>,
    adapter_option: &str,
) -> Result<PathBuf> {
    let on_fetch = &mut |file: &str| say!("downloading {file} of {model}");
    refuse_adapter(hub::resolve_outline_with(model, cache_dir, on_fetch)?, adapter_option)
}

fn refuse_adapter(dir: PathBuf, adapter_option: &str) -> Result<PathBuf> {
    if dir.join("adapter_config.json").is_file() && !dir.join("config.json").is_file() {
        return Err(Error::new(ErrorKind::Argument, "this is an adapter, not a model")
            .file(&dir)
            .hint(format!(
                "also give the model that it was trained on: --model BASE {adapter_option} {}",
                dir.display()
            )));
    }
    Ok(dir)
}

/// Adds the base model that an adapter's configuration records to an error of using it with another model.
pub(super) fn name_recorded_base(error: Error, adapter: &Path) -> Error {
    let path = adapter.join("adapter_config.json");
    let recorded = read_text_file(&path, "read", MAX_CONFIG_BYTES).ok().and_then(|text| {
        let config: serde_json::Value = serde_json::from_str(&text).ok()?;
        Some(config.get("base_model_name_or_path")?.as_str()?.escape_debug().to_string())
    });
    match recorded {
        Some(base) if error.kind() == ErrorKind::Weights => {
            error.hint(format!("the adapter was trained on {base}: give that as --model"))
        }
        _ => error,
    }
}

/// Largest `adapter_config.json` that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The largest maximum length that is accepted, in tokens. No model supports so many.
pub(super) const MAX_LEN: usize = 1 << 24;

/// Refuses a maximum length that is too large or leaves no token for the text. Errors name `option`.
pub(super) fn check_max_len(
    model: &BiEncoderModel<impl Backend>,
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

/// A template by its built-in name or by the path of a file.
pub(super) fn template(name: &str) -> Result<Template> {
    // A built-in name takes precedence over a file of the same name.
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
        .expected("1 or more")
        .hint("omit --top-k to use the default"))
}

/// Prints a warning if the maximum length exceeds what the model supports.
pub(super) fn warn_if_too_long(model: &BiEncoderModel<impl Backend>, role: Role, max_len: usize) {
    let positions = model.decoder().config().max_position_embeddings;
    if max_len > positions {
        say!(
            "warning: the maximum {role} length is {max_len} tokens, but the model supports {positions} \
             (max_position_embeddings): embeddings of longer texts may be poor"
        );
    }
}
