//! Checks that the rows of a dataset have a teacher's scores, which distillation needs.

use super::{Dataset, TrainingRow};
use crate::{Error, ErrorKind, Result};

impl Dataset {
    /// Checks that every row has a teacher's scores, and that they are finite after a division by
    /// `temperature`. Reads all rows.
    ///
    /// # Errors
    /// [`ErrorKind::Data`] with the first row without `pos_scores` or `neg_scores`, or with a score that is too
    /// large; or a row cannot be read.
    pub fn check_teacher_scores(&self, temperature: f32) -> Result<()> {
        (0..self.len()).try_for_each(|index| {
            let TrainingRow { pos_scores, neg_scores, .. } = self.row(index)?;
            let (Some(pos), Some(neg)) = (pos_scores, neg_scores) else {
                return Err(self.no_teacher_scores(index));
            };
            let overflows = |score: &f32| !(score / temperature).is_finite();
            match pos.into_iter().chain(neg).find(overflows) {
                None => Ok(()),
                Some(score) => Err(self.at_row(
                    index,
                    Error::new(ErrorKind::Data, "a score is too large for the temperature")
                        .expected(format!("a finite quotient of the score and {temperature}"))
                        .got(score)
                        .hint("raise --distill-temperature"),
                )),
            }
        })
    }

    /// The error for a row without a teacher's scores.
    pub(crate) fn no_teacher_scores(&self, index: usize) -> Error {
        let error = Error::new(ErrorKind::Data, "the row has no scores of a teacher")
            .expected(
                "`pos_scores` and `neg_scores`, one number for each passage of `pos` and `neg`",
            )
            .hint("score the passages with a reranker first, or train without --distill");
        self.at_row(index, error)
    }

    fn at_row(&self, index: usize, error: Error) -> Error {
        match self.location(index) {
            Some((path, line)) => error.line(path, line),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::BadRows;

    #[test]
    fn rows_without_usable_scores_are_refused_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let row = |scores: &str| format!(r#"{{"query": "q", "pos": ["p"], "neg": ["n"]{scores}}}"#);
        let good = row(r#", "pos_scores": [2e38], "neg_scores": [-1]"#);
        let check = |second: &str, temperature| {
            let path = dir.path().join("rows.jsonl");
            std::fs::write(&path, format!("{good}\n{second}\n")).unwrap();
            let dataset = Dataset::open(&[path], BadRows::Error).unwrap();
            dataset.check_teacher_scores(temperature).map_err(|e| e.to_string())
        };
        check(&good, 1.0).unwrap();
        for half in ["", r#", "pos_scores": [1]"#, r#", "neg_scores": [1]"#] {
            let error = check(&row(half), 1.0).unwrap_err();
            assert!(error.contains("rows.jsonl:2: ") && error.contains("no scores"), "{error}");
        }
        let error = check(&good, 0.5).unwrap_err();
        assert!(error.contains("rows.jsonl:1: ") && error.contains("too large"), "{error}");
    }
}
