//! Text to token ids: what stands around a text ([`Template`]), how it is cut into tokens
//! ([`TextTokenizer`]) and both together ([`PromptEncoder`]).

mod bpe;
mod prompt;
mod template;
mod tokenizer;

pub use bpe::train_bpe;
pub use prompt::PromptEncoder;
pub use template::{Affixes, Role, Template};
pub use tokenizer::TextTokenizer;
