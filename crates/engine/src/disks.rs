//! An instance's disks: layers of its own on a base that is never written.
//!
//! ```text
//!   base <── disk0-0.qcow2 <── disk0-1.qcow2 <── disk0.qcow2      the last one is what the guest writes
//! ```
//!
//! The layers of an instance lie in its own directory, in one chain. A fork has other names of the same files there, and
//! the source's last layer as its last but one, so that it needs nothing of its source's directory. **A layer with more than
//! one name is never written again**: whoever brings up the VM of such an instance first puts a new layer on it. An instance
//! that nobody has forked goes on with the layer that it has, so that its chain does not grow by standby and restore.
//!
//! Layers are made, linked and looked at under the instance's lock, while it has no VMM: exclusively to write, side by side to
//! be forked. A crash at any step leaves the disk's content as it was.
//!
//! Where an instance's record is to survive a power loss, so are its layers, before the record and before the snapshot that they
//! go with ([`sync`], [`close`]). All of this waits for the disk: it is done off the async threads.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use stencil_core::{DiskFormat, DiskSpec, Durability, InstanceDir, VmSpec};

use crate::admission::{open, utf8};
use crate::disk_image::{is_open, layer_size, make_layer};
use crate::{EngineError, disk_image};

/// Whether there are layers: disks that the guest writes, and that its memory goes with.
pub(crate) fn are_written(spec: &VmSpec) -> bool {
    written(spec).next().is_some()
}

/// The first layers of a new instance, on its bases.
pub(crate) fn make_first(dir: &InstanceDir, spec: &VmSpec) -> Result<(), EngineError> {
    for (disk, base) in written(spec) {
        let path = dir.disk(disk);
        // It was found whole when the instance was admitted.
        let size = disk_image::look_at(&open("disk", &base.path)?)
            .map_err(|why| EngineError::Invalid(format!("disk `{}` {why}", base.path.display())))?
            .disk_bytes;
        make_layer(&path, utf8(&base.path)?, base.format, size).map_err(EngineError::io("make", path))?;
    }
    Ok(())
}

/// Sees that nobody else has the layers that the guest is going to write. Each step is synced before the next one relies on it.
pub(crate) fn make_own(dir: &InstanceDir, spec: &VmSpec) -> Result<(), EngineError> {
    let mut shared = Vec::new();
    for (disk, _) in written(spec) {
        let path = dir.disk(disk);
        let names = fs::metadata(&path)
            .map_err(EngineError::io("read", &path))?
            .nlink();
        if names > 1 {
            let layer = last_layer(dir, disk)?;
            link(&path, &dir.frozen_disk(disk, layer))?;
            shared.push((disk, layer));
        }
    }
    if shared.is_empty() {
        return Ok(());
    }
    sync(dir, spec)?;
    for (disk, layer) in shared {
        put_on(dir, disk, layer, Durability::Synced)?;
    }
    sync(dir, spec)
}

/// The layers of a fork in `to`, of an instance in `from` whose guest does not write.
pub(crate) fn fork(from: &InstanceDir, to: &InstanceDir, spec: &VmSpec) -> Result<(), EngineError> {
    for (disk, _) in written(spec) {
        let last = last_layer(from, disk)?;
        for layer in 0..last {
            link(&from.frozen_disk(disk, layer), &to.frozen_disk(disk, layer))?;
        }
        link(&from.disk(disk), &to.frozen_disk(disk, last))?;
        put_on(to, disk, last, Durability::Renamed)?;
    }
    Ok(())
}

/// Makes all layers survive a power loss, with what they hold by now and with their names.
pub(crate) fn sync(dir: &InstanceDir, spec: &VmSpec) -> Result<(), EngineError> {
    for (disk, _) in written(spec) {
        for layer in 0..last_layer(dir, disk)? {
            sync_one(&dir.frozen_disk(disk, layer))?;
        }
        sync_one(&dir.disk(disk))?;
    }
    if are_written(spec) {
        sync_one(dir.path())?;
    }
    Ok(())
}

/// Makes what the guest wrote survive a power loss, after its VMM has ended.
///
/// # Errors
/// [`EngineError::DiskLost`] if the VMM or the host did not write down all of it. Any other error tells nothing about the disk.
pub(crate) fn close(dir: &InstanceDir, spec: &VmSpec) -> Result<(), EngineError> {
    for (disk, _) in written(spec) {
        let path = dir.disk(disk);
        let file = File::open(&path).map_err(unreadable(disk, &path))?;
        // The kernel tells once that something could not be written: asked again, it would say that all is well.
        if let Err(error) = file.sync_all() {
            tracing::error!(path = %path.display(), %error, "a disk could not be written down");
            return Err(EngineError::DiskLost(disk));
        }
        if is_open(&path).map_err(unreadable(disk, &path))? {
            return Err(EngineError::DiskLost(disk));
        }
    }
    Ok(())
}

/// A layer that is gone or damaged will never be what a snapshot goes with; any other error tells nothing about it.
fn unreadable(disk: usize, path: &Path) -> impl FnOnce(io::Error) -> EngineError {
    move |error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::InvalidData | ErrorKind::UnexpectedEof => {
            EngineError::DiskLost(disk)
        }
        _ => EngineError::io("read", path)(error),
    }
}

/// That the disks are as their snapshot has them, as far as they tell: that their VMM has written down what it had in memory.
///
/// # Errors
/// [`EngineError::DiskLost`] if they are not.
pub(crate) fn check_closed(dir: &InstanceDir, spec: &VmSpec) -> Result<(), EngineError> {
    for (disk, _) in written(spec) {
        let path = dir.disk(disk);
        if is_open(&path).map_err(EngineError::io("read", &path))? {
            return Err(EngineError::DiskLost(disk));
        }
    }
    Ok(())
}

/// Of how many files each disk of a fork of the instance in `dir` consists, its base counted; the most of them.
pub(crate) fn layers_of_fork(dir: &InstanceDir, spec: &VmSpec) -> Result<usize, EngineError> {
    let mut most = 0;
    for (disk, _) in written(spec) {
        // The base, those before the last, the last, and a new one.
        most = most.max(1 + last_layer(dir, disk)? + 2);
    }
    Ok(most)
}

/// The disks that the guest can write, with their numbers.
fn written(spec: &VmSpec) -> impl Iterator<Item = (usize, &DiskSpec)> {
    spec.disks.iter().enumerate().filter(|(_, disk)| !disk.read_only)
}

/// The number under which the layer that the guest writes is kept when it is frozen: how many lie below it.
fn last_layer(dir: &InstanceDir, disk: usize) -> Result<usize, EngineError> {
    let mut layer = 0;
    loop {
        let path = dir.frozen_disk(disk, layer);
        match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(layer),
            // What a crash left that came between the freezing of a layer and the making of the next.
            Ok(found) if is_same(&found, &dir.disk(disk)).map_err(EngineError::io("read", &path))? => {
                return Ok(layer);
            }
            Ok(_) => layer += 1,
            Err(error) => return Err(EngineError::io("read", path)(error)),
        }
    }
}

fn is_same(one: &fs::Metadata, other: &Path) -> io::Result<bool> {
    let other = fs::metadata(other)?;
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Gives a layer another name; it may have it already.
fn link(layer: &Path, name: &Path) -> Result<(), EngineError> {
    match fs::hard_link(layer, name) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(EngineError::io("link", layer)(error)),
        _ => Ok(()),
    }
}

fn sync_one(path: &Path) -> Result<(), EngineError> {
    let file = File::open(path);
    file.and_then(|file| file.sync_all())
        .map_err(EngineError::io("sync", path))
}

/// Puts a new layer for the guest on the frozen one of this number.
fn put_on(dir: &InstanceDir, disk: usize, layer: usize, durability: Durability) -> Result<(), EngineError> {
    let (new, path) = (dir.new_disk(disk), dir.disk(disk));
    let size = layer_size(&dir.frozen_disk(disk, layer));
    let backing = InstanceDir::frozen_disk_name(disk, layer);
    size.and_then(|size| make_layer(&new, &backing, DiskFormat::Qcow2, size))
        .map_err(EngineError::io("make", &path))?;
    if durability == Durability::Synced {
        sync_one(&new)?;
    }
    fs::rename(&new, &path).map_err(EngineError::io("make", path))
}
