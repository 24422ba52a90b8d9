//! What a crash left behind: found and swept when a server starts.

use std::path::{Path, PathBuf};

use crate::layout::{DEL_PREFIX, InstanceDir, TEMPORARY_PREFIX, is_leftover_name};
use crate::store::error::StoreError;
use crate::store::{Store, atomic, name_of};

impl Store {
    /// Finds what a crash left of instances and images: `.new-*` and `.del-*` directories, and files that did not take their name.
    ///
    /// To be asked when a server starts: later it also finds what is being made.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the directory of instances or that of images cannot be read.
    pub fn leftovers(&self) -> Result<Vec<PathBuf>, StoreError> {
        let instances = self.data.instances();
        let mut found = atomic::list(&self.data.images())?;
        found.retain(|path| self.is_leftover(path));
        for path in atomic::list(&instances)? {
            if self.is_leftover(&path) {
                found.push(path);
            } else {
                let snapshot = InstanceDir::new(&path).snapshot();
                for dir in [path.as_path(), snapshot.path()] {
                    // One that cannot be read keeps what is left over in it, and keeps no server from starting.
                    let inside = atomic::list(dir).unwrap_or_default();
                    found.extend(inside.into_iter().filter(|path| self.is_leftover(path)));
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Removes what [`Store::leftovers`] found.
    ///
    /// # Errors
    /// [`StoreError::NotALeftover`] for any other path; [`StoreError::Io`].
    pub fn sweep(&self, leftover: &Path) -> Result<(), StoreError> {
        if !self.is_leftover(leftover) {
            return Err(StoreError::NotALeftover {
                path: leftover.to_owned(),
            });
        }
        // First what is kept elsewhere for a removed template: as long as its directory is here, it is found again.
        if let Some(id) = name_of(leftover).and_then(|name| name.strip_prefix(DEL_PREFIX)?.parse().ok()) {
            atomic::remove_all(&self.data.template(&id))?;
        }
        atomic::remove_all(leftover)
    }

    fn is_leftover(&self, path: &Path) -> bool {
        let Some(name) = name_of(path) else { return false };
        if name.starts_with(TEMPORARY_PREFIX) {
            return path.starts_with(self.data.instances());
        }
        is_leftover_name(name)
            && [self.data.instances(), self.data.images()]
                .iter()
                .any(|dir| path.parent() == Some(dir))
    }
}
