//! Instances: make, list, show, delete.

use axum::extract::State;
use axum::http::StatusCode;
use stencil_engine::Engine;

use crate::body::{Asked, Bare, Json, Reference};
use crate::error::ApiError;
use crate::reply::{Instance, InstanceList};
use crate::request::{CreateInstance, ListInstances};

type Reply<T> = Result<axum::Json<T>, ApiError>;

pub(crate) async fn create(
    State(engine): State<Engine>,
    Json(asked): Json<CreateInstance>,
) -> Result<(StatusCode, axum::Json<Instance>), ApiError> {
    let instance = engine.create(asked.into()).await?;
    Ok((StatusCode::CREATED, axum::Json(instance.into())))
}

pub(crate) async fn list(
    State(engine): State<Engine>,
    Asked(asked): Asked<ListInstances>,
) -> Reply<InstanceList> {
    let instances = engine.list(asked.into()).await?;
    Ok(axum::Json(InstanceList {
        instances: instances.into_iter().map(Instance::from).collect(),
    }))
}

pub(crate) async fn get(State(engine): State<Engine>, Reference(id): Reference, _: Bare) -> Reply<Instance> {
    Ok(axum::Json(engine.get(&id).await?.into()))
}

pub(crate) async fn delete(
    State(engine): State<Engine>,
    Reference(id): Reference,
    _: Bare,
) -> Result<StatusCode, ApiError> {
    engine.delete(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
