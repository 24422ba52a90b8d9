//! The hot pages that are kept for templates.

use std::fs;
use std::path::PathBuf;

use crate::id::InstanceId;
use crate::layout::InstanceDir;
use crate::store::error::{IoContext, StoreError};
use crate::store::{Store, atomic};

impl Store {
    /// Takes the hot pages that were recorded in the fork at `dir`, as those of `template`; says where they are. They
    /// replace what the template had. When this returns, they survive a power loss.
    ///
    /// # Errors
    /// [`StoreError::Io`]; then the template has what it had.
    pub fn keep_hot_pages(&self, template: &InstanceId, dir: &InstanceDir) -> Result<PathBuf, StoreError> {
        let (recorded, kept) = (dir.recorded_hot_pages(), self.data.hot_pages(template));
        let home = self.data.template(template);
        atomic::create_dir_all(&home)?;
        atomic::sync_file(&recorded)?;
        fs::rename(&recorded, &kept).while_trying("take", &recorded)?;
        atomic::sync_dir(&home)?;
        Ok(kept)
    }

    /// Removes the hot pages of a template; none is fine.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn discard_hot_pages(&self, template: &InstanceId) -> Result<(), StoreError> {
        atomic::remove_all(&self.data.template(template))
    }
}
