//! `--deny` and `--allow`: findings that make the command fail.

use clap::builder::{PossibleValue, PossibleValuesParser};
use llara::inspect::{Basis, Finding, Report, Settings};
use llara::{Error, ErrorKind, Result};

use super::table;
use crate::talk::count;

/// Every kind of finding.
const ALL: &str = "all";

/// A parser of the names of findings, and `all`.
pub(super) fn kinds() -> PossibleValuesParser {
    let findings = Finding::ALL.map(|f| PossibleValue::new(f.name()).help(f.description()));
    let all = PossibleValue::new(ALL).help("every kind of finding");
    PossibleValuesParser::new(findings.into_iter().chain([all]))
}

/// The denied findings.
pub(super) struct Denied {
    findings: Vec<Finding>,
    /// Those that are named, not only included in `all`.
    named: Vec<Finding>,
}

impl Denied {
    /// The findings of `deny` without those of `allow`.
    ///
    /// # Errors
    /// A finding is in both lists, or everything is allowed.
    pub(super) fn new(deny: &[String], allow: &[String]) -> Result<Self> {
        let parse = |names: &[String]| -> Result<Vec<Finding>> {
            names.iter().filter(|name| *name != ALL).map(|name| name.parse()).collect()
        };
        let (named, allowed) = (parse(deny)?, parse(allow)?);
        let both = named.iter().find(|finding| allowed.contains(finding));
        let both = both.map(|finding| finding.name());
        if let Some(both) = both.or(allow.iter().any(|name| name == ALL).then_some(ALL)) {
            return Err(Error::new(ErrorKind::Argument, "--allow contradicts --deny")
                .expected("findings that only --deny all includes")
                .got(format!("--allow {both}")));
        }
        let is_denied = |finding: &Finding| {
            named.contains(finding)
                || deny.iter().any(|name| name == ALL) && !allowed.contains(finding)
        };
        Ok(Denied { findings: Finding::ALL.into_iter().filter(is_denied).collect(), named })
    }

    /// Refuses findings that are denied by name and cannot be checked with these settings.
    pub(super) fn check(&self, settings: &Settings) -> Result<()> {
        for finding in &self.named {
            let missing = match finding {
                finding if finding.needs_tokenizer() && settings.prompts.is_none() => "--model",
                Finding::NearDuplicateRows
                | Finding::NearDuplicateQueries
                | Finding::NearDuplicatePassages
                    if !settings.near_duplicates =>
                {
                    "--near-duplicates true"
                }
                _ => continue,
            };
            return Err(Error::new(
                ErrorKind::Argument,
                format!("--deny {finding} cannot be checked without {missing}"),
            )
            .hint(format!("add {missing}, or remove {finding} from --deny")));
        }
        Ok(())
    }

    /// The denied findings that were found.
    pub(super) fn found(&self, report: &Report) -> Vec<Finding> {
        let is_found = |finding: &Finding| report.finding(*finding).count > 0;
        self.findings.iter().copied().filter(is_found).collect()
    }
}

/// The error that names the denied findings that were found.
pub(super) fn error(found: &[Finding], report: &Report) -> Option<Error> {
    if found.is_empty() {
        return None;
    }
    let describe = |finding: &Finding| {
        let found = report.finding(*finding);
        let sampled = match found.basis {
            Basis::Sample { .. } => " in a sample",
            Basis::All | Basis::NotChecked => "",
        };
        let first = found
            .examples
            .first()
            .map(|example| format!(", first at {}", table::location(&example.file, example.line)));
        let count = count(found.count as usize);
        format!("{finding}: {count}{sampled}{}", first.unwrap_or_default())
    };
    let lines: Vec<String> = found.iter().map(describe).collect();
    Some(
        Error::new(ErrorKind::Data, "the data has denied findings")
            .expected("none of those that --deny names")
            .got(lines.join("\n       ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(deny: &[&str], allow: &[&str]) -> Result<Vec<Finding>> {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        Denied::new(&owned(deny), &owned(allow)).map(|denied| denied.findings)
    }

    #[test]
    fn all_is_every_finding_that_is_not_allowed() {
        assert_eq!(denied(&[], &[]).unwrap(), []);
        assert_eq!(denied(&["no-negatives"], &[]).unwrap(), [Finding::NoNegatives]);
        assert_eq!(denied(&["all"], &[]).unwrap(), Finding::ALL);
        let most = denied(&["all"], &["no-negatives", "empty-texts"]).unwrap();
        assert_eq!(most.len(), Finding::ALL.len() - 2);
        assert!(!most.contains(&Finding::NoNegatives));
        for (deny, allow) in [("all", "all"), ("no-negatives", "no-negatives")] {
            let e = denied(&[deny], &[allow]).unwrap_err().to_string();
            assert!(e.contains("--allow contradicts --deny"), "{e}");
        }
    }
}
