//! Images: add, list, show, remove.

use axum::extract::State;
use axum::http::StatusCode;
use stencil_core::ImageName;
use stencil_engine::Engine;

use crate::body::{Bare, Json, Reference};
use crate::error::ApiError;
use crate::reply::{Image, ImageList};
use crate::request::AddImage;

type Reply<T> = Result<axum::Json<T>, ApiError>;

pub(crate) async fn add(
    State(engine): State<Engine>,
    Json(asked): Json<AddImage>,
) -> Result<(StatusCode, axum::Json<Image>), ApiError> {
    let image = engine.add_image(asked.into()).await?;
    Ok((StatusCode::CREATED, axum::Json(image.into())))
}

pub(crate) async fn list(State(engine): State<Engine>, _: Bare) -> Reply<ImageList> {
    let images = engine.images().await?;
    Ok(axum::Json(ImageList {
        images: images.into_iter().map(Image::from).collect(),
    }))
}

pub(crate) async fn get(State(engine): State<Engine>, Reference(text): Reference, _: Bare) -> Reply<Image> {
    Ok(axum::Json(engine.image(name(&text)?).await?.into()))
}

pub(crate) async fn remove(
    State(engine): State<Engine>,
    Reference(text): Reference,
    _: Bare,
) -> Result<StatusCode, ApiError> {
    engine.remove_image(name(&text)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What cannot be a name is the name of no image.
fn name(text: &str) -> Result<ImageName, ApiError> {
    text.parse()
        .map_err(|reason| ApiError::not_found(format!("there is no image `{text}`: {reason}")))
}
