//! An instance that is being made: it lies in `.new-<id>`, and does not exist before it is committed.

use std::fs;
use std::sync::Arc;

use crate::id::InstanceId;
use crate::layout::{DataDir, InstanceDir, SnapshotDir};
use crate::manifest::SnapshotManifest;
use crate::metadata::Metadata;
use crate::store::error::{IoContext, StoreError};
use crate::store::keeper::Keeper;
use crate::store::{Durability, atomic, json, snapshot};

/// An instance that is being made. Dropped without [`commit`](NewInstance::commit), it is removed.
///
/// A VMM may be started in its directory: a process whose working directory it is follows the rename.
#[derive(Debug)]
pub struct NewInstance {
    id: InstanceId,
    dir: InstanceDir,
    data: DataDir,
    images: Arc<Keeper>,
}

impl NewInstance {
    pub(super) fn begin(data: &DataDir, images: &Arc<Keeper>, id: InstanceId) -> Result<Self, StoreError> {
        let dir = data.new_instance(&id);
        atomic::create_dir(dir.path())?;
        Ok(Self {
            id,
            dir,
            data: data.clone(),
            images: Arc::clone(images),
        })
    }

    /// The id that it will have.
    #[must_use]
    pub fn id(&self) -> &InstanceId {
        &self.id
    }

    /// Where it lies until it is committed.
    #[must_use]
    pub fn dir(&self) -> &InstanceDir {
        &self.dir
    }

    /// Gives it the snapshot of another instance: `memory-ranges` as another name of the same file, the rest as
    /// copies, and a manifest of its own, with the same memory generation. It survives a power loss once the instance
    /// is committed [`Synced`](Durability::Synced).
    ///
    /// # Errors
    /// [`StoreError::BrokenSnapshot`] if the files are not what `manifest` says; [`StoreError::Io`].
    pub fn link_snapshot(
        &self,
        from: &SnapshotDir,
        manifest: &SnapshotManifest,
    ) -> Result<SnapshotManifest, StoreError> {
        snapshot::verify(from, manifest)?;
        let to = self.dir.snapshot();
        atomic::create_dir(to.path())?;
        for name in manifest.files.keys() {
            let (source, target) = (from.path().join(name), to.path().join(name));
            if name == SnapshotDir::MEMORY_RANGES {
                fs::hard_link(&source, &target).while_trying("link", &source)?;
            } else {
                fs::copy(&source, &target).while_trying("copy", &source)?;
            }
        }
        // From a list, like a fork's metadata: what this version does not know is not passed on.
        let own = SnapshotManifest {
            schema: SnapshotManifest::SCHEMA,
            created_at: manifest.created_at,
            hypervisor: manifest.hypervisor.clone(),
            hypervisor_version: manifest.hypervisor_version.clone(),
            host_cpu: manifest.host_cpu.clone(),
            memory_generation: manifest.memory_generation,
            memory_bytes: manifest.memory_bytes,
            frozen: manifest.frozen,
            files: manifest.files.clone(),
            other: serde_json::Map::new(),
        };
        snapshot::complete(&to, &own, &to.manifest())?;
        Ok(own)
    }

    /// Writes its record and lets it exist, by one rename.
    ///
    /// # Errors
    /// [`StoreError::WrongId`] if the record is another instance's; [`StoreError::NoImage`] if it names an image that is not
    /// there; [`StoreError::Unwritable`]; [`StoreError::Io`].
    /// It then does not exist.
    pub fn commit(self, metadata: &Metadata, durability: Durability) -> Result<InstanceDir, StoreError> {
        if metadata.id != self.id {
            return Err(StoreError::WrongId {
                id: self.id,
                found: metadata.id,
            });
        }
        let image = metadata.spec.image.as_ref();
        let images = Arc::clone(&self.images);
        let _kept = image.map(|image| images.keep(&self.data, image)).transpose()?;
        atomic::replace(&self.dir.metadata(), &json(metadata)?, durability)?;
        let target = self.data.instance(&self.id);
        fs::rename(self.dir.path(), target.path()).while_trying("create", target.path())?;
        if durability == Durability::Synced
            && let Err(error) = atomic::sync_dir(&self.data.instances())
        {
            // An error means that it does not exist: take its name back, and let drop remove it. If not even that
            // works, this error is still the one to tell.
            let _ = fs::rename(target.path(), self.dir.path());
            return Err(error);
        }
        Ok(target)
    }
}

impl Drop for NewInstance {
    fn drop(&mut self) {
        // After a commit there is nothing at this path. What cannot be removed now is swept at the next start.
        let _ = atomic::remove_all(self.dir.path());
    }
}
