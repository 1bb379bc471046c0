//! One training row: a query, its positives and its hard negatives, from one line of JSON.

use std::path::Path;

use serde_json::{Map, Value};

use super::DataSource;
use crate::{Error, ErrorKind, Result};

/// A query with its positives and hard negatives. `pos` is not empty, and every text contains a character
/// other than white space.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingRow {
    /// The text to search with.
    pub query: String,
    /// Positives: passages that answer the query.
    pub pos: Vec<String>,
    /// Hard negatives: similar passages that do not answer it. May be empty.
    pub neg: Vec<String>,
    /// An identifier of the row.
    pub id: Option<String>,
    /// An instruction that is prepended to this row's query.
    pub prompt: Option<String>,
    /// An instruction that is prepended to this row's passages. It belongs to the row's file: a line has no such
    /// field.
    pub passage_instruction: Option<String>,
    /// The teacher's score of each passage in `pos`; finite.
    pub pos_scores: Option<Vec<f32>>,
    /// The teacher's score of each passage in `neg`; finite.
    pub neg_scores: Option<Vec<f32>>,
}

impl TrainingRow {
    /// Parses one line. `path` and `line` (from 1) are used in errors. Unknown fields are ignored; an
    /// optional field that is `null` counts as absent.
    ///
    /// ```
    /// # use llara::data::TrainingRow;
    /// let line = br#"{"query": "what do bees eat", "pos": ["Bees eat nectar."], "neg": ["Ants."]}"#;
    /// assert_eq!(TrainingRow::parse(line, "rows.jsonl", 1)?.pos.len(), 1);
    /// # Ok::<(), llara::Error>(())
    /// ```
    ///
    /// # Errors
    /// The line is not UTF-8 or not a JSON object; a field is missing, has the wrong type, is empty or
    /// consists of white space; or the scores differ in number from their passages or are not finite.
    pub fn parse(bytes: &[u8], path: impl AsRef<Path>, line: u64) -> Result<TrainingRow> {
        let location = Location { path: path.as_ref(), line };
        let mut fields = location.fields(bytes, "{\"query\": …, \"pos\": […], \"neg\": […]}")?;
        let query = location.text("query", location.required(&mut fields, "query")?)?;
        let pos = location.texts("pos", location.required(&mut fields, "pos")?)?;
        if pos.is_empty() {
            return Err(location
                .error("`pos` is empty")
                .expected("at least one passage")
                .got("[]"));
        }
        let neg = match optional(&mut fields, "neg") {
            None => Vec::new(),
            Some(neg) => location.texts("neg", neg)?,
        };
        let pos_scores = location.scores("pos_scores", &mut fields, "pos", pos.len())?;
        let neg_scores = location.scores("neg_scores", &mut fields, "neg", neg.len())?;
        let id = match optional(&mut fields, "id") {
            None => None,
            Some(Value::String(id)) => Some(id),
            Some(Value::Number(id)) => Some(id.to_string()),
            Some(other) => return Err(location.wrong_type("id", "a string or a number", &other)),
        };
        let prompt = match optional(&mut fields, "prompt") {
            None => None,
            Some(Value::String(prompt)) => Some(prompt),
            Some(other) => return Err(location.wrong_type("prompt", "a string", &other)),
        };
        let passage_instruction = None;
        Ok(TrainingRow { query, pos, neg, id, prompt, passage_instruction, pos_scores, neg_scores })
    }
}

impl TrainingRow {
    /// The row with the instructions of its source: a `prompt` of its own takes precedence.
    pub(crate) fn with_instructions(mut self, source: &DataSource) -> Self {
        self.prompt = self.prompt.or_else(|| source.query_instruction.clone());
        self.passage_instruction.clone_from(&source.passage_instruction);
        self
    }
}

/// The file and line of a row; creates its errors.
pub(super) struct Location<'a> {
    pub(super) path: &'a Path,
    pub(super) line: u64,
}

impl Location<'_> {
    /// The fields of a line that is one JSON object. `expected` is an example for the error.
    pub(super) fn fields(&self, bytes: &[u8], expected: &str) -> Result<Map<String, Value>> {
        let text = std::str::from_utf8(bytes).map_err(|e| {
            self.error("not UTF-8")
                .got(format!("an invalid byte at column {}", e.valid_up_to() + 1))
                .hint("convert the file to UTF-8")
        })?;
        let value: Value = serde_json::from_str(text).map_err(|e| {
            self.error(format!("not JSON at column {}", e.column()))
                .because(e)
                .hint("each line must be one complete JSON object")
        })?;
        match value {
            Value::Object(fields) => Ok(fields),
            value => Err(self.error("not a JSON object").expected(expected).got(describe(&value))),
        }
    }

    pub(super) fn error(&self, what: impl Into<String>) -> Error {
        Error::new(ErrorKind::Data, what).line(self.path, self.line)
    }

    pub(super) fn wrong_type(&self, field: &str, expected: &str, got: &Value) -> Error {
        self.error(format!("`{field}` has the wrong type")).expected(expected).got(describe(got))
    }

    pub(super) fn required(&self, fields: &mut Map<String, Value>, name: &str) -> Result<Value> {
        fields.remove(name).ok_or_else(|| {
            self.error(format!("`{name}` is missing")).got(match fields.len() {
                0 => "no other field".to_owned(),
                _ => format!("the fields {}", preview(&field_names(fields))),
            })
        })
    }

    pub(super) fn text(&self, field: &str, value: Value) -> Result<String> {
        match value {
            Value::String(text) if text.trim().is_empty() => {
                Err(self.error(format!("`{field}` is empty")).got(format!("{:?}", preview(&text))))
            }
            Value::String(text) => Ok(text),
            other => Err(self.wrong_type(field, "a string", &other)),
        }
    }

    fn texts(&self, field: &str, value: Value) -> Result<Vec<String>> {
        let Value::Array(items) = value else {
            return Err(self.wrong_type(field, "a list of strings", &value));
        };
        let item = |(i, value)| self.text(&format!("{field}[{i}]"), value);
        items.into_iter().enumerate().map(item).collect()
    }

    fn scores(
        &self,
        field: &str,
        fields: &mut Map<String, Value>,
        passages: &str,
        count: usize,
    ) -> Result<Option<Vec<f32>>> {
        let items = match optional(fields, field) {
            None => return Ok(None),
            Some(Value::Array(items)) => items,
            Some(other) => return Err(self.wrong_type(field, "a list of numbers", &other)),
        };
        if items.len() != count {
            return Err(self
                .error(format!("`{field}` and `{passages}` differ in length"))
                .expected(format!("{count} scores, one for each passage"))
                .got(items.len()));
        }
        let mut scores = Vec::with_capacity(count);
        for (i, item) in items.iter().enumerate() {
            let name = format!("{field}[{i}]");
            let number = item.as_f64().ok_or_else(|| self.wrong_type(&name, "a number", item))?;
            // A finite f64 may be too large for f32.
            let score = number as f32;
            if !score.is_finite() {
                return Err(self
                    .error(format!("`{name}` is not finite"))
                    .expected("a number within the range of f32")
                    .got(number));
            }
            scores.push(score);
        }
        Ok(Some(scores))
    }
}

fn optional(fields: &mut Map<String, Value>, name: &str) -> Option<Value> {
    fields.remove(name).filter(|value| !value.is_null())
}

fn field_names(fields: &Map<String, Value>) -> String {
    fields.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => format!("the string {:?}", preview(s)),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(fields) => format!("an object of {} fields", fields.len()),
    }
}

/// The first characters of a text, for error messages.
fn preview(text: &str) -> String {
    const CHARS: usize = 60;
    match text.char_indices().nth(CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &str) -> Result<TrainingRow> {
        TrainingRow::parse(line.as_bytes(), "rows.jsonl", 7)
    }

    #[test]
    fn a_full_row() {
        let row = parse(
            r#"{"query":"q","pos":["a","b"],"neg":["c"],"id":12,"prompt":"find: ","type":"x",
               "pos_scores":[1,0.5],"neg_scores":[-2e1]}"#,
        )
        .unwrap();
        let texts = |t: &[&str]| t.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        assert_eq!(
            row,
            TrainingRow {
                query: "q".into(),
                pos: texts(&["a", "b"]),
                neg: texts(&["c"]),
                id: Some("12".into()),
                prompt: Some("find: ".into()),
                passage_instruction: None,
                pos_scores: Some(vec![1.0, 0.5]),
                neg_scores: Some(vec![-20.0]),
            }
        );
        let row = parse(
            r#"{"query":"q","pos":["a"],"neg":["b"],"id":null,"prompt":null,"pos_scores":null}"#,
        )
        .unwrap();
        assert!(row.id.is_none() && row.prompt.is_none() && row.pos_scores.is_none());
        assert_eq!(
            parse(r#"{"query":"q","pos":["a"],"neg":["b"],"id":"x"}"#).unwrap().id.unwrap(),
            "x"
        );
    }

    #[test]
    fn negatives_are_optional() {
        for neg in ["", r#","neg":null"#, r#","neg":[]"#, r#","neg":[],"neg_scores":[]"#] {
            let row = parse(&format!(r#"{{"query":"q","pos":["a"]{neg}}}"#)).unwrap();
            assert_eq!(row.neg.len(), 0, "{neg}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let with = |extra: &str| format!(r#"{{"query":"q","pos":["a"],"neg":["b","c"],{extra}}}"#);
        for (line, part) in [
            ("{\"query\":".to_owned(), "not JSON at column"),
            (String::new(), "not JSON"),
            ("[1]".into(), "not a JSON object"),
            ("null".into(), "not a JSON object"),
            (r#"{"pos":["a"],"neg":["b"]}"#.into(), "`query` is missing"),
            (r#"{"query":"q","neg":["b"]}"#.into(), "`pos` is missing"),
            (r#"{"query":"q","pos":["a"],"neg":"b"}"#.into(), "`neg` has the wrong type"),
            (r#"{"query":" \t","pos":["a"],"neg":["b"]}"#.into(), "`query` is empty"),
            (r#"{"query":1,"pos":["a"],"neg":["b"]}"#.into(), "`query` has the wrong type"),
            (r#"{"query":"q","pos":"a","neg":["b"]}"#.into(), "`pos` has the wrong type"),
            (r#"{"query":"q","pos":[],"neg":["b"]}"#.into(), "`pos` is empty"),
            (r#"{"query":"q","pos":["a"],"neg":[""]}"#.into(), "`neg[0]` is empty"),
            (r#"{"query":"q","pos":["a"],"neg_scores":[1]}"#.into(), "differ in length"),
            (r#"{"query":"q","pos":["a"],"neg":["b",3]}"#.into(), "`neg[1]` has the wrong type"),
            (r#"{"query":"q","pos":["a",""],"neg":["b"]}"#.into(), "`pos[1]` is empty"),
            (with(r#""id":true"#), "`id` has the wrong type"),
            (with(r#""prompt":3"#), "`prompt` has the wrong type"),
            (with(r#""neg_scores":[1]"#), "`neg_scores` and `neg` differ in length"),
            (with(r#""pos_scores":1"#), "`pos_scores` has the wrong type"),
            (with(r#""neg_scores":[1,"2"]"#), "`neg_scores[1]` has the wrong type"),
            (with(r#""pos_scores":[1e39]"#), "`pos_scores[0]` is not finite"),
            (with(r#""pos_scores":[NaN]"#), "not JSON at column"),
            (with(r#""pos_scores":[1e999]"#), "not JSON"),
        ] {
            let e = parse(&line).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Data);
            let e = e.to_string();
            assert!(e.starts_with("rows.jsonl:7: ") && e.contains(part), "{line}\n{e}");
        }
        let e = TrainingRow::parse(b"{\"query\":\"\xff\"}", "r", 1).unwrap_err().to_string();
        assert!(e.contains("not UTF-8") && e.contains("at column 11"), "{e}");
        let deep = "[".repeat(100_000);
        assert!(parse(&deep).is_err());
        let long = format!(r#"{{"query":"q","pos":"{}","neg":["b"]}}"#, "ü".repeat(9999));
        assert!(parse(&long).unwrap_err().to_string().len() < 400);
    }

    /// Any JSON, often with the names of the real fields.
    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        let key = prop_oneof![
            4 => prop::sample::select(vec!["query", "pos", "neg", "id", "prompt", "pos_scores", "neg_scores"])
                .prop_map(String::from),
            1 => any::<String>(),
        ];
        leaf.prop_recursive(3, 24, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key.clone(), inner), 0..8)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    fn whole(row: &TrainingRow) -> bool {
        let texts = row.pos.iter().chain(&row.neg).chain([&row.query]);
        let scores = |s: &Option<Vec<f32>>, n| {
            s.as_ref().is_none_or(|s| s.len() == n && s.iter().all(|x| x.is_finite()))
        };
        texts.into_iter().all(|t| !t.trim().is_empty())
            && !row.pos.is_empty()
            && scores(&row.pos_scores, row.pos.len())
            && scores(&row.neg_scores, row.neg.len())
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(row) = TrainingRow::parse(&bytes, "r", 1) {
                prop_assert!(whole(&row));
            }
        }

        #[test]
        fn arbitrary_json_is_refused_or_whole(value in json()) {
            if let Ok(row) = parse(&value.to_string()) {
                prop_assert!(whole(&row));
            }
        }

        #[test]
        fn what_was_written_is_read(
            query in "\\PC*[a-z]\\PC*", pos in prop::collection::vec("\\PC*[a-z]", 1..4),
            neg in prop::collection::vec("[a-z]\\PC*", 1..4), scores: bool,
        ) {
            let numbers: Vec<f32> = (0..neg.len()).map(|i| i as f32 / 4.0).collect();
            let mut json = serde_json::json!({"neg": neg, "query": query, "pos": pos});
            if scores {
                json["neg_scores"] = numbers.clone().into();
            }
            let row = parse(&json.to_string()).unwrap();
            prop_assert_eq!((row.query, row.pos, row.neg), (query, pos, neg));
            prop_assert_eq!(row.neg_scores, scores.then_some(numbers));
        }
    }
}
