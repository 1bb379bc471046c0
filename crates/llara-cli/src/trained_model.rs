//! Loading a model to be used, as `encode`, `evaluate` and `search` do.

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

/// Which model, and how it makes vectors.
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
    /// What is put around texts: llara, e5-mistral, qwen3-embedding, or a TOML file
    /// [default: the model folder's own, or llara]
    #[arg(long, value_name = "NAME|FILE.toml")]
    template: Option<String>,
    /// Whether vectors are brought to length 1 [default: as the model was trained, or true]
    #[arg(long, alias = "normlized", value_name = "BOOL", num_args = 0..=1)]
    #[arg(default_missing_value = "true")]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true)]
    normalized: Option<bool>,
    /// Tokens encoded at a time; more is faster up to a point and takes more memory
    #[arg(long, value_name = "N", default_value_t = 8192)]
    batch_tokens: usize,
}

/// Lengths and instructions of both roles.
#[derive(clap::Args)]
#[command(next_help_heading = "Encoding")]
pub(super) struct Roles {
    /// Tokens that a query with its template is cut to [default: as the model was trained, or 32]
    #[arg(long, value_name = "N")]
    query_max_len: Option<usize>,
    /// Tokens that a passage with its template is cut to [default: as the model was trained, or
    /// 128]
    #[arg(long, value_name = "N")]
    passage_max_len: Option<usize>,
    /// Text put in front of every query [default: none]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    query_instruction_for_retrieval: String,
    /// Text put in front of every passage [default: none]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    passage_instruction_for_retrieval: String,
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
        embedder.query_instruction.clone_from(&self.query_instruction_for_retrieval);
        embedder.passage_instruction.clone_from(&self.passage_instruction_for_retrieval);
        Ok(())
    }
}

impl Source {
    /// The model's name as it was given.
    pub(super) fn name(&self) -> &str {
        &self.model
    }

    /// The adapter's folder; refuses a model that is to be merged with nothing.
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
            model.attach_adapter(adapter)?;
        }
        model.decoder_mut().freeze();
        model.set_precision(precision)?;
        match saved {
            Some(saved) if saved == *model.recipe() => {
                if let Some(probes) = Probes::read(recipe_dir)? {
                    probes.check(&model).map_err(|e| e.file(recipe_dir))?;
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

/// The folder of a model; says what is fetched. `adapter_option` is the one for adapters, which are
/// easily taken for models.
pub(super) fn find(model: &str, cache_dir: Option<&Path>, adapter_option: &str) -> Result<PathBuf> {
    let dir = hub::resolve_with(model, cache_dir, &mut |file| say!("fetching {file} of {model}"))?;
    refuse_adapter(dir, adapter_option)
}

/// The same without the weights, where the model is fetched.
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

/// Refuses a length that leaves no token of a text, by the name of its option.
pub(super) fn check_max_len(
    model: &BiEncoderModel<Cpu>,
    role: Role,
    option: &str,
    max_len: usize,
) -> Result<()> {
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

/// Refuses a search for nothing.
pub(super) fn check_top_k(top_k: usize) -> Result<()> {
    if top_k > 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Argument, "`--top-k` is 0")
        .expected("1 passage or more")
        .hint("leave --top-k out"))
}

/// Says when texts may become longer than the model was made for.
pub(super) fn warn_if_too_long(model: &BiEncoderModel<Cpu>, role: Role, max_len: usize) {
    let positions = model.decoder().config().max_position_embeddings;
    if max_len > positions {
        say!(
            "warning: a {role} may have {max_len} tokens, the model was made for {positions} \
             (max_position_embeddings): vectors of longer texts may be poor"
        );
    }
}
