//! What has to travel with the weights so that a model answers when served as it did when trained.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::text::{Role, Template};
use crate::{Error, ErrorKind, Result};

/// The file of a model folder that holds the recipe.
pub(crate) const RECIPE_FILE: &str = "llara.json";

/// Template, lengths and normalisation, saved in the model folder as `llara.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What is put around texts, and how many trailing tokens are averaged.
    pub template: Template,
    /// Whether vectors are brought to length 1.
    pub normalized: bool,
    /// Tokens that a query with its template is cut to.
    pub query_max_len: usize,
    /// Tokens that a passage with its template is cut to.
    pub passage_max_len: usize,
}

impl Recipe {
    /// The reference's lengths and normalisation with this template.
    pub fn new(template: Template) -> Self {
        Recipe { template, normalized: true, query_max_len: 32, passage_max_len: 128 }
    }

    /// The length for a role.
    pub fn max_len(&self, role: Role) -> usize {
        match role {
            Role::Query => self.query_max_len,
            Role::Passage => self.passage_max_len,
        }
    }

    /// The recipe in a model folder, if it has one.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(RECIPE_FILE);
        let text = match crate::storage::read_file(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|e| Error::io("read the recipe", &path, e))?,
        };
        let recipe: Recipe = serde_json::from_slice(&text).map_err(|e| {
            Error::new(ErrorKind::Config, "not a recipe")
                .file(&path)
                .because(e)
                .hint("remove the file to go by the command line alone")
        })?;
        recipe.template.validate().map_err(|e| e.file(&path))?;
        Ok(Some(recipe))
    }

    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(ErrorKind::Config, "cannot write the recipe").because(e))?;
        text.push(b'\n');
        Ok(text)
    }
}
