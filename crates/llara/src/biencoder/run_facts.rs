//! What the model card says about a training run, besides what the model itself knows.

use serde_json::Value;

/// What the model card says about a training run. Paths do not belong here: a card is published.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunFacts {
    /// File names of the training data, without folders, and numbers of rows.
    pub data: Vec<(String, u64)>,
    /// Names and values of settings.
    pub settings: Vec<(String, String)>,
    /// Steps of the run; 0 for random weights.
    pub steps: Option<u64>,
    /// Loss of the last step.
    pub loss: Option<f32>,
}

/// A setting for the card; objects and missing values are left out.
pub(crate) fn setting(value: &Value) -> Option<String> {
    match value {
        Value::Null | Value::Object(_) | Value::Array(_) => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}
