//! Loading a bi-encoder from a model folder, and saving it as one.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::adapter::{adapter_tokenizer, vocab_size_with_adapter};
use super::card::model_card;
use super::staged::{StagedFolder, keep_unverified};
use super::{BiEncoderModel, BiEncoderOptions, Parts, Probes, Recipe, StLayout};
use crate::backend::{Backend, Cpu, Dtype, Shape};
use crate::model::weights::{ModelFolder, SaveDtype, WeightFiles};
use crate::model::{DecoderConfig, ParameterValues};
use crate::storage::{CARD_FILE, Staging, WrittenFile, finish_interrupted, rounded};
use crate::text::{PromptEncoder, Template, TextTokenizer};
use crate::{Error, ErrorKind, Result};

impl BiEncoderModel<Cpu> {
    /// Loads a model folder on the CPU, with the template that it was trained with (LLARA's, where the
    /// folder does not say).
    pub fn from_folder(dir: impl AsRef<Path>, options: BiEncoderOptions) -> Result<Self> {
        Loader::new(dir.as_ref())?.load(Cpu::new(), options)
    }
}

/// What to change about a model folder while loading it.
pub struct Loader<'d> {
    dir: &'d Path,
    recipe: Recipe,
    add_special_tokens: bool,
    vocabulary_in_adapter: bool,
    adapter: Option<&'d Path>,
    matrices: Dtype,
    head: bool,
}

impl<'d> Loader<'d> {
    /// Takes the folder's own recipe, or LLARA's.
    ///
    /// A save into this folder that was interrupted after its model was complete is finished first.
    ///
    /// # Errors
    /// When the recipe is damaged, or an interrupted save cannot be finished.
    pub fn new(dir: &'d Path) -> Result<Self> {
        if !dir.join("config.json").exists() {
            finish_interrupted(dir)?;
        }
        let recipe = match Recipe::read(dir)? {
            Some(recipe) => recipe,
            None => Recipe::new(Template::preset("llara")?),
        };
        Ok(Loader {
            dir,
            recipe,
            add_special_tokens: false,
            vocabulary_in_adapter: false,
            adapter: None,
            matrices: Dtype::F32,
            head: false,
        })
    }

    /// The recipe that will be used.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Uses another recipe, such as that of an adapter.
    pub fn with_recipe(mut self, recipe: Recipe) -> Self {
        self.recipe = recipe;
        self
    }

    /// Uses another template.
    pub fn template(mut self, template: Template) -> Self {
        self.recipe.template = template;
        self
    }

    /// Adds tokens that the template needs and the tokenizer lacks, with new rows in the vocabulary.
    pub fn add_special_tokens(mut self, add: bool) -> Self {
        self.add_special_tokens = add;
        self
    }

    /// Leaves the embedding table as it is: the rows of added tokens are those of an adapter that is attached
    /// after loading. Until then, texts with these tokens cannot be encoded.
    pub fn vocabulary_in_adapter(mut self, on: bool) -> Self {
        self.vocabulary_in_adapter = on;
        self
    }

    /// Prepares for an adapter that is attached after loading: uses the tokenizer of its folder, if it has one,
    /// and the vocabulary of the adapter.
    pub fn with_adapter(mut self, adapter: &'d Path) -> Self {
        self.adapter = Some(adapter);
        self.vocabulary_in_adapter(true)
    }

    /// Stores the weights' matrices as bf16 from the start, in half the memory, for a model that encodes
    /// or learns by adapters alone. Exact where the folder has bf16.
    pub fn matrices(mut self, dtype: Dtype) -> Self {
        self.matrices = dtype;
        self
    }

    /// Also loads the language-model head, for pretraining.
    pub fn language_model_head(mut self, load: bool) -> Self {
        self.head = load;
        self
    }

    /// Reads all but the weights.
    ///
    /// # Errors
    /// When a file is missing, damaged, or does not fit the others; see [`ErrorKind`].
    pub fn outline(&self) -> Result<Outline> {
        if !self.dir.is_dir() {
            return Err(Error::new(ErrorKind::Io, "there is no such model folder")
                .file(self.dir)
                .hint("give a folder as `save_pretrained` writes it"));
        }
        let mut decoder = DecoderConfig::from_file(&self.dir.join("config.json"))?;
        let mut own_tokenizer = None;
        if let Some(adapter) = self.adapter {
            decoder.vocab_size = vocab_size_with_adapter(&decoder, adapter)?;
            own_tokenizer = adapter_tokenizer(adapter)?;
        }
        let mut tokenizer = match own_tokenizer {
            Some(tokenizer) => tokenizer,
            None => TextTokenizer::from_folder(self.dir)?,
        };
        let added_tokens = match self.add_special_tokens {
            true => self.add_tokens(&mut tokenizer, decoder.vocab_size)?,
            false => Vec::new(),
        };
        if let Some(last) = added_tokens.last() {
            decoder.vocab_size = decoder.vocab_size.max(*last as usize + 1);
        }
        let template = self.recipe.template.clone();
        let prompts = PromptEncoder::new(tokenizer, template, decoder.vocab_size)?;
        Ok(Outline { decoder, prompts: Arc::new(prompts), added_tokens })
    }

    /// Adds the template's special tokens. Returns the ids, ascending, of those that are new and of all tokens
    /// beyond a vocabulary of `rows`: none of them has a trained embedding.
    fn add_tokens(&self, tokenizer: &mut TextTokenizer, rows: usize) -> Result<Vec<u32>> {
        let tokens = self.recipe.template.special_tokens();
        let new: Vec<&String> =
            tokens.iter().filter(|token| tokenizer.token_id(token).is_none()).collect();
        tokenizer.add_special_tokens(&tokens)?;
        let new = new.into_iter().filter_map(|token| tokenizer.token_id(token));
        let beyond = rows as u32..(tokenizer.vocab_size().max(rows)) as u32;
        let mut ids: Vec<u32> = new.chain(beyond).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Reads everything.
    ///
    /// # Errors
    /// When a file is missing, damaged, or does not fit the others; see [`ErrorKind`].
    pub fn load<B: Backend>(
        self,
        backend: B,
        options: BiEncoderOptions,
    ) -> Result<BiEncoderModel<B>> {
        let outline = self.outline()?;
        self.load_weights(outline, backend, options)
    }

    /// Reads what an [`outline`](Loader::outline) of the same folder lacks.
    ///
    /// # Errors
    /// When a file is missing, damaged, or does not fit the others; see [`ErrorKind`].
    pub fn load_weights<B: Backend>(
        self,
        outline: Outline,
        backend: B,
        options: BiEncoderOptions,
    ) -> Result<BiEncoderModel<B>> {
        let (folder, mut decoder) = ModelFolder::load(&backend, self.dir, self.matrices)?;
        if self.head {
            folder.load_head(&backend, &mut decoder)?;
        }
        if !self.vocabulary_in_adapter {
            decoder.grow_vocabulary(&backend, outline.decoder.vocab_size)?;
        }
        let (prompts, recipe) = (outline.prompts, self.recipe);
        BiEncoderModel::new(Parts { backend, decoder, folder, prompts, recipe }, options)
    }
}

/// What is known of a model before its weights are read.
#[derive(Clone)]
pub struct Outline {
    /// The decoder's sizes, with the vocabulary that it will have.
    pub decoder: DecoderConfig,
    /// Tokenizer and template.
    pub prompts: Arc<PromptEncoder>,
    /// Ids of the tokens that were added, and of others without a row in the embedding table, ascending.
    pub added_tokens: Vec<u32>,
}

impl<B: Backend> BiEncoderModel<B> {
    /// Saves a complete model folder in the form that it was loaded in, and verifies it: every tensor is
    /// read back and compared with the rounded weights, tokenizer and recipe are loaded again, and the
    /// embeddings of a few probe texts, which stay in the folder, are compared. This needs the memory
    /// of one layer's weights.
    ///
    /// Files appear together or not at all, `config.json` last. A model card, `README.md`, is among them,
    /// unless the folder has one that a user wrote or edited; and the files of sentence-transformers, if it can
    /// express the recipe. An earlier model in `dir` is replaced;
    /// it is removed when the new one is in place.
    ///
    /// # Errors
    /// When an adapter is attached, when a file cannot be written, or when the folder does not give
    /// the embeddings that this model gives. In the last case the folder is kept as
    /// `DIR.unverified-N`, and an earlier model in `dir` stays as it was.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.save_as(dir.as_ref(), SaveDtype::AsLoaded)
    }

    /// [`save`](Self::save) with the weights in another number format.
    pub fn save_as(&self, dir: &Path, dtype: SaveDtype) -> Result<()> {
        let StagedFolder { staging, written } = self.stage(dir, dtype)?;
        let verified = self.verify(staging.path(), &written, dtype);
        match verified.and_then(|probes| probes.write(&staging)) {
            Ok(()) => staging.commit(),
            Err(error) => Err(keep_unverified(staging, error)),
        }
    }

    /// Bytes that [`save_as`](Self::save_as) writes, within some kilobytes.
    pub fn saved_bytes(&self, dtype: SaveDtype) -> Result<u64> {
        let tokenizer = self.prompts.tokenizer().contents()?.len() as u64;
        Ok(self.folder.saved_bytes(&self.decoder, dtype) + tokenizer)
    }

    /// Writes the files to a hidden folder inside `dir`.
    pub(crate) fn stage(&self, dir: &Path, dtype: SaveDtype) -> Result<StagedFolder> {
        if self.adapter.is_some() {
            return Err(Error::new(
                ErrorKind::Argument,
                "a model with an adapter attached cannot be saved as a whole",
            )
            .file(dir)
            .hint("save the adapter alone with `save_adapter`, or add it to the weights with `merge_adapter` first"));
        }
        let staging = Staging::new(dir, "config.json")?;
        let written = self.folder.write(&self.backend, &self.decoder, dtype, &staging)?;
        self.prompts.tokenizer().save(staging.path())?;
        staging.write(super::recipe::RECIPE_FILE, &self.recipe.to_json()?)?;
        if let Ok(layout) = StLayout::new(&self.recipe, &self.prompts)? {
            for (name, contents) in layout.files(self.dimension()) {
                staging.write(name, contents.as_bytes())?;
            }
        }
        staging.write(CARD_FILE, model_card(self)?.as_bytes())?;
        Ok(StagedFolder { staging, written })
    }

    /// Compares a staged folder with this model; returns the probes of the folder.
    fn verify(&self, dir: &Path, written: &[WrittenFile], dtype: SaveDtype) -> Result<Probes> {
        written.iter().try_for_each(|file| file.verify(dir))?;

        let differs = |file: &str| {
            Error::new(ErrorKind::Config, "the saved file does not say what the model says")
                .file(dir.join(file))
        };
        let loader = Loader::new(dir)?;
        let outline = loader.outline()?;
        if *loader.recipe() != self.recipe {
            return Err(differs(super::recipe::RECIPE_FILE));
        }
        if outline.decoder != *self.decoder.config() {
            return Err(differs("config.json"));
        }

        let backend = &self.backend;
        let files = WeightFiles::open(dir)?;
        let saved = Probes::take_streamed(self, &mut |name, _| {
            files.values(&self.folder.name_in_files(name), Dtype::F32)
        })?;
        saved.check_tokens(&outline.prompts, loader.recipe())?;
        let tensors: HashMap<_, _> =
            self.decoder.tensors().map(|tensor| (tensor.name().to_owned(), tensor)).collect();
        let in_memory = Probes::take_streamed(self, &mut |name, _| {
            let Some(tensor) = tensors.get(name) else {
                return Err(Error::new(ErrorKind::Weights, format!("there is no weight `{name}`")));
            };
            let in_files = self.folder.name_in_files(name);
            let dtype = written.iter().find_map(|file| file.dtype(&in_files));
            let (values, _) = self.folder.exact_values(backend, tensor)?;
            let dtype = dtype.unwrap_or(safetensors::Dtype::F32);
            Ok(ParameterValues::F32(rounded(values, dtype)))
        })?;
        in_memory.compare_with(&saved)?;
        let in_f32 = self.decoder.parameters().all(|p| p.values().dtype() == Dtype::F32);
        if self.folder.keeps_f32(dtype) && in_f32 && self.precision() == Dtype::F32 {
            // The same by the pass that training and encoding use.
            Probes::take(self)?.compare_with(&saved)?;
        }
        Ok(saved)
    }
}
