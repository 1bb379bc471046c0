//! `llara.json`: the settings with which a model must encode texts, as in training.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::data::Instructions;
use crate::text::{PromptEncoder, Role, Template};
use crate::{Error, ErrorKind, Result};

/// The file of a model folder that contains the recipe.
pub(crate) const RECIPE_FILE: &str = "llara.json";

/// Template, lengths, instructions and normalization, saved in the model folder as `llara.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The text around queries and passages, and the number of trailing tokens that are averaged.
    pub template: Template,
    /// Whether embeddings are L2-normalized.
    pub normalized: bool,
    /// Maximum length of a query in tokens, template included.
    pub query_max_len: usize,
    /// Maximum length of a passage in tokens, template included.
    pub passage_max_len: usize,
    /// Text prepended to every query that has no instruction in the data.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub query_instruction: String,
    /// Text prepended to every passage.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub passage_instruction: String,
    /// The instructions of the tasks that the model was trained on, by name. They replace the instructions above
    /// for texts of the task.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, Instructions>,
}

impl Recipe {
    /// A recipe with this template and default lengths and normalization.
    pub fn new(template: Template) -> Self {
        Recipe {
            template,
            normalized: true,
            query_max_len: 32,
            passage_max_len: 128,
            query_instruction: String::new(),
            passage_instruction: String::new(),
            tasks: BTreeMap::new(),
        }
    }

    /// Tokens that [`make_room`](Self::make_room) leaves for a text.
    pub const MIN_TEXT_TOKENS: usize = 24;

    /// Raises maximum lengths that leave fewer than [`MIN_TEXT_TOKENS`](Self::MIN_TEXT_TOKENS) beside the template: a
    /// tokenizer with a small vocabulary needs many tokens for the template.
    pub fn make_room(&mut self, prompts: &PromptEncoder) {
        let least = |role| {
            let (prefix, suffix) = prompts.affixes(role);
            prefix.len() + suffix.len() + Self::MIN_TEXT_TOKENS
        };
        self.query_max_len = self.query_max_len.max(least(Role::Query));
        self.passage_max_len = self.passage_max_len.max(least(Role::Passage));
    }

    /// The maximum length for a role.
    pub fn max_len(&self, role: Role) -> usize {
        match role {
            Role::Query => self.query_max_len,
            Role::Passage => self.passage_max_len,
        }
    }

    /// The instruction for a role.
    pub fn instruction(&self, role: Role) -> &str {
        match role {
            Role::Query => &self.query_instruction,
            Role::Passage => &self.passage_instruction,
        }
    }

    /// The instructions of a task.
    ///
    /// # Errors
    /// The model was not trained on a task of this name.
    pub fn task(&self, name: &str) -> Result<&Instructions> {
        self.tasks.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.tasks.keys().map(String::as_str).collect();
            Error::new(ErrorKind::Argument, "the model has no instructions for this task")
                .expected(match known.is_empty() {
                    true => "a model that was trained with instructions of tasks".to_owned(),
                    false => format!("one of {}", known.join(", ")),
                })
                .got(name)
        })
    }

    /// The instructions for texts of no task.
    pub(crate) fn instructions(&self) -> Instructions {
        Instructions {
            query: self.query_instruction.clone(),
            passage: self.passage_instruction.clone(),
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
                .hint("remove the file to use only the options of the command line")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_saved_and_optional() {
        let dir = tempfile::tempdir().unwrap();
        let mut recipe = Recipe::new(Template::preset("llara").unwrap());
        let old = recipe.to_json().unwrap();
        assert!(!String::from_utf8(old.clone()).unwrap().contains("instruction"));
        std::fs::write(dir.path().join(RECIPE_FILE), old).unwrap();
        assert_eq!(Recipe::read(dir.path()).unwrap().unwrap(), recipe);

        recipe.query_instruction = "find: ".into();
        std::fs::write(dir.path().join(RECIPE_FILE), recipe.to_json().unwrap()).unwrap();
        let read = Recipe::read(dir.path()).unwrap().unwrap();
        assert_eq!(read.instruction(Role::Query), "find: ");
        assert_eq!((read.instruction(Role::Passage), &read), ("", &recipe));
    }
}
