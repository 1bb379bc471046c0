//! Warnings about texts that are cut, and about templates that leave little room for them.

use llara::text::PromptEncoder;
use llara::train::plan::TextLengths;
use llara::{Result, Role};

use crate::talk::{count, counted};

/// The largest share of cut texts without a warning.
const CUT_SHARE: f64 = 0.2;

/// The smallest number of tokens for a text, beside its template, without a warning.
const ROOM: usize = 8;

/// One line for each fault of the maximum lengths.
///
/// # Errors
/// When the template cannot be tokenized.
pub(crate) fn warnings(roles: &[TextLengths], prompts: &PromptEncoder) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for texts in roles {
        let summary = texts.summary();
        let (role, max_len) = (texts.role, texts.max_len);
        let (plural, option) = match role {
            Role::Query => ("queries", "--query-max-len"),
            Role::Passage => ("passages", "--passage-max-len"),
        };
        let template = prompts.encode(role, "", usize::MAX)?.len();
        let room = max_len.saturating_sub(template);
        if room < ROOM && summary.cut_share > 0.0 {
            lines.push(format!(
                "warning: {option} {max_len} leaves {} for the text of a {role}; template `{}` takes \
                 {template}: raise {option}",
                counted(room, "token"),
                prompts.template().name,
            ));
        }
        if summary.cut_share > CUT_SHARE {
            lines.push(format!(
                "warning: {:.0} % of {} {plural} are longer than {option} {max_len} and are cut (mean {:.0} \
                 tokens, 90 % up to {}, template included): raise {option}",
                100.0 * summary.cut_share,
                count(summary.texts),
                summary.mean,
                count(summary.p90),
            ));
        }
    }
    Ok(lines)
}
