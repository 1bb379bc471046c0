//! Checks everything about a model or adapter folder and reports all faults, not only the first.
//!
//! The readers are those that load models. Weights are read tensor by tensor or layer by layer, so the check
//! of a large model needs little memory. Nothing in the folder is changed.

mod adapter;
mod config;
mod listing;
mod modules;
mod probes;
mod report;
mod serving;
mod tokens;
mod weights;

use std::path::Path;

pub use report::{Finding, FolderKind, Report, Status, Tool};

use self::adapter::AdapterFiles;
use self::config::{Config, check_config};
use self::listing::Listing;
use self::probes::{Encoder, check_probes};
use self::report::Findings;
use self::serving::Served;
use self::weights::Weights;
use crate::backend::Backend;
use crate::biencoder::{
    ADAPTER_WEIGHTS_FILE, Obstacle, PROBES_FILE, Recipe, StLayout, adapter_tokenizer,
};
use crate::model::weights::WeightFiles;
use crate::storage::SafetensorsFile;
use crate::text::{PromptEncoder, TextTokenizer};
use crate::train::Checkpoint;

/// What a check needs besides the folder.
pub struct CheckOptions<'o> {
    /// Folder of the base model, for an adapter.
    pub base: Option<&'o Path>,
    /// Receives the number of bytes of each block of weights that was read; see [`bytes_to_read`].
    pub on_bytes: &'o dyn Fn(u64),
}

/// Checks a model or adapter folder, on `backend`:
///
/// - files can be read, no interrupted save is left; a checkpoint has the lengths and hashes of its manifest;
/// - `config.json` describes a supported model;
/// - tensors have the names, shapes and types that it says, and all values are finite;
/// - the tokenizer's ids are in the vocabulary, the template's special tokens are single ids;
/// - rank, targets and shapes of an adapter fit each other and, if given, the base model;
/// - the probe texts have the embeddings that were saved;
/// - which tools give the same embeddings, and with which settings.
///
/// ```no_run
/// use llara::backend::Cpu;
/// use llara::check::{CheckOptions, Status, check_folder};
///
/// let options = CheckOptions { base: None, on_bytes: &|_| () };
/// let report = check_folder(&Cpu::new(), "tuned".as_ref(), &options);
/// assert_eq!(report.count(Status::Error), 0, "{:?}", report.findings);
/// ```
pub fn check_folder<B: Backend>(backend: &B, dir: &Path, options: &CheckOptions<'_>) -> Report {
    let mut findings = Findings::new(dir);
    let listing = Listing::new(&mut findings);
    let mut report = Report {
        kind: listing.kind,
        checkpoint: listing.is_checkpoint,
        findings: Vec::new(),
        tools: Vec::new(),
    };
    if listing.is_checkpoint {
        let faults = Checkpoint::faults(dir);
        faults.iter().for_each(|error| findings.fail("checkpoint", error));
        if faults.is_empty() {
            findings.ok("checkpoint", "manifest.json", "every file has its length and hash");
        }
    }
    match listing.kind {
        FolderKind::Model => check_model(backend, &listing, findings, options, &mut report),
        FolderKind::Adapter => check_adapter(backend, &listing, findings, options, &mut report),
        FolderKind::Unknown => report.findings = findings.list,
    }
    report
}

/// Bytes of weights that [`check_folder`] reads at most, for a progress bar. The probes need the weights once
/// more, as f32.
pub fn bytes_to_read(dir: &Path, base: Option<&Path>) -> u64 {
    let data = |file: &SafetensorsFile| -> (u64, u64) {
        let names = file.names();
        let infos = names.iter().filter_map(|name| file.info(name));
        let sizes = infos.map(|info| {
            let (start, end) = info.data_offsets;
            ((end - start) as u64, 4 * info.shape.iter().product::<usize>() as u64)
        });
        sizes.fold((0, 0), |(a, b), (bytes, as_f32)| (a + bytes, b.saturating_add(as_f32)))
    };
    let sum = |files: &WeightFiles| {
        let sizes = files.files().iter().map(data);
        sizes.fold((0, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1))
    };
    let own = sum(&WeightFiles::open_readable(dir).0);
    let adapter = SafetensorsFile::open(&dir.join(ADAPTER_WEIGHTS_FILE)).map_or(0, |f| data(&f).0);
    let of_base = base.map_or(0, |base| sum(&WeightFiles::open_readable(base).0).1);
    let probed = if dir.join(PROBES_FILE).is_file() { own.1 + of_base } else { 0 };
    own.0 + adapter + probed
}

fn check_model<B: Backend>(
    backend: &B,
    listing: &Listing,
    mut findings: Findings<'_>,
    options: &CheckOptions<'_>,
    report: &mut Report,
) {
    let dir = findings.dir;
    let model = Model::check(dir, &mut findings);
    weights::check_values(&model.weights, &mut findings, options.on_bytes);
    let recipe = tokens::check_recipe(dir, &mut findings);
    let prompts = model.prompts(recipe.as_ref(), &mut findings);
    let is_saved = recipe.as_ref().is_some_and(|(_, saved)| *saved);
    let damaged = findings.has_errors(&["weights"]) || !model.weights.complete;
    let encoder = match (&model.config, &prompts, &recipe) {
        // Probes were made with the recipe of the folder, not with the default.
        (Some(config), Some(prompts), Some((recipe, true))) if !damaged => {
            let weights = &model.weights.files;
            Some(Encoder { config, weights, adapter: None, prompts, recipe })
        }
        _ => None,
    };
    let expects = is_saved && !listing.is_checkpoint;
    let sink = (expects, &mut findings);
    check_probes(backend, dir, encoder.as_ref(), sink, options.on_bytes);
    let recipe = recipe.as_ref().filter(|(_, saved)| *saved).map(|(recipe, _)| recipe);
    let layout = layout(recipe, prompts.as_ref());
    let has_modules = listing.has(modules::MODULES_FILE)
        && match &layout {
            Some(Ok(layout)) => modules::check_modules(Some(layout), true, &mut findings),
            Some(Err(_)) => modules::check_modules(None, true, &mut findings),
            None => modules::check_modules(None, false, &mut findings),
        };
    report.findings = findings.list;
    // Wrong modules do not concern the other tools.
    let mut errors = serving::checks_with_errors(report);
    errors.retain(|check| *check != "sentence-transformers");
    let config = model.config.as_ref();
    report.tools =
        serving::tools_for_model(&Served { recipe, config, layout, has_modules, errors });
}

fn check_adapter<B: Backend>(
    backend: &B,
    listing: &Listing,
    mut findings: Findings<'_>,
    options: &CheckOptions<'_>,
    report: &mut Report,
) {
    let dir = findings.dir;
    let adapter = adapter::check_files(&mut findings, options.on_bytes);
    let base = options.base.map(|base| Model::check(base, &mut findings));
    let config = base.as_ref().and_then(|base| base.config.as_ref());
    let fits = adapter.as_ref().is_some_and(|adapter| {
        adapter::check_recorded_base(adapter, base.is_some(), &mut findings);
        adapter::check_fit(adapter, config, &mut findings)
    });
    // The base model's, with the vocabulary that it has with the adapter.
    let vocab_size = adapter.as_ref().map_or(0, AdapterFiles::vocab_size);
    let with_adapter = config.map(|config| config.with_vocab_size(vocab_size));
    let own_tokenizer = matches!(adapter_tokenizer(dir), Ok(Some(_)) | Err(_));
    let tokenizer = match own_tokenizer {
        true => tokens::check_tokenizer(dir, with_adapter.as_ref(), &mut findings),
        false => base.as_ref().and_then(|base| base.tokenizer.clone()),
    };
    let recipe = tokens::check_recipe(dir, &mut findings);
    let prompts = match (&with_adapter, tokenizer, &recipe) {
        (Some(config), Some(tokenizer), Some(recipe)) => {
            tokens::check_template(recipe, tokenizer, config, &mut findings)
        }
        _ => None,
    };
    let damaged = findings.has_errors(&["weights", "adapter"]);
    let encoder = match (&base, &with_adapter, &adapter, &prompts, &recipe) {
        (Some(base), Some(config), Some(adapter), Some(prompts), Some((recipe, true)))
            if fits && base.weights.complete && !damaged =>
        {
            let weights = &base.weights.files;
            Some(Encoder { config, weights, adapter: Some(adapter), prompts, recipe })
        }
        _ => None,
    };
    if base.is_some() {
        let is_saved = recipe.as_ref().is_some_and(|(_, saved)| *saved);
        let sink = (is_saved && !listing.is_checkpoint, &mut findings);
        check_probes(backend, dir, encoder.as_ref(), sink, options.on_bytes);
    }
    report.findings = findings.list;
    let recipe = recipe.as_ref().filter(|(_, saved)| *saved).map(|(recipe, _)| recipe);
    let errors = serving::checks_with_errors(report);
    let served = Served { recipe, config, layout: None, has_modules: false, errors };
    let recorded =
        adapter.as_ref().and_then(|adapter: &AdapterFiles| adapter.recorded_base.as_deref());
    let rows = serving::TokenRows {
        needed: vocab_size,
        of_base: config.map(|config| config.decoder.vocab_size),
        own_tokenizer,
    };
    report.tools = serving::tools_for_adapter(&served, recorded, &rows);
}

/// What sentence-transformers can express of a recipe, or what prevents it.
fn layout(
    recipe: Option<&Recipe>,
    prompts: Option<&PromptEncoder>,
) -> Option<Result<StLayout, Vec<Obstacle>>> {
    StLayout::new(recipe?, prompts?).ok()
}

/// The parts of a model folder that could be read.
struct Model {
    config: Option<Config>,
    weights: Weights,
    tokenizer: Option<TextTokenizer>,
}

impl Model {
    /// Checks all but the values of the weights.
    fn check(dir: &Path, findings: &mut Findings<'_>) -> Self {
        let config = check_config(dir, findings);
        let weights = weights::check_layout(dir, config.as_ref(), findings);
        let tokenizer = tokens::check_tokenizer(dir, config.as_ref(), findings);
        Model { config, weights, tokenizer }
    }

    fn prompts(
        &self,
        recipe: Option<&(Recipe, bool)>,
        findings: &mut Findings<'_>,
    ) -> Option<PromptEncoder> {
        let (config, tokenizer) = (self.config.as_ref()?, self.tokenizer.clone()?);
        tokens::check_template(recipe?, tokenizer, config, findings)
    }
}
