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
    let request = asked.request();
    let fork = engine.fork(&id, asked.name, request).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Result<Instance, ApiError> {
        Err(ApiError::invalid("it failed"))
    }

    fn made() -> Result<Instance, ApiError> {
        let instance = serde_json::json!({ "id": "01k6h2v9d3e4f5g6h7j8k9m0n1", "state": "Running" });
        Ok(serde_json::from_value(instance).unwrap())
    }

    fn answered<const N: usize>(results: [Result<Instance, ApiError>; N]) -> (u16, Vec<bool>) {
        let names = (1..).map(|number| format!("web-{number}").parse().unwrap());
        let (status, list) = answer(names.zip(results).collect()).unwrap();
        let made = list
            .0
            .forks
            .iter()
            .map(|fork| matches!(fork.outcome, ForkOutcome::Instance(_)));
        (status.as_u16(), made.collect())
    }

    #[test]
    fn created_if_all_worked() {
        assert_eq!(answered([made(), made()]), (201, vec![true, true]));
    }

    #[test]
    fn an_entry_for_each_if_some_worked() {
        assert_eq!(
            answered([failed(), made(), failed()]),
            (207, vec![false, true, false])
        );
    }

    #[test]
    fn the_error_if_none_worked() {
        let name = || "web-1".parse().unwrap();
        let error = answer(vec![(name(), failed()), (name(), failed())]).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.body.message.as_str()),
            (400, "it failed")
        );
    }
}
