//! Which boot of the host this is, and in which one the data directory was last used.

use std::fs;
use std::path::Path;

use crate::layout::DataDir;
use crate::store::error::{IoContext, StoreError};
use crate::store::{Durability, Store, atomic};

/// Where Linux tells the id of the boot: random(4).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The boot of the host.
#[derive(Debug)]
pub(super) struct Boot {
    id: String,
    is_another: bool,
}

impl Boot {
    /// This boot, compared with the one that the data directory remembers.
    pub(super) fn of(data: &DataDir) -> Result<Self, StoreError> {
        let id = fs::read_to_string(BOOT_ID).while_trying("read", Path::new(BOOT_ID))?;
        let id = id.trim_end().to_owned();
        // A directory that remembers none, or none that can be read, has not certainly seen another one.
        let before = atomic::read(&data.boot()).unwrap_or_default();
        let before = before.trim_ascii_end();
        let is_another = !before.is_empty() && before != id.as_bytes();
        Ok(Self { id, is_another })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

impl Store {
    /// Whether the host has certainly booted anew since [`Store::remember_boot`] was last called.
    #[must_use]
    pub fn is_first_of_boot(&self) -> bool {
        self.boot.is_another
    }

    /// Remembers this boot, when what the last one left has been swept.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remember_boot(&self) -> Result<(), StoreError> {
        let path = self.data.boot();
        if atomic::read(&path).is_ok_and(|known| known == self.boot.id.as_bytes()) {
            return Ok(());
        }
        atomic::replace(&path, self.boot.id.as_bytes(), Durability::Synced)
    }
}
