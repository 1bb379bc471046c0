//! Loading trained weights back from a folder that this model was saved to.

use std::path::Path;

use super::BiEncoderModel;
use crate::backend::{Backend, Dtype, Shape};
use crate::model::LoraConfig;
use crate::model::weights::{ModelFolder, SaveDtype};
use crate::{Error, ErrorKind, Result};

impl<B: Backend> BiEncoderModel<B> {
    /// Whether a folder or adapter saved with `dtype` contains all bits of the trained weights.
    pub(crate) fn saves_exactly(&self, dtype: SaveDtype) -> bool {
        self.adapter.is_some() || self.folder.keeps_f32(dtype)
    }

    /// Replaces the trainable weights by those in `dir`: those of the adapter, or all. The rest of the model does
    /// not change; [`source`](Self::source) is still the folder that it was loaded from.
    ///
    /// # Errors
    /// If a file is missing or damaged, or its weights do not have the shapes of the model.
    pub(crate) fn read_trained_weights(&mut self, dir: &Path) -> Result<()> {
        let Some(adapter) = self.adapter.take() else { return self.read_all_weights(dir) };
        let before = self.decoder.detach_adapters();
        let result = self.attach_saved(dir, Some(&adapter.trained_tokens));
        if result.is_err() {
            self.decoder.restore_adapters(before);
        }
        // The form in which token embeddings are saved may differ: it does not change them.
        let saved_tokens = adapter.saved_tokens;
        let read = self.adapter.replace(adapter);
        let read = read.map(|read| LoraConfig { saved_tokens, ..read });
        result?;
        match read == self.adapter {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Weights, "the adapter has other settings")
                .file(dir)
                .expected(format!("{:?}", self.adapter))
                .got(format!("{read:?}"))),
        }
    }

    fn read_all_weights(&mut self, dir: &Path) -> Result<()> {
        let backend = self.backend.clone();
        let (folder, mut saved) = ModelFolder::load(&backend, dir, Dtype::F32)?;
        if self.decoder.has_head() {
            folder.load_head(&backend, &mut saved)?;
        }
        let mut saved = saved.parameters_mut();
        for parameter in self.decoder.parameters_mut() {
            let fits = saved.next().filter(|other| {
                other.name() == parameter.name()
                    && other.values().shape() == parameter.values().shape()
            });
            let Some(other) = fits else {
                return Err(Error::new(ErrorKind::Weights, "the weights do not fit the model")
                    .tensor(dir, parameter.name())
                    .expected(format!("{:?}", parameter.values().shape())));
            };
            let values = other.take_values(&backend)?;
            parameter.set_values(&backend, values)?;
        }
        Ok(())
    }
}
