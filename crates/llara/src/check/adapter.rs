//! An adapter: its configuration and matrices, and whether they fit the base model.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use super::config::Config;
use super::report::{Finding, Findings, Status};
use super::weights::scan_file;
use crate::Result;
use crate::biencoder::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterConfig, TokenNames, prefix_in_adapter,
};
use crate::storage::{SafetensorsFile, is_readable, read_limited};

const CHECK: &str = "adapter";
/// Largest `adapter_config.json`, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// An adapter whose configuration and file can be read.
pub(super) struct AdapterFiles {
    pub(super) config: AdapterConfig,
    /// `base_model_name_or_path`.
    pub(super) recorded_base: Option<String>,
    file: SafetensorsFile,
    prefix: &'static str,
}

impl AdapterFiles {
    /// A `[r, in]` and B `[out, r]` of a weight of the decoder, if the adapter has them.
    pub(super) fn matrices(&self, weight: &str) -> Result<Option<(Vec<f32>, Vec<f32>)>> {
        let [a, b] = self.names(weight);
        if self.file.info(&a).is_none() {
            return Ok(None);
        }
        Ok(Some((self.file.read_f32(&a)?, self.file.read_f32(&b)?)))
    }

    /// The base model's embedding table, row-major, with the embeddings of the adapter in it.
    pub(super) fn with_tokens(&self, mut table: Vec<f32>, hidden_size: usize) -> Result<Vec<f32>> {
        let names = self.token_names();
        let tokens = names.read(&self.config, hidden_size, &mut || Ok(table.clone()), None)?;
        tokens.place_in(&mut table);
        Ok(table)
    }

    /// One past the largest token id with an embedding in the adapter; 0 if it has none.
    pub(super) fn vocab_size(&self) -> usize {
        self.token_names().vocab_size(&self.config)
    }

    fn token_names(&self) -> TokenNames<'_> {
        TokenNames::new(&self.file, self.prefix, &self.config)
    }

    fn names(&self, weight: &str) -> [String; 2] {
        let module = weight.strip_suffix("weight").unwrap_or(weight);
        ["A", "B"].map(|part| format!("{}{module}lora_{part}.weight", self.prefix))
    }
}

/// Reads the adapter, with every value.
pub(super) fn check_files(
    findings: &mut Findings<'_>,
    on_bytes: &dyn Fn(u64),
) -> Option<AdapterFiles> {
    let dir = findings.dir;
    let config = AdapterConfig::read(dir);
    if let Err(error) = &config {
        findings.fail(CHECK, error);
    }
    let file = SafetensorsFile::open(&dir.join(ADAPTER_WEIGHTS_FILE));
    if let Err(error) = &file {
        findings.fail(CHECK, error);
    }
    if let Ok(file) = &file {
        scan_file(CHECK, file, findings, on_bytes);
    }
    let (Ok(config), Ok(file)) = (config, file) else { return None };
    findings.ok(
        CHECK,
        ADAPTER_CONFIG_FILE,
        format!(
            "rank {}, alpha {}, on {}",
            config.lora.rank,
            config.lora.alpha,
            config.lora.target_modules.join(", ")
        ),
    );
    let recorded_base = recorded_base(dir);
    let prefix = prefix_in_adapter(&file.names());
    Some(AdapterFiles { config, recorded_base, file, prefix })
}

fn recorded_base(dir: &Path) -> Option<String> {
    let text = read_limited(&dir.join(ADAPTER_CONFIG_FILE), "read", MAX_BYTES).ok()?;
    let json: Value = serde_json::from_slice(&text).ok()?;
    Some(json.get("base_model_name_or_path")?.as_str()?.to_owned())
}

/// Compares names and shapes with the base model; without one, the matrices with each other. Returns
/// whether they fit.
pub(super) fn check_fit(
    adapter: &AdapterFiles,
    base: Option<&Config>,
    findings: &mut Findings<'_>,
) -> bool {
    let before = findings.list.len();
    match base.map(|base| base.decoder.parameter_shapes()) {
        Some(Ok(shapes)) => {
            compare(adapter, &shapes, findings);
            if let Some(base) = base {
                let sizes = (base.decoder.vocab_size, base.decoder.hidden_size);
                compare_tokens(adapter, sizes, findings);
            }
        }
        Some(Err(error)) => findings.fail(CHECK, &error),
        None => {
            compare_with_itself(adapter, findings);
            let hidden_size = adapter.token_names().hidden_size();
            compare_tokens(adapter, (usize::MAX, hidden_size), findings);
        }
    }
    let fits = findings.list.len() == before;
    if fits {
        let tensors = adapter.file.names().len();
        let to = if base.is_some() { "the base model" } else { "the rank and the targets" };
        findings.ok(CHECK, ADAPTER_WEIGHTS_FILE, format!("{tensors} matrices fit {to}"));
    }
    fits
}

/// Compares the token embeddings with a base model of this vocabulary and hidden size.
fn compare_tokens(
    adapter: &AdapterFiles,
    (vocab_size, hidden_size): (usize, usize),
    findings: &mut Findings<'_>,
) {
    let names = adapter.token_names();
    let faults = names.faults(&adapter.config, hidden_size).into_iter().map(|fault| {
        let what = format!("the token embeddings do not fit: {fault}");
        Finding::new(Status::Error, CHECK, ADAPTER_WEIGHTS_FILE, what)
    });
    findings.push_many(faults.collect());
    if let Err(error) = names.check_gaps(&adapter.config, vocab_size) {
        findings.fail(CHECK, &error);
    }
}

fn location(name: &str) -> String {
    format!("{ADAPTER_WEIGHTS_FILE}: tensor `{name}`")
}

fn compare(adapter: &AdapterFiles, shapes: &[(String, Vec<usize>)], findings: &mut Findings<'_>) {
    const HINT: &str = "use the base model that the adapter was trained on";
    let (mut faults, mut known) = (Vec::new(), HashSet::new());
    let lora = &adapter.config.lora;
    let rank = lora.rank;
    for (weight, shape) in shapes {
        let module = weight.rsplit('.').nth(1).unwrap_or_default();
        let targeted = lora.target_modules.iter().any(|target| target == module);
        let ([rows, cols], true, true) = (shape.as_slice(), targeted, weight.ends_with(".weight"))
        else {
            continue;
        };
        for (name, expected) in
            adapter.names(weight).into_iter().zip([[rank, *cols], [*rows, rank]])
        {
            match adapter.file.info(&name) {
                None => faults.push(
                    Finding::new(
                        Status::Error,
                        CHECK,
                        &location(&name),
                        "the matrix is missing".into(),
                    )
                    .expected(format!("{expected:?}"))
                    .hint(HINT),
                ),
                Some(info) if info.shape != expected => faults.push(
                    Finding::new(
                        Status::Error,
                        CHECK,
                        &location(&name),
                        "the matrix has another shape".into(),
                    )
                    .expected(format!("{expected:?}"))
                    .got(format!("{:?}", info.shape))
                    .hint(HINT),
                ),
                Some(info) if !is_readable(info.dtype) => faults.push(
                    Finding::new(
                        Status::Error,
                        CHECK,
                        &location(&name),
                        "the matrix has an unsupported type".into(),
                    )
                    .expected("F32, F16 or BF16")
                    .got(format!("{:?}", info.dtype)),
                ),
                Some(_) => {}
            }
            known.insert(name);
        }
    }
    let tokens = adapter.token_names();
    let names = adapter.file.names();
    for name in names.iter().filter(|name| !known.contains(*name) && !tokens.contain(name)) {
        let what = "the tensor belongs to no target of the base model".into();
        faults.push(Finding::new(Status::Error, CHECK, &location(name), what).hint(HINT));
    }
    findings.push_many(faults);
}

/// Every tensor must be an A or a B of a target with the right rank, and have its counterpart.
fn compare_with_itself(adapter: &AdapterFiles, findings: &mut Findings<'_>) {
    let (lora, tokens) = (&adapter.config.lora, adapter.token_names());
    let (mut names, rank) = (adapter.file.names(), lora.rank);
    names.retain(|name| !tokens.contain(name));
    let set: HashSet<&str> = names.iter().map(String::as_str).collect();
    let (mut faults, mut found) = (Vec::new(), HashSet::new());
    for name in &names {
        let fault =
            |what: &str| Finding::new(Status::Error, CHECK, &location(name), what.to_owned());
        let parts = [("lora_A.weight", "lora_B.weight", 0), ("lora_B.weight", "lora_A.weight", 1)];
        let part = parts
            .iter()
            .find_map(|(own, other, dimension)| Some((name.strip_suffix(own)?, other, *dimension)));
        let Some((module, other, dimension)) = part else {
            faults.push(
                fault("the tensor is not a LoRA matrix")
                    .expected("…lora_A.weight or …lora_B.weight"),
            );
            continue;
        };
        let target = module.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
        found.insert(target.to_owned());
        if !lora.target_modules.iter().any(|known| known == target) {
            faults
                .push(fault("the matrix belongs to no target of adapter_config.json").got(target));
        }
        let shape = adapter.file.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        if shape.len() != 2 || shape.get(dimension) != Some(&rank) {
            let finding = fault("the matrix does not have the rank of adapter_config.json");
            faults.push(
                finding
                    .expected(format!("{rank} in dimension {dimension}"))
                    .got(format!("{shape:?}")),
            );
        }
        if adapter.file.info(name).is_some_and(|info| !is_readable(info.dtype)) {
            faults.push(fault("the matrix has an unsupported type").expected("F32, F16 or BF16"));
        }
        if !set.contains(&*format!("{module}{other}")) {
            faults
                .push(fault("the matrix has no counterpart").expected(format!("{module}{other}")));
        }
    }
    for target in lora.target_modules.iter().filter(|target| !found.contains(*target)) {
        let what = format!("there are no matrices for the target {target}");
        faults.push(Finding::new(Status::Error, CHECK, ADAPTER_WEIGHTS_FILE, what));
    }
    findings.push_many(faults);
}

/// What the configuration records of the base model.
pub(super) fn check_recorded_base(
    adapter: &AdapterFiles,
    given: bool,
    findings: &mut Findings<'_>,
) {
    let finding =
        |what: &str| Finding::new(Status::Warning, CHECK, ADAPTER_CONFIG_FILE, what.to_owned());
    match &adapter.recorded_base {
        None => findings.push(
            finding("the base model is not recorded")
                .expected("`base_model_name_or_path`")
                .hint("PEFT then needs the base model to be loaded first"),
        ),
        Some(base) if Path::new(base).is_absolute() => findings.push(
            finding("the base model is recorded as a path, which other machines do not have")
                .got(base)
                .hint("write the base model's name on the Hub to `base_model_name_or_path`"),
        ),
        Some(_) => {}
    }
    if !given {
        findings.push(
            finding("the adapter was not compared with its base model")
                .hint("give the base model with --model to check shapes, tokenizer and probes"),
        );
    }
}
