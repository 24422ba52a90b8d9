//! Reading and writing the JSON files of the data directory, each with a `schema` number that is looked at before
//! anything else of it.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Why the content of a file could not be read, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is no JSON: empty, cut off, or something else.
    #[error("it is no valid JSON")]
    NotJson(#[source] serde_json::Error),
    /// It does not say of which version it is.
    #[error("it has no \"schema\" number")]
    NoSchema,
    /// Another version of Stencil wrote it.
    #[error(
        "its schema is {found}, and this version of Stencil reads schema {supported}: use the version that wrote it"
    )]
    Schema {
        /// The number in the file.
        found: u64,
        /// The number that this version reads.
        supported: u32,
    },
    /// Its schema is known, and it is not of that form.
    #[error("it does not have the form that its schema asks for")]
    Shape(#[source] serde_json::Error),
    /// A value has no form in JSON, like a path that is no UTF-8.
    #[error("it cannot be expressed as JSON")]
    Inexpressible(#[source] serde_json::Error),
}

pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8], supported: u32) -> Result<T, FormatError> {
    let value: Value = serde_json::from_slice(bytes).map_err(FormatError::NotJson)?;
    match value.get("schema").and_then(Value::as_u64) {
        None => Err(FormatError::NoSchema),
        Some(found) if found != u64::from(supported) => Err(FormatError::Schema { found, supported }),
        Some(_) => serde_json::from_value(value).map_err(FormatError::Shape),
    }
}

pub(crate) fn write<T: Serialize>(value: &T) -> Result<Vec<u8>, FormatError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(FormatError::Inexpressible)?;
    bytes.push(b'\n');
    Ok(bytes)
}
