//! Embedding texts on all processes of a group, each a part of every block.

use std::cell::Cell;
use std::ops::Range;

use ndarray::Array2;

use super::{Embedder, TextEmbedder};
use crate::backend::Backend;
use crate::dist::Collective;
use crate::text::Role;
use crate::{Error, ErrorKind, Result};

/// Embeds texts with the model of every process. An embedding does not depend on the texts that are encoded with it,
/// so the result is that of one process. Every process calls it with the same texts.
pub struct SharedEmbedder<'e, 'm, B: Backend> {
    /// The embedder of this process.
    pub inner: &'e TextEmbedder<'m, B>,
    /// The group of all processes.
    pub collective: &'e dyn Collective<B>,
    /// Whether this process was told to stop, which makes `inner` fail. Set to whether any was.
    pub stopped: &'e Cell<bool>,
    /// Number of texts that were embedded by all processes. `inner` adds those of this process while a block is embedded;
    /// after the block it is set to the number of all.
    pub done: &'e Cell<usize>,
}

impl<B: Backend> SharedEmbedder<'_, '_, B> {
    /// The texts that a rank embeds of so many.
    fn part(&self, texts: usize, rank: usize) -> Range<usize> {
        let start = |rank: usize| texts * rank / self.collective.size();
        start(rank)..start(rank + 1)
    }
}

impl<B: Backend> Embedder for SharedEmbedder<'_, '_, B> {
    fn dimension(&self) -> usize {
        self.inner.dimension()
    }

    fn embed(&self, role: Role, texts: &[String]) -> Result<Array2<f32>> {
        if self.collective.size() == 1 {
            return self.inner.embed(role, texts);
        }
        let before = self.done.get();
        let part = self.part(texts.len(), self.collective.rank());
        let (own, status) = match self.inner.embed(role, &texts[part]) {
            Ok(own) => (own, Ok(())),
            Err(_) if self.stopped.get() => (Array2::zeros((0, 0)), Ok(())),
            Err(error) => (Array2::zeros((0, 0)), Err(error)),
        };
        self.collective.agree(status)?;
        let mut wish = [f64::from(u8::from(self.stopped.get()))];
        self.collective.all_reduce_scalars(&mut wish)?;
        self.stopped.set(wish[0] > 0.0);
        if self.stopped.get() {
            return Err(Error::new(ErrorKind::Backend, "embedding was stopped"));
        }
        let (backend, dimension) = (self.inner.model.backend(), self.dimension());
        let values = own.as_standard_layout();
        let own = backend.upload(values.as_slice().unwrap_or_default(), own.nrows(), dimension)?;
        let counts: Vec<usize> =
            (0..self.collective.size()).map(|rank| self.part(texts.len(), rank).len()).collect();
        let all = backend.download(&self.collective.all_gather_rows(own, &counts)?)?;
        self.done.set(before + texts.len());
        Array2::from_shape_vec((texts.len(), dimension), all)
            .map_err(|e| Error::new(ErrorKind::Backend, "embeddings of the wrong shape").because(e))
    }
}
