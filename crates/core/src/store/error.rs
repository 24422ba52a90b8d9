//! What can go wrong with the data directory.

use std::io;
use std::path::{Path, PathBuf};

use crate::id::InstanceId;
use crate::image::{ImageName, ImageUser};
use crate::rules::some_of;
use crate::versioned::FormatError;

/// What went wrong with the data directory.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no instance with this id.
    #[error("there is no instance {id}")]
    NotFound {
        /// The id that was asked for.
        id: InstanceId,
    },
    /// There is an instance with this id, and its record cannot be read.
    #[error("the metadata of instance {id} cannot be read: repair {} or delete the instance", path.display())]
    Unreadable {
        /// The instance.
        id: InstanceId,
        /// Its record.
        path: PathBuf,
        /// Why.
        source: UnreadableCause,
    },
    /// The record cannot be written as JSON.
    #[error("the metadata of instance {id} cannot be written")]
    Unwritable {
        /// The instance.
        id: InstanceId,
        /// Why.
        source: FormatError,
    },
    /// A record was to be written into another instance's directory.
    #[error("the metadata of instance {found} is not that of the new instance {id}")]
    WrongId {
        /// The instance that is being made.
        id: InstanceId,
        /// The one that the record is of.
        found: InstanceId,
    },
    /// Not all records can be read, and each that cannot could be what was looked for: a fork of a template, or a user of an
    /// image.
    #[error(
        "it cannot be told whether anything depends on it: {}",
        mend(unreadable, strangers)
    )]
    Uncounted {
        /// The instances whose record cannot be read.
        unreadable: Vec<InstanceId>,
        /// What lies among the instances and is none.
        strangers: Vec<PathBuf>,
    },
    /// What was to be swept was not left over by a crash.
    #[error("{} is not left over: it is not removed", path.display())]
    NotALeftover {
        /// What it is.
        path: PathBuf,
    },
    /// A snapshot is not what its manifest says.
    #[error("the snapshot {} cannot be used: {reason}", path.display())]
    BrokenSnapshot {
        /// Its directory.
        path: PathBuf,
        /// What is wrong, as part of a sentence.
        reason: String,
    },
    /// There is no image of this name.
    #[error("there is no image `{name}`")]
    NoImage {
        /// The name that was asked for.
        name: ImageName,
    },
    /// There is an image of this name already.
    #[error("the name `{name}` is taken by another image; choose another one, or remove that image first")]
    ImageExists {
        /// The name.
        name: ImageName,
    },
    /// Instances were made of the image, and need its files.
    #[error(
        "cannot remove image {name} while instances were made of it: delete {} first",
        some_of(users.iter().map(|user| &user.name))
    )]
    ImageInUse {
        /// The image.
        name: ImageName,
        /// All of them.
        users: Vec<ImageUser>,
    },
    /// There is an image of this name, and it is not what its record says.
    #[error("image {name} cannot be used: {reason}; remove it, and add it again")]
    BrokenImage {
        /// The image.
        name: ImageName,
        /// What is wrong, as part of a sentence.
        reason: String,
    },
    /// Another server has the data directory.
    #[error("the data directory {} is in use by {}: stop that server, or choose another directory", data.display(), holder(*pid))]
    InUse {
        /// The data directory.
        data: PathBuf,
        /// The process that has it, if it has said so.
        pid: Option<u32>,
    },
    /// The data directory's path is so long that the sockets below it could not be reached.
    #[error(
        "the path of the data directory {} has {length} bytes, and at most {limit} leave room for the sockets below it: choose a shorter one",
        data.display()
    )]
    PathTooLong {
        /// The data directory.
        data: PathBuf,
        /// How many bytes its path has.
        length: usize,
        /// How many it may have.
        limit: usize,
    },
    /// The file system refused.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Why the record of an instance cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum UnreadableCause {
    /// The file is there and holds nothing, as a power loss leaves it.
    #[error("it is empty, as after a power loss")]
    Lost,
    /// The file is missing, or the file system refused.
    #[error(transparent)]
    Io(io::Error),
    /// Its content is not understood.
    #[error(transparent)]
    Format(FormatError),
    /// It is another instance's.
    #[error("it is that of instance {found}")]
    OtherId {
        /// The id in it.
        found: InstanceId,
    },
}

/// What has to be done about records that cannot be read, and about what is no instance.
fn mend(unreadable: &[InstanceId], strangers: &[PathBuf]) -> String {
    let mut steps = Vec::new();
    if !unreadable.is_empty() {
        let ids = some_of(unreadable.iter());
        steps.push(format!(
            "the metadata of these instances cannot be read, repair them or delete each by its id: {ids}"
        ));
    }
    if !strangers.is_empty() {
        let paths = some_of(strangers.iter().map(|path| path.display()));
        steps.push(format!(
            "move what is no instance out of the data directory: {paths}"
        ));
    }
    steps.join("; ")
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "another server".to_owned(),
        |pid| format!("the server with pid {pid}"),
    )
}

/// Says once, where it happens, what was tried with which file.
pub(super) trait IoContext<T> {
    fn while_trying(self, what: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn while_trying(self, what: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io {
            what,
            path: path.to_owned(),
            source: source.into(),
        })
    }
}
