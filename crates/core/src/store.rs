//! The data directory: reads and writes what it is told, and decides nothing.
//!
//! A crash at any point leaves each instance either before or after the operation:
//!
//! - An instance is made in `.new-<id>` and takes its name by one rename ([`NewInstance`]); so a directory `<id>` always
//!   has its metadata.
//! - An instance is removed by one rename to `.del-<id>`; ending its VMM and taking that apart is clean-up.
//! - Metadata is replaced by one rename (`atomic`). A record that was not [`Synced`](Durability::Synced) is empty after a power
//!   loss, until [`sync_records`] has reached it.
//! - An image is made and removed likewise ([`NewImage`]), and stays as long as a record names it.
//! - A snapshot exists from the rename of its manifest, which comes last, to that file's removal, which comes first. One that was
//!   prepared ([`Store::prepare_snapshot`]) is finished by that rename, as long as the host has not booted anew.
//!
//! What is left over is found by [`Store::leftovers`] when a server starts, and swept.
//!
//! Calls about different instances can be made at once. Of one instance, the caller lets at most one call write.

mod atomic;
mod boot;
mod error;
mod hot_pages;
mod images;
mod keeper;
mod leftovers;
mod lock;
mod new_instance;
mod power_loss;
mod snapshot;

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::id::InstanceId;
use crate::layout::{DataDir, InstanceDir, MAX_SOCKET_PATH};
use crate::metadata::Metadata;
use crate::rules::LiveFork;

use boot::Boot;
use error::IoContext;
use keeper::Keeper;
use lock::Lock;

pub use error::{StoreError, UnreadableCause};
pub use images::{NewImage, ScannedImage};
pub use new_instance::NewInstance;
pub use power_loss::sync_records;

/// What a write must survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A crash of the server: the new content is there as a whole or not at all.
    Renamed,
    /// Also a power loss right after the call.
    Synced,
}

/// One instance that a scan found.
#[derive(Debug)]
pub struct Scanned {
    /// Its id, from the name of its directory.
    pub id: InstanceId,
    /// Its record, or why it cannot be read.
    pub metadata: Result<Metadata, StoreError>,
}

/// An open data directory, locked against every other server until this value is dropped.
#[derive(Debug)]
pub struct Store {
    data: DataDir,
    boot: Boot,
    images: Arc<Keeper>,
    _lock: Lock,
}

impl Store {
    /// Opens the data directory at `data`, and makes it where it is missing.
    ///
    /// Paths that the store gives are absolute and free of symbolic links.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another server has it; [`StoreError::PathTooLong`] if the sockets of an instance could
    /// not be reached below it; [`StoreError::Io`].
    pub fn open(data: &Path) -> Result<Self, StoreError> {
        // The length is checked before anything is made.
        check_length(&resolve(data)?)?;
        atomic::create_dir_all(data)?;
        let data = DataDir::new(fs::canonicalize(data).while_trying("find", data)?);
        let lock = Lock::take(&data)?;
        atomic::create_dir_all(&data.instances())?;
        atomic::create_dir_all(&data.templates())?;
        atomic::create_dir_all(&data.images())?;
        let boot = Boot::of(&data)?;
        Ok(Self {
            data,
            boot,
            images: Arc::default(),
            _lock: lock,
        })
    }

    /// Where everything lies.
    #[must_use]
    pub fn data(&self) -> &DataDir {
        &self.data
    }

    /// Begins a new instance. It does not exist until [`NewInstance::commit`].
    ///
    /// # Errors
    /// [`StoreError::Io`], also where this id is being made already.
    pub fn begin(&self, id: InstanceId) -> Result<NewInstance, StoreError> {
        NewInstance::begin(&self.data, &self.images, id)
    }

    /// Reads the record of an instance.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such instance; [`StoreError::Unreadable`] if there is one, and its
    /// record is missing, damaged, of another version or another instance's.
    pub fn read(&self, id: &InstanceId) -> Result<Metadata, StoreError> {
        let dir = self.data.instance(id);
        let path = dir.metadata();
        let unreadable = |source| StoreError::Unreadable {
            id: *id,
            path: path.clone(),
            source,
        };
        let bytes = match atomic::read(&path) {
            Ok(bytes) => bytes,
            // The directory is looked at after the file: one that is gone now was removed as a whole.
            Err(error) if error.kind() == ErrorKind::NotFound && is_missing(dir.path()) => {
                return Err(StoreError::NotFound { id: *id });
            }
            Err(error) => return Err(unreadable(UnreadableCause::Io(error))),
        };
        // What a file holds whose content had not reached the disk when the power was cut.
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(unreadable(UnreadableCause::Lost));
        }
        let metadata =
            Metadata::from_json(&bytes).map_err(|error| unreadable(UnreadableCause::Format(error)))?;
        if metadata.id != *id {
            return Err(unreadable(UnreadableCause::OtherId { found: metadata.id }));
        }
        Ok(metadata)
    }

    /// Replaces the record of an instance.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such instance; [`StoreError::Unwritable`] if the record has no form in
    /// JSON; [`StoreError::Io`]. The old record stays, except where only the last sync failed.
    pub fn write(&self, metadata: &Metadata, durability: Durability) -> Result<(), StoreError> {
        let dir = self.data.instance(&metadata.id);
        if is_missing(dir.path()) {
            return Err(StoreError::NotFound { id: metadata.id });
        }
        atomic::replace(&dir.metadata(), &json(metadata)?, durability)
    }

    /// Sees that what is done to an instance can be recorded: that a file can be made in its directory. Nothing but trying tells that
    /// a file system has become read-only.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn check_writable(&self, id: &InstanceId) -> Result<(), StoreError> {
        atomic::try_to_write(self.data.instance(id).path())
    }

    /// Reads the records of all instances, in the order of their ids.
    ///
    /// Names that are no ids are passed over; they are told by [`Store::strangers`].
    ///
    /// # Errors
    /// [`StoreError::Io`] if the directory itself cannot be read.
    pub fn scan(&self) -> Result<Vec<Scanned>, StoreError> {
        let ids = self.entries()?.into_iter().filter_map(|entry| entry.id);
        Ok(ids.filter_map(|id| self.scan_one(id)).collect())
    }

    /// What lies among the instances and is none. As long as it does, [`Store::live_forks`] fails.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the directory of instances cannot be read.
    pub fn strangers(&self) -> Result<Vec<PathBuf>, StoreError> {
        let strangers = self.entries()?.into_iter().filter(|entry| entry.id.is_none());
        Ok(strangers.map(|entry| entry.path).collect())
    }

    /// Counts the forks of a template from the records on disk, in the order of their ids.
    ///
    /// What cannot be read could be a fork: it is an error, never zero. Only the template's own record is not looked at.
    ///
    /// # Errors
    /// [`StoreError::Uncounted`] with all that could be a fork and cannot be read; [`StoreError::Io`].
    pub fn live_forks(&self, template: &InstanceId) -> Result<Vec<LiveFork>, StoreError> {
        let mut forks = Vec::new();
        // No instance is a fork of its own, so its record need not be readable for this.
        let seen = self.visit_records(Some(template), fork_of(template, &mut forks))?;
        seen.all().map(|()| forks)
    }

    /// The forks of a template among the records that can be read, in the order of their ids. It suffices to delete an instance
    /// whose own record cannot be read: what other damaged records were is not to be known, and two of them must not keep each
    /// other for ever.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the directory of instances cannot be read.
    pub fn known_forks(&self, template: &InstanceId) -> Result<Vec<LiveFork>, StoreError> {
        let mut forks = Vec::new();
        self.visit_records(Some(template), fork_of(template, &mut forks))?;
        Ok(forks)
    }

    /// Shows every record that can be read but that of one instance, and tells what could not be read.
    fn visit_records(
        &self,
        but: Option<&InstanceId>,
        mut visit: impl FnMut(Metadata),
    ) -> Result<Seen, StoreError> {
        let mut seen = Seen::default();
        for Entry { path, id } in self.entries()? {
            let Some(id) = id else {
                seen.strangers.push(path);
                continue;
            };
            if but == Some(&id) {
                continue;
            }
            match self.scan_one(id).map(|scanned| scanned.metadata) {
                Some(Ok(metadata)) => visit(metadata),
                Some(Err(_)) => seen.unreadable.push(id),
                None => {}
            }
        }
        Ok(seen)
    }

    /// Removes an instance, whether its record can be read or not, and what is kept for it as a template.
    ///
    /// # Errors
    /// As [`Store::begin_removal`]; [`StoreError::Io`] if it fails half-way: the instance is gone, and what is left over is swept
    /// at the next start.
    pub fn remove(&self, id: &InstanceId) -> Result<(), StoreError> {
        self.begin_removal(id)?;
        self.finish_removal(id)
    }

    /// Lets an instance exist no longer, by one rename, and says where its files are. A process that works there goes on; if the
    /// server dies now, the next one ends it and sweeps the files.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Io`]. It then is as it was.
    pub fn begin_removal(&self, id: &InstanceId) -> Result<InstanceDir, StoreError> {
        let (path, deleted) = (
            self.data.instance(id).path().to_owned(),
            self.data.deleted_instance(id),
        );
        match fs::rename(&path, &deleted) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(StoreError::NotFound { id: *id });
            }
            renamed => renamed.while_trying("remove", &path)?,
        }
        if let Err(error) = atomic::sync_dir(&self.data.instances()) {
            // An error means that it is as it was. If not even that works, this error is still the one to tell.
            let _ = fs::rename(&deleted, &path);
            return Err(error);
        }
        Ok(InstanceDir::new(deleted))
    }

    /// Lets an instance exist again whose removal was begun.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn undo_removal(&self, id: &InstanceId) -> Result<(), StoreError> {
        let path = self.data.instance(id).path().to_owned();
        fs::rename(self.data.deleted_instance(id), &path).while_trying("bring back", &path)?;
        atomic::sync_dir(&self.data.instances())
    }

    /// Removes the files of an instance whose removal was begun.
    ///
    /// # Errors
    /// [`StoreError::Io`]. What is left over is swept at the next start.
    pub fn finish_removal(&self, id: &InstanceId) -> Result<(), StoreError> {
        self.sweep(&self.data.deleted_instance(id))
    }

    /// What lies in the directory of instances, sorted; names that begin with a dot are no instances.
    fn entries(&self) -> Result<Vec<Entry>, StoreError> {
        let paths = atomic::list(&self.data.instances())?;
        let mut entries: Vec<Entry> = paths
            .into_iter()
            .filter(|path| !path.file_name().unwrap_or_default().as_bytes().starts_with(b"."))
            .map(|path| Entry {
                id: name_of(&path).and_then(|name| name.parse().ok()),
                path,
            })
            .collect();
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }

    /// Nothing, if it was removed since it was listed.
    fn scan_one(&self, id: InstanceId) -> Option<Scanned> {
        match self.read(&id) {
            Err(StoreError::NotFound { .. }) => None,
            metadata => Some(Scanned { id, metadata }),
        }
    }
}

struct Entry {
    path: PathBuf,
    id: Option<InstanceId>,
}

/// What a look at all records could not read.
#[derive(Default)]
struct Seen {
    unreadable: Vec<InstanceId>,
    strangers: Vec<PathBuf>,
}

impl Seen {
    /// A decision that relies on having seen all is not made without.
    fn all(self) -> Result<(), StoreError> {
        let Self {
            unreadable,
            strangers,
        } = self;
        if unreadable.is_empty() && strangers.is_empty() {
            return Ok(());
        }
        Err(StoreError::Uncounted {
            unreadable,
            strangers,
        })
    }
}

fn fork_of<'a>(template: &'a InstanceId, forks: &'a mut Vec<LiveFork>) -> impl FnMut(Metadata) + 'a {
    |metadata| {
        if metadata.fork_of_template == Some(*template) {
            forks.push(LiveFork {
                id: metadata.id,
                name: metadata.name,
            });
        }
    }
}

fn name_of(path: &Path) -> Option<&str> {
    path.file_name().and_then(OsStr::to_str)
}

fn json(metadata: &Metadata) -> Result<Vec<u8>, StoreError> {
    metadata.to_json().map_err(|source| StoreError::Unwritable {
        id: metadata.id,
        source,
    })
}

/// Only a definite "no": where it cannot be told, the thing counts as there.
fn is_missing(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// The path that `data` will have once it exists: absolute, without symbolic links in the part that exists.
fn resolve(data: &Path) -> Result<PathBuf, StoreError> {
    let absolute = std::path::absolute(data).while_trying("find", data)?;
    for ancestor in absolute.ancestors() {
        if let (Ok(real), Ok(rest)) = (fs::canonicalize(ancestor), absolute.strip_prefix(ancestor)) {
            return Ok(real.join(rest));
        }
    }
    Ok(absolute)
}

/// The longest socket path below `data` is that of a new instance's console.
fn check_length(data: &Path) -> Result<(), StoreError> {
    let console = DataDir::new(data)
        .new_instance(&InstanceId::generate())
        .console_socket();
    let (length, below) = (
        data.as_os_str().len(),
        console.as_os_str().len() - data.as_os_str().len(),
    );
    let limit = MAX_SOCKET_PATH - below;
    if length > limit {
        return Err(StoreError::PathTooLong {
            data: data.to_owned(),
            length,
            limit,
        });
    }
    Ok(())
}
