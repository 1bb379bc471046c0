//! Comparison with the numbers of the reference's pretraining: ids, targets, losses, every gradient and several AdamW
//! steps, for six families.
//!
//! The numbers are not part of the project. Give the folder with one folder of numbers per family, the folder of the
//! models, and the rows:
//! `LLARA_GOLDEN_PRETRAINING=numbers:models:rows.jsonl cargo test --test golden_pretraining`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llara::backend::{Backend, Cpu};
use llara::data::PretrainingRow;
use llara::dist::Solo;
use llara::text::StopWords;
use llara::train::{
    AdamW, AdamWConfig, Chunking, LossWeights, PretrainingEncoder, PretrainingInput,
    PretrainingLoss, PretrainingOptions, accumulate_pretraining_gradients,
};
use llara::{BiEncoderModel, BiEncoderOptions, Loader};
use safetensors::SafeTensors;
use serde_json::Value;

const FAMILIES: [&str; 6] = ["llama-mha", "llama-gqa", "llama3-rope", "mistral", "qwen2", "qwen3"];
/// Rows of a step, of which there are ten.
const BATCH: usize = 3;
const ROWS: usize = 10;

/// One family's model and numbers.
struct Golden {
    model: PathBuf,
    rows: Vec<PretrainingRow>,
    tensors: BTreeMap<String, Vec<f64>>,
    json: Value,
}

fn on_all(check: impl Fn(&str, &Golden)) {
    let Ok(named) = std::env::var("LLARA_GOLDEN_PRETRAINING") else {
        println!("skipped: LLARA_GOLDEN_PRETRAINING is not set");
        return;
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let parts: Vec<PathBuf> = named.split(':').map(|part| workspace.join(part)).collect();
    let [numbers, models, rows] = &parts[..] else {
        panic!("LLARA_GOLDEN_PRETRAINING=numbers:models:rows.jsonl");
    };
    let text = std::fs::read(rows).unwrap();
    for family in FAMILIES {
        let dir = numbers.join(family);
        let json: Value =
            serde_json::from_slice(&std::fs::read(dir.join("golden_pretrain.json")).unwrap())
                .unwrap();
        let lines = text.split(|&byte| byte == b'\n').zip(json["words_kept"].as_array().unwrap());
        let rows = lines.map(|(line, kept)| {
            let row = PretrainingRow::parse(line, rows, 1).unwrap();
            let kept = |i: usize| kept[i].as_u64().unwrap() as usize;
            PretrainingRow {
                input: first_words(&row.input, kept(0)),
                summary: first_words(&row.summary, kept(0)),
                next: first_words(&row.next, kept(1)),
            }
        });
        let golden = Golden {
            model: models.join(family),
            rows: rows.collect(),
            tensors: tensors(&dir.join("golden_pretrain.safetensors")),
            json,
        };
        check(family, &golden);
    }
}

/// The first words, joined by blanks, with the white space at the end of the text; 0: the whole text.
fn first_words(text: &str, count: usize) -> String {
    if count == 0 {
        return text.to_owned();
    }
    let words: Vec<&str> = text.split_whitespace().take(count).collect();
    words.join(" ") + &text[text.trim_end().len()..]
}

fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |view: &safetensors::tensor::TensorView<'_>| -> Vec<f64> {
        match view.dtype() {
            safetensors::Dtype::I64 => {
                view.data().as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect()
            }
            safetensors::Dtype::F32 => {
                let numbers = view.data().as_chunks().0.iter();
                numbers.map(|&b| f64::from(f32::from_le_bytes(b))).collect()
            }
            _ => Vec::new(),
        }
    };
    file.iter().map(|(name, view)| (name.to_owned(), values(&view))).collect()
}

impl Golden {
    fn model(&self) -> BiEncoderModel {
        let loader = Loader::new(&self.model).unwrap().language_model_head(true);
        loader.load(Cpu::new(), BiEncoderOptions::default()).unwrap()
    }

    fn options(&self) -> PretrainingOptions {
        let cutoff_len = self.json["cutoff_len"].as_u64().unwrap() as usize;
        PretrainingOptions { cutoff_len, ..PretrainingOptions::default() }
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.json[name].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }
}

fn encoder(model: &BiEncoderModel, options: &PretrainingOptions) -> PretrainingEncoder {
    let prompts = llara::text::PromptEncoder::new(
        model.prompts().tokenizer().clone(),
        model.prompts().template().clone(),
        model.decoder().config().vocab_size,
    );
    PretrainingEncoder::new(Arc::new(prompts.unwrap()), options).unwrap()
}

/// Losses in the order of the reference: LM, EBAE, EBAR, total.
fn losses(
    model: &mut BiEncoderModel,
    rows: &[PretrainingRow],
    options: &PretrainingOptions,
) -> Vec<f64> {
    let encoder = encoder(model, options);
    let rows: Vec<_> = rows.iter().map(|row| encoder.encode(row).unwrap()).collect();
    let input = PretrainingInput::new(&rows, encoder.pooled_tokens(), None).unwrap();
    let loss = PretrainingLoss { weights: LossWeights::default(), collective: Arc::new(Solo) };
    let chunking = Chunking::default();
    let losses =
        accumulate_pretraining_gradients(model, &loss, &input, &chunking, &mut ()).unwrap();
    let losses = Cpu::download(model.backend(), &losses).unwrap();
    [1, 2, 3, 0].map(|i: usize| f64::from(losses[i])).to_vec()
}

#[track_caller]
fn within(what: &str, got: f64, bound: f64) {
    println!("{what}: {got:.2e} of {bound:.0e}");
    assert!(got <= bound, "{what}: {got:.3e} exceeds {bound:.0e}");
}

fn check_losses(what: &str, got: &[f64], want: &[f64], bound: f64) {
    for (name, (got, want)) in ["LM", "EBAE", "EBAR", "total"].iter().zip(got.iter().zip(want)) {
        within(&format!("{what} {name}"), (got - want).abs() / want.abs().max(1e-30), bound);
    }
}

/// Norm of the difference, divided by the norm of the expected values.
fn relative_norm(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    square(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - b))
        / square(&mut want.iter().copied()).max(1e-30)
}

fn name_in_files(name: &str) -> String {
    if name == "lm_head.weight" { name.to_owned() } else { format!("model.{name}") }
}

#[test]
fn sequences_and_targets() {
    on_all(|family, golden| {
        let model = golden.model();
        let encoder = encoder(&model, &golden.options());
        let length = golden.tensors["input_ids"].len() / BATCH;
        let suffixes = ["summarize_suffix_ids", "predict_suffix_ids"].map(|name| golden.ids(name));
        let targets = ["targets_summarize", "targets_predict"].map(|name| {
            golden.json[name].as_array().unwrap().iter().map(|row| {
                row.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
            })
        });
        let mut targets = targets.map(|rows| rows.collect::<Vec<Vec<u32>>>());
        targets.iter_mut().flatten().for_each(|ids| ids.sort_unstable());
        for (i, row) in golden.rows[..BATCH].iter().enumerate() {
            let of_row = |name: &str| {
                golden.tensors[name][i * length..(i + 1) * length].iter().map(|&x| x as i64)
            };
            let real = of_row("input_ids").zip(of_row("attention_mask"));
            let ids: Vec<u32> =
                real.filter(|(_, mask)| *mask == 1).map(|(id, _)| id as u32).collect();
            let text = &ids[..ids.len() - suffixes[0].len() - suffixes[1].len()];
            let sequences = encoder.encode(row).unwrap();
            assert_eq!(sequences.len(), 2, "{family} row {i}");
            for (sequence, (suffix, targets)) in sequences.iter().zip(suffixes.iter().zip(&targets))
            {
                assert_eq!(sequence.ids, [text, suffix].concat(), "{family} row {i}");
                assert_eq!(sequence.targets, targets[i], "{family} row {i}");
            }
            let labels: Vec<u32> = of_row("labels").filter(|&l| l >= 0).map(|l| l as u32).collect();
            assert_eq!(sequences[0].ids[sequences[0].labels.clone()], labels, "{family} row {i}");
            assert!(sequences[1].labels.is_empty());
        }
    });
}

#[test]
fn losses_and_every_gradient() {
    on_all(|family, golden| {
        let mut model = golden.model();
        let got = losses(&mut model, &golden.rows[..BATCH], &golden.options());
        let want: Vec<f64> = ["language_model", "auto_encode", "auto_regress", "total"]
            .iter()
            .flat_map(|name| golden.tensors[&format!("loss.{name}")].clone())
            .collect();
        check_losses(family, &got, &want, 1e-5);
        let mut seen = 0;
        for tensor in model.decoder().tensors() {
            let grad = model.backend().download_view(tensor.grad().unwrap()).unwrap();
            let name = format!("grad.{}", name_in_files(tensor.name()));
            let want = &golden.tensors[&name];
            within(&format!("{family} {name}"), relative_norm(&grad, want), 1e-4);
            seen += 1;
        }
        assert_eq!(seen, golden.tensors.keys().filter(|name| name.starts_with("grad.")).count());
    });
}

#[test]
fn stop_words_and_missing_targets() {
    on_all(|family, golden| {
        let words = golden.json["stop_words"].as_array().unwrap();
        let stop_words = Some(StopWords::new(words.iter().map(|word| word.as_str().unwrap())));
        let rows = &golden.rows[..BATCH];
        let without = |without: &dyn Fn(usize) -> bool| -> Vec<PretrainingRow> {
            let clear = |(i, row): (usize, &PretrainingRow)| match without(i) {
                true => PretrainingRow { next: String::new(), ..row.clone() },
                false => row.clone(),
            };
            rows.iter().enumerate().map(clear).collect()
        };
        for (case, rows, stop_words) in [
            ("stop", rows.to_vec(), stop_words),
            ("empty", without(&|i| i == 1), None),
            ("none", without(&|_| true), None),
        ] {
            let options = PretrainingOptions { stop_words, ..golden.options() };
            let mut got = losses(&mut golden.model(), &rows, &options);
            if case == "none" {
                // A term without targets has no value here; it is 0 in the reference.
                assert!(got[2].is_nan(), "{family} {case}: {got:?}");
                got[2] = 0.0;
            }
            let want = &golden.tensors[&format!("{case}.losses")];
            check_losses(&format!("{family} {case}"), &got, want, 1e-5);
        }
    });
}

#[test]
fn adamw_steps() {
    on_all(|family, golden| {
        let mut model = golden.model();
        let backend = model.backend().clone();
        let mut optimizer =
            AdamW::new(&backend, model.decoder_mut(), AdamWConfig::default()).unwrap();
        for (step, want) in golden.tensors["steps"].chunks_exact(5).enumerate() {
            let rows: Vec<PretrainingRow> =
                (0..BATCH).map(|i| golden.rows[(BATCH * step + i) % ROWS].clone()).collect();
            let got = losses(&mut model, &rows, &golden.options());
            let clip = optimizer.step(&backend, model.decoder_mut(), 1e-3).unwrap();
            let norm = f64::from(backend.download(&clip).unwrap()[0]);
            check_losses(&format!("{family} step {step}"), &got, &want[..4], 5e-5);
            within(&format!("{family} step {step} norm"), (norm - want[4]).abs() / want[4], 2e-4);
        }
        for tensor in model.decoder().tensors() {
            let value = backend.download_view(tensor.values()).unwrap();
            let name = format!("final.{}", name_in_files(tensor.name()));
            within(
                &format!("{family} {name}"),
                relative_norm(&value, &golden.tensors[&name]),
                1e-4,
            );
        }
    });
}
