//! The guest's console: what it printed, as it comes; and bytes for it to read.

use std::io;

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::IntoResponse;
use futures_util::{StreamExt, stream};
use stencil_core::error_chain;
use stencil_engine::Engine;

use crate::body::{Asked, ConsoleInput, Reference};
use crate::closing::Closing;
use crate::error::ApiError;
use crate::request::ReadConsole;

/// A reply that ends with an error is cut off, which a client can tell from one that is complete.
pub(crate) async fn read(
    State(engine): State<Engine>,
    State(closing): State<Closing>,
    Reference(id): Reference,
    Asked(asked): Asked<ReadConsole>,
) -> Result<impl IntoResponse, ApiError> {
    let output = engine.console(&id, asked.tail, asked.follow).await?;
    let output = output.map(|chunk| {
        chunk.map_err(|error| {
            tracing::error!(
                error = error_chain(&error),
                "a console cannot be read any further"
            );
            io::Error::other("the console cannot be read any further")
        })
    });
    let body = stream::unfold(
        (output, Box::pin(closing.begun())),
        |(mut output, mut closes)| async move {
            let chunk = tokio::select! {
                biased;
                chunk = output.next() => chunk?,
                () = &mut closes => Err(io::Error::other("the server is shutting down")),
            };
            Some((chunk, (output, closes)))
        },
    );
    // Guests print what they like; it is text for people, and no browser is to guess anything else.
    let head = [
        (CONTENT_TYPE, "text/plain; charset=utf-8"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    Ok((head, Body::from_stream(body)))
}

pub(crate) async fn write(
    State(engine): State<Engine>,
    Reference(id): Reference,
    ConsoleInput(input): ConsoleInput,
) -> Result<StatusCode, ApiError> {
    engine.console_write(&id, &input).await?;
    Ok(StatusCode::NO_CONTENT)
}
