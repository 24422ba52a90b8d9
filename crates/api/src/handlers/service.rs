//! The server itself: is it there, which version is it, and what can it run instances on.

use axum::Json;
use axum::extract::State;
use stencil_engine::Engine;

use crate::body::Bare;
use crate::reply::{Health, HypervisorList, Version};

pub(crate) async fn health(_: Bare) -> Json<Health> {
    Json(Health {
        status: "ok".to_owned(),
    })
}

pub(crate) async fn version(_: Bare) -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

pub(crate) async fn hypervisors(State(engine): State<Engine>, _: Bare) -> Json<HypervisorList> {
    Json(HypervisorList {
        hypervisors: engine.hypervisors().map(Into::into).collect(),
    })
}
