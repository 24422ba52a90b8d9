//! Images, as they are told over the wire.

use stencil_core::{ScannedImage, error_chain};

use super::{Image, ImageDisk, ImageFile};

impl From<stencil_core::Image> for Image {
    fn from(image: stencil_core::Image) -> Self {
        Self {
            name: image.name,
            error: None,
            created_at: Some(image.created_at),
            kernel: Some(image.kernel.into()),
            initrd: image.initrd.map(ImageFile::from),
            disks: Some(image.disks.into_iter().map(ImageDisk::from).collect()),
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
                disks: None,
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

impl From<stencil_core::ImageDisk> for ImageDisk {
    fn from(disk: stencil_core::ImageDisk) -> Self {
        Self {
            format: disk.format,
            file: disk.file.into(),
        }
    }
}
