//! Warnings about truncated texts, and about maximum lengths that leave few tokens for the text.

use llara::text::PromptEncoder;
use llara::train::plan::TextLengths;
use llara::{Result, Role};

use crate::talk::{count, counted};

/// The largest fraction of truncated texts without a warning.
const TRUNCATED_SHARE: f64 = 0.2;

/// The smallest number of tokens for the text, without the template's, that gives no warning.
const MIN_TEXT_TOKENS: usize = 8;

/// One line for each maximum length that is too small.
///
/// # Errors
/// The template cannot be tokenized.
pub(crate) fn warnings(roles: &[TextLengths], prompts: &PromptEncoder) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for texts in roles {
        let (summary, truncated_share) = (texts.lengths.summary(), texts.truncated_share());
        let (role, max_len) = (texts.role, texts.max_len);
        let (plural, option) = match role {
            Role::Query => ("queries", "--query-max-len"),
            Role::Passage => ("passages", "--passage-max-len"),
        };
        let template = prompts.encode(role, "", usize::MAX)?.len();
        let text_tokens = max_len.saturating_sub(template);
        if text_tokens < MIN_TEXT_TOKENS && truncated_share > 0.0 {
            lines.push(format!(
                "warning: {option} {max_len} leaves {} for the text of a {role}, because template `{}` \
                 has {template}: increase {option}",
                counted(text_tokens, "token"),
                prompts.template().name,
            ));
        }
        if truncated_share > TRUNCATED_SHARE {
            lines.push(format!(
                "warning: {:.0} % of {} {plural} are longer than {option} {max_len} and are truncated (mean \
                 {:.0} tokens, 90th percentile {}, template included): increase {option}",
                100.0 * truncated_share,
                count(summary.texts as usize),
                summary.mean,
                count(summary.p90),
            ));
        }
    }
    Ok(lines)
}
