//! Forks: one, or many at once.

use axum::extract::State;
use axum::http::StatusCode;
use stencil_engine::Engine;

use crate::body::{Json, MaybeJson, Reference};
use crate::error::ApiError;
use crate::reply::{ForkEntry, ForkList, ForkOutcome, Instance};
use crate::request::{ForkMany, ForkOne};

pub(crate) async fn one(
    State(engine): State<Engine>,
    Reference(id): Reference,
    MaybeJson(asked): MaybeJson<ForkOne>,
) -> Result<(StatusCode, axum::Json<Instance>), ApiError> {
    let rules = asked.rules();
    let fork = engine.fork(&id, asked.name, rules).await?;
    Ok((StatusCode::CREATED, axum::Json(fork.into())))
}

pub(crate) async fn many(
    State(engine): State<Engine>,
    Reference(id): Reference,
    Json(asked): Json<ForkMany>,
) -> Result<(StatusCode, axum::Json<ForkList>), ApiError> {
    let outcomes = engine.forks(&id, asked.into()).await?;
    let results = outcomes
        .into_iter()
        .map(|outcome| {
            (
                outcome.name,
                outcome.result.map(Instance::from).map_err(ApiError::from),
            )
        })
        .collect();
    answer(results)
}

type Forked = (stencil_core::InstanceName, Result<Instance, ApiError>);

/// 201 if all worked, 207 with an entry for each if some did, the first error if none did.
fn answer(results: Vec<Forked>) -> Result<(StatusCode, axum::Json<ForkList>), ApiError> {
    let made = results.iter().filter(|(_, result)| result.is_ok()).count();
    let status = if made == results.len() {
        StatusCode::CREATED
    } else {
        StatusCode::MULTI_STATUS
    };
    let mut forks = Vec::with_capacity(results.len());
    for (name, result) in results {
        let outcome = match result {
            Ok(instance) => ForkOutcome::Instance(Box::new(instance)),
            Err(error) if made == 0 => return Err(error),
            Err(error) => ForkOutcome::Error(*error.body),
        };
        forks.push(ForkEntry { name, outcome });
    }
    Ok((status, axum::Json(ForkList { forks })))
}
