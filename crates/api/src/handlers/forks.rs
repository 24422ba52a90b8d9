//! Forks: one, or many at once.

use axum::extract::State;
use axum::http::StatusCode;
use stencil_core::InstanceName;
use stencil_engine::Engine;

use crate::body::{Json, MaybeJson, Reference};
use crate::error::ApiError;
use crate::reply::{ForkEntry, ForkExec, ForkList, ForkOutcome, Instance};
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
    let delete_after = asked.delete_after;
    let outcomes = engine.forks(&id, asked.request()?).await?;
    let results = outcomes
        .into_iter()
        .map(|outcome| Forked {
            name: outcome.name,
            result: outcome.result.map(Instance::from).map_err(ApiError::from),
            deleted: outcome
                .work
                .as_ref()
                .map(|work| work.deleted)
                .filter(|_| delete_after),
            exec: outcome.work.map(|work| match work.exec {
                Ok(output) => ForkExec::Result(Box::new(output.into())),
                Err(error) => ForkExec::Error(*ApiError::from(error).body),
            }),
        })
        .collect();
    answer(results)
}

struct Forked {
    name: InstanceName,
    result: Result<Instance, ApiError>,
    exec: Option<ForkExec>,
    deleted: Option<bool>,
}

impl Forked {
    /// All that was asked for was done, whatever the command's exit code is.
    fn worked(&self) -> bool {
        self.result.is_ok() && !matches!(self.exec, Some(ForkExec::Error(_))) && self.deleted != Some(false)
    }
}

/// 201 if all worked, 207 with an entry for each if some did or there are forks, the first error if there is none.
fn answer(results: Vec<Forked>) -> Result<(StatusCode, axum::Json<ForkList>), ApiError> {
    let made = results.iter().any(|forked| forked.result.is_ok());
    let status = if results.iter().all(Forked::worked) {
        StatusCode::CREATED
    } else {
        StatusCode::MULTI_STATUS
    };
    let mut forks = Vec::with_capacity(results.len());
    for forked in results {
        let outcome = match forked.result {
            Ok(instance) => ForkOutcome::Instance(Box::new(instance)),
            Err(error) if !made => return Err(error),
            Err(error) => ForkOutcome::Error(*error.body),
        };
        forks.push(ForkEntry {
            name: forked.name,
            outcome,
            exec: forked.exec,
            deleted: forked.deleted,
        });
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

    fn forked(number: u32, result: Result<Instance, ApiError>) -> Forked {
        Forked {
            name: format!("web-{number}").parse().unwrap(),
            result,
            exec: None,
            deleted: None,
        }
    }

    fn answered<const N: usize>(results: [Result<Instance, ApiError>; N]) -> (u16, Vec<bool>) {
        let results = (1..).zip(results).map(|(number, result)| forked(number, result));
        let (status, list) = answer(results.collect()).unwrap();
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
    fn an_entry_for_each_if_a_command_could_not_be_run() {
        let lost = Forked {
            exec: Some(ForkExec::Error(*ApiError::invalid("lost").body)),
            deleted: Some(true),
            ..forked(1, made())
        };
        let (status, list) = answer(vec![lost]).unwrap();
        assert_eq!(status.as_u16(), 207);
        let entry = serde_json::to_value(&list.0.forks[0]).unwrap();
        assert_eq!(entry["exec"]["error"]["message"], "lost");
        assert_eq!(entry["instance"]["state"], "Running");
        assert_eq!(entry["deleted"], true);
    }

    #[test]
    fn the_error_if_none_worked() {
        let error = answer(vec![forked(1, failed()), forked(2, failed())]).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.body.message.as_str()),
            (400, "it failed")
        );
    }
}
