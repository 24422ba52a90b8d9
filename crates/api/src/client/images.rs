//! The client's methods for images.

use bytes::Bytes;
use hyper::Method;
use percent_encoding::utf8_percent_encode;

use super::{Client, RESERVED, Result};
use crate::reply::{Image, ImageList};
use crate::request::AddImage;

impl Client {
    /// `POST /images`
    ///
    /// # Errors
    /// [`ClientError`](super::ClientError); refused with `invalid_request` or `name_conflict`.
    pub async fn add_image(&self, asked: &AddImage) -> Result<Image> {
        self.tell(Method::POST, "/images", asked).await
    }

    /// `GET /images`
    ///
    /// # Errors
    /// [`ClientError`](super::ClientError).
    pub async fn images(&self) -> Result<Vec<Image>> {
        let list: ImageList = self.ask(Method::GET, "/images").await?;
        Ok(list.images)
    }

    /// `GET /images/{name}`
    ///
    /// # Errors
    /// [`ClientError`](super::ClientError); refused with `not_found` or `broken_image`.
    pub async fn image(&self, name: &str) -> Result<Image> {
        self.ask(Method::GET, &image(name)).await
    }

    /// `DELETE /images/{name}`
    ///
    /// # Errors
    /// [`ClientError`](super::ClientError); refused with `not_found` or `image_in_use`.
    pub async fn remove_image(&self, name: &str) -> Result<()> {
        self.send(Method::DELETE, &image(name), None, Bytes::new())
            .await
            .map(drop)
    }
}

/// The path of an image's route.
fn image(name: &str) -> String {
    format!("/images/{}", utf8_percent_encode(name, RESERVED))
}
