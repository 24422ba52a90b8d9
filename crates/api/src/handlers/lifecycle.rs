//! An instance's own life: each operation answers with the instance, and most take no body.

use axum::extract::State;
use stencil_engine::Engine;

use crate::body::{Bare, Json, MaybeJson, Reference};
use crate::error::ApiError;
use crate::reply::Instance;
use crate::request::{ChangeInstance, PromoteTemplate};

/// A handler for each of the engine's operations of that name.
macro_rules! operations {
    ($($operation:ident),*) => {$(
        pub(crate) async fn $operation(
            State(engine): State<Engine>,
            Reference(id): Reference,
            _: Bare,
        ) -> Result<axum::Json<Instance>, ApiError> {
            Ok(axum::Json(engine.$operation(&id).await?.into()))
        }
    )*};
}

pub(crate) async fn promote(
    State(engine): State<Engine>,
    Reference(id): Reference,
    MaybeJson(asked): MaybeJson<PromoteTemplate>,
) -> Result<axum::Json<Instance>, ApiError> {
    Ok(axum::Json(engine.promote(&id, asked.armed).await?.into()))
}

pub(crate) async fn change(
    State(engine): State<Engine>,
    Reference(id): Reference,
    Json(asked): Json<ChangeInstance>,
) -> Result<axum::Json<Instance>, ApiError> {
    Ok(axum::Json(engine.arm(&id, asked.armed).await?.into()))
}

operations!(
    start,
    stop,
    pause,
    resume,
    standby,
    restore,
    demote,
    record_hot_pages
);
