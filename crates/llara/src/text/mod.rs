//! Text to token ids: the prefix and suffix of a text ([`Template`]), the tokenizer ([`TextTokenizer`]),
//! and both together ([`PromptEncoder`]).

mod bpe;
mod prompt;
mod special_tokens;
mod stop_words;
mod template;
mod tokenizer;

pub use bpe::train_bpe;
pub use prompt::PromptEncoder;
pub use stop_words::StopWords;
pub use template::{Affixes, Role, Template};
pub(crate) use tokenizer::TOKENIZER_FILE;
pub use tokenizer::TextTokenizer;
