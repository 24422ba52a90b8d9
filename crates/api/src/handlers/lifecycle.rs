//! An instance's own life: each operation takes no body and answers with the instance.

use axum::extract::State;
use stencil_engine::Engine;

use crate::body::{Bare, Reference};
use crate::error::ApiError;
use crate::reply::Instance;

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

operations!(
    start,
    stop,
    pause,
    resume,
    standby,
    restore,
    promote,
    demote,
    record_hot_pages
);
