//! Pretraining as in Llama2Vec (Li et al. 2023): the model learns to say what a text contains in the tokens whose
//! hidden states are pooled later.
//!
//! A text is encoded as a passage and as a query of fine-tuning, by the template of the model. From the pooled tokens
//! of the passage form the model predicts the words of the text itself (EBAE, embedding-based auto-encoding), from
//! those of the query form the words of the text that follows it (EBAR, embedding-based auto-regression); beside
//! both, every token of the text predicts the next one. Both forms are encoded in one pass: the second branches off
//! where it differs from the first.
//!
//! With `N` tokens to predict and `n` texts with targets over all processes, and `h` the hidden states after the
//! final norm, `z = h · Wᵀ`:
//!
//! - `LM = 1/N · Σ −log softmax(z_{i−1})[token_i]`;
//! - for each of EBAE and EBAR, with `m_v` the maximum of `z_v` over a text's pooled tokens and `T` its distinct
//!   target tokens: `X = 1/10 · 1/n · Σ −1/|T| · Σ_{v ∈ T} log softmax(m)_v`;
//! - `loss = LM + (EBAE + EBAR) / 2`; if one of the two has no target in the whole batch, the other is not halved.
//!
//! `N` and `n` are known before anything is computed. A chunk therefore needs nothing of other chunks: it is encoded,
//! compared with its targets and differentiated at once, and no forward pass is repeated.

mod gradients;
mod input;
mod options;
mod sample;
mod sequences;
mod task;

pub use gradients::{PretrainingLoss, accumulate_pretraining_gradients};
pub use input::PretrainingInput;
pub use options::{LossWeights, PretrainingOptions};
pub use sample::PretrainingSample;
pub use sequences::{PretrainingEncoder, SetObjective, TrainingSequence};
pub use task::Pretraining;
pub(super) use task::PretrainingSource;
