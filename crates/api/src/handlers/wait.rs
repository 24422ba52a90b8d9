//! Waiting for a state.

use axum::extract::State;
use stencil_engine::Engine;

use crate::body::{Asked, Reference};
use crate::error::ApiError;
use crate::reply::Waited;
use crate::request::WaitFor;
use crate::routes::Closing;

pub(crate) async fn wait(
    State(engine): State<Engine>,
    State(closing): State<Closing>,
    Reference(id): Reference,
    Asked(asked): Asked<WaitFor>,
) -> Result<axum::Json<Waited>, ApiError> {
    tokio::select! {
        outcome = engine.wait(&id, asked.state, asked.timeout.duration()) => {
            let outcome = outcome?;
            Ok(axum::Json(Waited { reached: outcome.reached, instance: outcome.instance.into() }))
        }
        () = closing.begun() => Err(ApiError::shutting_down()),
    }
}
