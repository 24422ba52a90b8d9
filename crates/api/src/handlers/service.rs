//! The server itself: is it there, and which version is it.

use axum::Json;

use crate::body::Bare;
use crate::reply::{Health, Version};

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
