//! The table of routes.

use axum::extract::FromRef;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use axum::{Router, middleware};
use stencil_engine::Engine;

use crate::closing::Closing;
use crate::error::ApiError;
use crate::guard::{Guard, guarded};
use crate::handlers::{console, exec, forks, images, instances, lifecycle, service, wait};
use crate::log;

/// What handlers work with.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) engine: Engine,
    pub(crate) closing: Closing,
}

impl FromRef<App> for Engine {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

impl FromRef<App> for Closing {
    fn from_ref(app: &App) -> Self {
        app.closing.clone()
    }
}

/// All routes, in front of one engine and behind a guard.
pub(crate) fn router(app: App, guard: Guard) -> Router {
    Router::new()
        .route("/health", get(service::health))
        .route("/version", get(service::version))
        .route("/hypervisors", get(service::hypervisors))
        .route("/images", get(images::list).post(images::add))
        .route("/images/{name}", get(images::get).delete(images::remove))
        .route("/instances", get(instances::list).post(instances::create))
        .route(
            "/instances/{id}",
            get(instances::get)
                .patch(lifecycle::change)
                .delete(instances::delete),
        )
        .route("/instances/{id}/start", post(lifecycle::start))
        .route("/instances/{id}/stop", post(lifecycle::stop))
        .route("/instances/{id}/pause", post(lifecycle::pause))
        .route("/instances/{id}/resume", post(lifecycle::resume))
        .route("/instances/{id}/standby", post(lifecycle::standby))
        .route("/instances/{id}/restore", post(lifecycle::restore))
        .route("/instances/{id}/promote-template", post(lifecycle::promote))
        .route("/instances/{id}/demote-template", post(lifecycle::demote))
        .route(
            "/instances/{id}/hot-pages/record",
            post(lifecycle::record_hot_pages),
        )
        .route("/instances/{id}/fork", post(forks::one))
        .route("/instances/{id}/forks", post(forks::many))
        .route("/instances/{id}/wait", get(wait::wait))
        .route("/instances/{id}/exec", get(exec::stream).post(exec::run))
        .route("/instances/{id}/console", get(console::read).post(console::write))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .with_state(app)
        .layer(middleware::from_fn_with_state(guard, guarded))
        .layer(middleware::from_fn(log::logged))
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no route {}", uri.path()))
}

async fn unknown_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(format!(
        "{} cannot be asked with {method}; the allow header says how",
        uri.path()
    ))
}
