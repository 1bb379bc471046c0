//! Loading a bi-encoder from a model folder, and saving it as one.

use std::path::Path;
use std::sync::Arc;

use super::{BiEncoderModel, BiEncoderOptions, Parts, Probes, Recipe};
use crate::backend::{Backend, Cpu, Dtype};
use crate::model::DecoderConfig;
use crate::model::weights::{ModelFolder, SaveDtype};
use crate::storage::Staging;
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
    matrices: Dtype,
}

impl<'d> Loader<'d> {
    /// Takes the folder's own recipe, or LLARA's.
    pub fn new(dir: &'d Path) -> Result<Self> {
        let recipe = match Recipe::read(dir)? {
            Some(recipe) => recipe,
            None => Recipe::new(Template::preset("llara")?),
        };
        Ok(Loader { dir, recipe, add_special_tokens: false, matrices: Dtype::F32 })
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

    /// Stores the weights' matrices as bf16 from the start, in half the memory, for a model that encodes
    /// or learns by adapters alone. Exact where the folder has bf16.
    pub fn matrices(mut self, dtype: Dtype) -> Self {
        self.matrices = dtype;
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
        let mut tokenizer = TextTokenizer::from_folder(self.dir)?;
        if self.add_special_tokens {
            tokenizer.add_special_tokens(&self.recipe.template.special_tokens())?;
            decoder.vocab_size = decoder.vocab_size.max(tokenizer.vocab_size());
        }
        let template = self.recipe.template.clone();
        let prompts = PromptEncoder::new(tokenizer, template, decoder.vocab_size)?;
        Ok(Outline { decoder, prompts: Arc::new(prompts) })
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
        decoder.grow_vocabulary(&backend, outline.decoder.vocab_size)?;
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
}

impl<B: Backend> BiEncoderModel<B> {
    /// Saves a complete model folder in the form that it was loaded in, loads it again, and compares
    /// probe vectors; the probes stay in the folder.
    ///
    /// Files appear together or not at all, `config.json` last. An earlier model in `dir` is replaced.
    ///
    /// # Errors
    /// When a file cannot be written, or the folder does not give the vectors that this model gives.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.save_as(dir.as_ref(), SaveDtype::AsLoaded)
    }

    /// [`save`](Self::save) with the weights in another number format.
    pub fn save_as(&self, dir: &Path, dtype: SaveDtype) -> Result<()> {
        let staging = self.stage(dir, dtype)?;
        let probes = Probes::take(self)?;
        let mut reloaded = Loader::new(staging.path())?.load(self.backend.clone(), self.options)?;
        // What the folder answers in f32, the rounding of its weights included.
        Probes::take(&reloaded)?.write(&staging)?;
        reloaded.decoder.set_activations(self.precision());
        let exact = self.folder.keeps_f32(dtype);
        let same = if exact { probes.check(&reloaded) } else { probes.check_rounded(&reloaded) };
        same.map_err(|e| e.file(dir))?;
        staging.commit()
    }

    /// Saves the folder without loading it again, which would need the memory of a second model.
    pub fn write_folder(&self, dir: &Path, dtype: SaveDtype) -> Result<()> {
        self.stage(dir, dtype)?.commit()
    }

    fn stage(&self, dir: &Path, dtype: SaveDtype) -> Result<Staging> {
        let staging = Staging::new(dir, "config.json")?;
        self.folder.write(&self.backend, &self.decoder, dtype, &staging)?;
        self.prompts.tokenizer().save(staging.path())?;
        staging.write(super::recipe::RECIPE_FILE, &self.recipe.to_json()?)?;
        Ok(staging)
    }
}
