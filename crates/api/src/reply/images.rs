//! Images, as they are told over the wire.

use stencil_core::{ScannedImage, error_chain};

use super::{Image, ImageFile};

impl From<stencil_core::Image> for Image {
    fn from(image: stencil_core::Image) -> Self {
        Self {
            name: image.name,
            error: None,
            created_at: Some(image.created_at),
            kernel: Some(image.kernel.into()),
            initrd: image.initrd.map(ImageFile::from),
            cmdline: Some(image.cmdline),
        }
    }
}

impl From<ScannedImage> for Image {
    fn from(found: ScannedImage) -> Self {
        match found.image {
            Ok(image) => image.into(),
            Err(error) => Self {
                name: found.name,
                error: Some(error_chain(&error)),
                created_at: None,
                kernel: None,
                initrd: None,
                cmdline: None,
            },
        }
    }
}

impl From<stencil_core::ImageFile> for ImageFile {
    fn from(file: stencil_core::ImageFile) -> Self {
        Self {
            bytes: file.bytes,
            sha256: file.sha256,
        }
    }
}
