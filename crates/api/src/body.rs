//! Reads requests: bodies bounded, JSON strict, queries strict, refusals in the one form.
//!
//! A body over its limit is refused, but not by hanging up: a client that still writes would then see a broken
//! connection and not the reply. What it sends is read and thrown away first, within bounds of its own.

use std::time::Duration;

use axum::RequestPartsExt;
use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use axum::http::{HeaderMap, request};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::ApiError;

const JSON: &str = "application/json";
/// The most bytes of JSON that a request can have.
const JSON_LIMIT: usize = 64 << 10;
/// The most bytes that are given to a console at once.
const CONSOLE_LIMIT: usize = 1 << 20;
/// How many bytes of a body that is too large are thrown away before the connection is given up.
const DISCARD_LIMIT: usize = 64 << 20;
/// How long a body may take: its sender is on this host, or near.
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// The `{id}` of a path: an id, a name, or the first 8 or more characters of an id.
pub(crate) struct Reference(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Reference {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, _state: &S) -> Result<Self, ApiError> {
        let Path(reference) = parts
            .extract::<Path<String>>()
            .await
            .map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
        Ok(Self(reference))
    }
}

/// A query with no other fields than those of `T`.
pub(crate) struct Asked<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, _state: &S) -> Result<Self, ApiError> {
        query(parts).map(Self)
    }
}

/// A request that takes neither a query nor a body. `{}` passes, for clients that always send one.
pub(crate) struct Bare;

impl<S: Send + Sync> FromRequest<S> for Bare {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        query::<Nothing>(&parts)?;
        let body = read(&parts.headers, body, JSON_LIMIT, "a body").await?;
        match body.trim_ascii() {
            b"" => Ok(Self),
            b"{}" => check_content_type(&parts.headers, "a JSON body", JSON).map(|()| Self),
            _ => Err(ApiError::invalid(format!(
                "{} {} takes no body",
                parts.method,
                parts.uri.path()
            ))),
        }
    }
}

/// A JSON body with no other fields than those of `T`, and no query.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        json(request)
            .await?
            .map(Self)
            .ok_or_else(|| ApiError::invalid("the body is empty; it takes a JSON object"))
    }
}

/// As [`Json`], but no body at all is the default.
pub(crate) struct MaybeJson<T>(pub(crate) T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for MaybeJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        json(request).await.map(|asked| Self(asked.unwrap_or_default()))
    }
}

/// A body of bytes for a console: `application/octet-stream`.
pub(crate) struct ConsoleInput(pub(crate) Bytes);

impl<S: Send + Sync> FromRequest<S> for ConsoleInput {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        query::<Nothing>(&parts)?;
        let input = read(&parts.headers, body, CONSOLE_LIMIT, "input for a console").await?;
        if !input.is_empty() {
            check_content_type(&parts.headers, "input for a console", "application/octet-stream")?;
        }
        Ok(Self(input))
    }
}

/// A query without fields.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

fn query<T: DeserializeOwned>(parts: &request::Parts) -> Result<T, ApiError> {
    let Query(asked) =
        Query::try_from_uri(&parts.uri).map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    Ok(asked)
}

/// A JSON body, or `None` where there is no body.
async fn json<T: DeserializeOwned>(request: Request) -> Result<Option<T>, ApiError> {
    let (parts, body) = request.into_parts();
    query::<Nothing>(&parts)?;
    let body = read(&parts.headers, body, JSON_LIMIT, "a JSON body").await?;
    if body.is_empty() {
        return Ok(None);
    }
    check_content_type(&parts.headers, "a JSON body", JSON)?;
    parse(&body).map(Some)
}

/// A page in a browser can send a body of another type without asking first whether it may.
fn check_content_type(headers: &HeaderMap, what: &str, taken: &str) -> Result<(), ApiError> {
    let given = headers
        .get(CONTENT_TYPE)
        .map(|value| String::from_utf8_lossy(value.as_bytes()));
    let essence = given
        .as_deref()
        .unwrap_or("")
        .split(';')
        .next()
        .unwrap_or("")
        .trim();
    if essence.eq_ignore_ascii_case(taken) {
        return Ok(());
    }
    let given = given.as_deref().unwrap_or("absent");
    Err(ApiError::invalid(format!(
        "the content-type is {given}; {what} takes {taken}"
    )))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // Serde would also take an array of the fields' values in their order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(ApiError::invalid("the body is no JSON object; it takes one"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let (path, error) = (error.path().to_string(), error.into_inner());
        // Of a body that is no JSON at all, the path says where the parser stood; the error has line and column.
        if path == "." || !error.is_data() {
            ApiError::invalid(format!("the body is not as expected: {error}"))
        } else {
            ApiError::invalid(format!("{path}: {error}"))
        }
    })?;
    json.end()
        .map_err(|error| ApiError::invalid(format!("the body goes on after its JSON: {error}")))?;
    Ok(parsed)
}

/// Reads a whole body of at most `limit` bytes.
async fn read(headers: &HeaderMap, body: Body, limit: usize, what: &str) -> Result<Bytes, ApiError> {
    let too_large = || {
        ApiError::invalid(format!(
            "the body is too large; {what} takes at most {limit} bytes ({} KiB)",
            limit >> 10
        ))
    };
    let announced = headers
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    // Who waits for `100 Continue` has sent nothing yet, and does not have to.
    if announced.is_some_and(|length| length > limit as u64) && headers.contains_key(EXPECT) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_DEADLINE, collect(body, limit)).await {
        Ok(Ok(Some(body))) => Ok(body),
        Ok(Ok(None)) => Err(too_large()),
        Ok(Err(_broken)) => Err(ApiError::invalid(
            "the connection broke in the middle of the body",
        )),
        Err(_elapsed) => Err(ApiError::invalid(format!(
            "the body did not arrive within {BODY_DEADLINE:?}"
        ))),
    }
}

/// The body, or `None` if it has more than `limit` bytes; then what followed was thrown away.
async fn collect(mut body: Body, limit: usize) -> Result<Option<Bytes>, axum::Error> {
    let mut kept = BytesMut::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        seen += data.len();
        if seen <= limit {
            kept.extend_from_slice(&data);
        } else if seen > DISCARD_LIMIT {
            break;
        }
    }
    Ok((seen <= limit).then(|| kept.freeze()))
}
