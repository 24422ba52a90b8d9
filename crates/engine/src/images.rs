//! Images: what instances are made of, kept by name.

use std::fs::File;
use std::path::Path;

use stencil_core::{Image, ImageDir, ImageDisk, ImageName, NewImage, ScannedImage, Store};

use crate::admission::{check_cmdline, check_disk, check_disk_count, check_disk_file, check_kernel, open};
use crate::lifecycle::detached;
use crate::{Engine, EngineError, ImageRequest};

impl Engine {
    /// Takes the files of an image into the data directory, as clones where the file system can do that. They are read-only
    /// there, and what becomes of the files that were named is of no matter.
    ///
    /// # Errors
    ///
    /// [`EngineError::Invalid`] for files that this host cannot boot, and disks that are none; [`EngineError::Store`] if there is an image of that
    /// name, or there is no room. There is then no new image.
    pub async fn add_image(&self, request: ImageRequest) -> Result<Image, EngineError> {
        let engine = self.clone();
        detached(async move { engine.on_disk(move |store| Ok(add(store, request))).await? }).await
    }

    /// All images, in the order of their names.
    ///
    /// # Errors
    ///
    /// [`EngineError::Store`] if they cannot be listed.
    pub async fn images(&self) -> Result<Vec<ScannedImage>, EngineError> {
        self.on_disk(Store::images).await
    }

    /// One image.
    ///
    /// # Errors
    ///
    /// [`EngineError::Store`] if there is none of that name, or it cannot be used.
    pub async fn image(&self, name: ImageName) -> Result<Image, EngineError> {
        self.on_disk(move |store| store.image(&name)).await
    }

    /// Removes an image that no instance was made of.
    ///
    /// # Errors
    ///
    /// [`EngineError::Store`] if there is none of that name, if instances were made of it, or if that cannot be told.
    pub async fn remove_image(&self, name: ImageName) -> Result<(), EngineError> {
        let engine = self.clone();
        detached(async move { engine.on_disk(move |store| store.remove_image(&name)).await }).await
    }
}

fn add(store: &Store, request: ImageRequest) -> Result<Image, EngineError> {
    let ImageRequest {
        name,
        kernel,
        initrd,
        disks,
        cmdline,
    } = request;
    let found = check_kernel("kernel", &open("kernel", &kernel)?, &kernel)?;
    check_cmdline(&cmdline, &found, &kernel)?;
    if let Some(initrd) = &initrd {
        open("initrd", initrd)?;
    }
    check_disk_count(disks.len())?;
    for disk in &disks {
        check_disk(disk)?;
    }
    let new = store.begin_image(&name)?;
    let image = Image {
        schema: Image::SCHEMA,
        name,
        created_at: jiff::Timestamp::now(),
        kernel: new.take(&kernel, ImageDir::KERNEL)?,
        initrd: initrd
            .map(|initrd| new.take(&initrd, ImageDir::INITRD))
            .transpose()?,
        disks: disks
            .iter()
            .enumerate()
            .map(|(number, disk)| take_disk(&new, number, disk))
            .collect::<Result<_, _>>()?,
        cmdline,
        other: serde_json::Map::new(),
    };
    // The one that was taken: the other may be another one by now.
    let taken = new.dir().kernel();
    let taken = File::open(&taken).map_err(EngineError::io("read", &taken))?;
    let found = check_kernel("kernel", &taken, &kernel)?;
    check_cmdline(&image.cmdline, &found, &kernel)?;
    new.commit(&image)?;
    Ok(image)
}

/// Takes a disk; what it is, is told of the file that was taken.
fn take_disk(new: &NewImage, number: usize, disk: &Path) -> Result<ImageDisk, EngineError> {
    let file = new.take(disk, &ImageDir::disk_name(number))?;
    // Nobody who began to write meanwhile and still does, for then it was not taken as it was at any time.
    check_disk(disk)?;
    let taken = new.dir().disk(number);
    let taken = File::open(&taken).map_err(EngineError::io("read", &taken))?;
    let format = check_disk_file(&taken, disk)?.format;
    Ok(ImageDisk { file, format })
}
