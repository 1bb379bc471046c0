//! The weights: names, shapes and types against the configuration, and every value.

use std::collections::BTreeMap;
use std::path::Path;

use super::config::Config;
use super::report::{Finding, Findings, Status};
use crate::model::weights::{Mismatch, WeightFiles, misfits, prefix_of};
use crate::storage::SafetensorsFile;

const CHECK: &str = "weights";

/// Weight files that can be read, and whether they are all of the model.
pub(super) struct Weights {
    pub(super) files: WeightFiles,
    /// Whether every tensor of the model is there in its shape.
    pub(super) complete: bool,
}

/// Opens the weights of `dir` and compares them with the configuration. Values are not read.
pub(super) fn check_layout(
    dir: &Path,
    config: Option<&Config>,
    findings: &mut Findings<'_>,
) -> Weights {
    let (files, faults) = WeightFiles::open_readable(dir);
    faults.iter().for_each(|error| findings.fail(CHECK, error));
    let mut complete = faults.is_empty() && config.is_some();
    // Of files that cannot be read all tensors would be missing.
    if let Some(config) = config.filter(|_| faults.is_empty()) {
        let file = files.path();
        let file = file.file_name().unwrap_or_default().to_string_lossy();
        match misfits(&files, &config.decoder) {
            Ok(misfits) => {
                complete &= misfits.is_empty();
                report_misfits(&files, &file, &misfits, findings);
            }
            Err(error) => {
                complete = false;
                findings.fail(CHECK, &error);
            }
        }
        check_head(&files, config, &file, findings);
        check_dtype(&files, config, findings);
    }
    Weights { files, complete }
}

/// Reads every value of every tensor, 4 MiB at a time.
pub(super) fn check_values(weights: &Weights, findings: &mut Findings<'_>, on_bytes: &dyn Fn(u64)) {
    let before = findings.list.len();
    let mut tensors = 0;
    for file in weights.files.files() {
        tensors += scan_file(CHECK, file, findings, on_bytes);
    }
    let same = findings.list.len() == before;
    if tensors > 0 && same && !findings.has_errors(&[CHECK]) {
        let file = weights.files.path();
        let file = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fit = if weights.complete { "fit config.json; " } else { "" };
        findings.ok(CHECK, &file, format!("{tensors} tensors {fit}all values are finite"));
    }
}

/// Reads every value of a file; returns the number of tensors.
pub(super) fn scan_file(
    check: &'static str,
    file: &SafetensorsFile,
    findings: &mut Findings<'_>,
    on_bytes: &dyn Fn(u64),
) -> usize {
    let names = file.names();
    let (mut not_finite, mut zero) = (Vec::new(), Vec::new());
    let name_of_file = file.path().file_name().unwrap_or_default().to_string_lossy();
    for name in &names {
        let Some(info) = file.info(name) else { continue };
        if !crate::storage::is_readable(info.dtype) {
            continue; // A misfit, or a buffer that is not read.
        }
        let is_matrix = info.shape.len() >= 2 && info.shape.iter().product::<usize>() > 0;
        let location = format!("{name_of_file}: tensor `{name}`");
        match file.scan(name, on_bytes) {
            Err(error) => findings.fail(check, &error),
            Ok(scan) => {
                if let Some((element, value)) = scan.first {
                    let what = format!("{} values are not finite", scan.not_finite);
                    let finding = Finding::new(Status::Error, check, &location, what);
                    let got = format!("{value} at element {element}");
                    let hint =
                        "the training run that wrote this file had diverged: use an earlier one";
                    not_finite.push(finding.expected("finite numbers").got(got).hint(hint));
                } else if is_matrix && !scan.has_nonzero {
                    let what = "all values are zero".to_owned();
                    zero.push(Finding::new(Status::Warning, check, &location, what).hint(
                        "the file may be incomplete or the part untrained: compare with the original",
                    ));
                }
            }
        }
    }
    findings.push_many(not_finite);
    findings.push_many(zero);
    names.len()
}

fn report_misfits(
    files: &WeightFiles,
    file: &str,
    misfits: &[Mismatch],
    findings: &mut Findings<'_>,
) {
    const HINT: &str = "config.json and the weights must come from the same export";
    let unmerged = |name: &str| name.contains(".lora_") || name.starts_with("base_model.");
    let by_kind = |kind: fn(&Mismatch) -> bool| misfits.iter().filter(move |m| kind(m));
    let location = |name: &str| {
        let path = files.file_of(name).map(SafetensorsFile::path);
        let file = path.and_then(Path::file_name).map_or(file.into(), |n| n.to_string_lossy());
        format!("{file}: tensor `{name}`")
    };
    let finding = |misfit: &Mismatch| match misfit {
        Mismatch::Missing { name, shape } => {
            Finding::new(Status::Error, CHECK, &location(name), "the tensor is missing".into())
                .expected(format!("{shape:?}"))
                .hint(HINT)
        }
        Mismatch::Shape { name, expected, got } => {
            let what = "the tensor has another shape than config.json gives it".into();
            Finding::new(Status::Error, CHECK, &location(name), what)
                .expected(format!("{expected:?}"))
                .got(format!("{got:?}"))
                .hint(HINT)
        }
        Mismatch::Dtype { name, got } => {
            let what = "the tensor has an unsupported type".into();
            Finding::new(Status::Error, CHECK, &location(name), what)
                .expected("F32, F16 or BF16")
                .got(got)
                .hint("export the model in one of these types")
        }
        Mismatch::Unknown { name } => {
            let what = "the tensor is not one of the model in config.json".into();
            let finding = Finding::new(Status::Error, CHECK, &location(name), what);
            finding.hint(match unmerged(name) {
                true => "an adapter was saved with the model: merge it with PEFT (merge_and_unload) first",
                false => HINT,
            })
        }
    };
    let kinds: [fn(&Mismatch) -> bool; 4] = [
        |m| matches!(m, Mismatch::Missing { .. }),
        |m| matches!(m, Mismatch::Shape { .. }),
        |m| matches!(m, Mismatch::Dtype { .. }),
        |m| matches!(m, Mismatch::Unknown { .. }),
    ];
    for kind in kinds {
        findings.push_many(by_kind(kind).map(finding).collect());
    }
}

/// A causal language model without a head loads with a random one.
fn check_head(files: &WeightFiles, config: &Config, file: &str, findings: &mut Findings<'_>) {
    let causal_lm = !prefix_of(files).is_empty();
    let has_head = files.info("lm_head.weight").is_some();
    if causal_lm && !has_head && !config.decoder.tie_word_embeddings {
        let what = "there is no lm_head.weight; it is not needed for embeddings, but \
                    AutoModelForCausalLM would use a random one";
        findings.push(Finding::new(Status::Warning, CHECK, file, what.to_owned()));
    }
}

/// transformers loads the weights in the type that config.json names.
fn check_dtype(files: &WeightFiles, config: &Config, findings: &mut Findings<'_>) {
    let json = &config.json;
    let named = json.get("dtype").or_else(|| json.get("torch_dtype")).and_then(|d| d.as_str());
    let mut bytes: BTreeMap<String, usize> = BTreeMap::new();
    for info in files.names().filter_map(|name| files.info(name)) {
        let (start, end) = info.data_offsets;
        let name = match format!("{:?}", info.dtype).as_str() {
            "F32" => "float32".to_owned(),
            "F16" => "float16".to_owned(),
            "BF16" => "bfloat16".to_owned(),
            other => other.to_owned(),
        };
        *bytes.entry(name).or_default() += end - start;
    }
    let most = bytes.iter().max_by_key(|(_, bytes)| **bytes).map(|(name, _)| name);
    if let (Some(named), Some(most)) = (named, most)
        && named != most
    {
        let what = "`dtype` of config.json is not the type of the weights".to_owned();
        let finding = Finding::new(Status::Warning, CHECK, "config.json", what);
        findings.push(finding.expected(most).got(named).hint(
            "tools that load in this type convert the weights, and embeddings change by rounding",
        ));
    }
}
