//! Images: the files that instances are made of, taken into the data directory under a name; `image.json` is the record.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::id::InstanceId;
use crate::layout::ImageDir;
use crate::metadata::DiskFormat;
use crate::name::{InstanceName, NameError};
use crate::versioned::{self, FormatError};

/// The name of an image. It has the form of an instance's name: it is also the name of a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageName(InstanceName);

impl ImageName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ImageName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// The record of one image. Its files lie beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// The version of this record's form: [`Image::SCHEMA`].
    pub schema: u32,
    /// Its name, also that of its directory.
    pub name: ImageName,
    /// When it was added.
    pub created_at: Timestamp,
    /// The kernel to boot.
    pub kernel: ImageFile,
    /// The initial ramdisk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<ImageFile>,
    /// Its disks, in the order in which a guest finds them; instances have layers of their own on them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<ImageDisk>,
    /// The kernel's command line, for instances that do not have their own.
    #[serde(default)]
    pub cmdline: String,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Image {
    /// The version of the form that is read and written.
    pub const SCHEMA: u32 = 1;

    /// Its files, each with its name in the image's directory.
    pub fn files(&self) -> impl Iterator<Item = (String, &ImageFile)> {
        let initrd = self
            .initrd
            .as_ref()
            .map(|initrd| (ImageDir::INITRD.to_owned(), initrd));
        let disks = self.disks.iter().enumerate();
        std::iter::once((ImageDir::KERNEL.to_owned(), &self.kernel))
            .chain(initrd)
            .chain(disks.map(|(number, disk)| (ImageDir::disk_name(number), &disk.file)))
    }

    /// Reads the content of an `image.json`.
    ///
    /// # Errors
    /// If it is no JSON, of another schema, or not of its schema's form.
    pub fn from_json(bytes: &[u8]) -> Result<Self, FormatError> {
        versioned::read(bytes, Self::SCHEMA)
    }

    /// The content of an `image.json`.
    ///
    /// # Errors
    /// None that is known: every field has a form in JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, FormatError> {
        versioned::write(self)
    }
}

/// A file of an image, as it was when it was taken. It is read-only from then on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Its size in bytes.
    pub bytes: u64,
    /// The SHA-256 of its content, in 64 hexadecimal digits.
    pub sha256: String,
}

/// A disk of an image.
///
/// In JSON one flat object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageDisk {
    /// Its file, which is the base of the layers that lie on it and is never written.
    #[serde(flatten)]
    pub file: ImageFile,
    /// What the file is.
    pub format: DiskFormat,
}

/// An instance that was made of an image, itself or as a fork, and needs its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageUser {
    /// Its id.
    pub id: InstanceId,
    /// Its name.
    pub name: InstanceName,
}
