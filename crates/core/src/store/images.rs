//! Images on disk. A record never names an image that is not there: an instance is committed only while its image is, and
//! an image is removed only while no record on disk names it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::error_chain;
use crate::image::{Image, ImageFile, ImageName, ImageUser};
use crate::layout::{DEL_PREFIX, DataDir, ImageDir, NEW_PREFIX};
use crate::store::error::{IoContext, StoreError};
use crate::store::{Durability, Store, atomic, is_missing, name_of, snapshot};

/// Makes the names of images distinct that are being made or removed; what an earlier process left is swept before.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// How much of a file is read at once for its SHA-256, in bytes.
const READ_AT_ONCE: usize = 1 << 20;

/// One image that a scan found.
#[derive(Debug)]
pub struct ScannedImage {
    /// Its name, from that of its directory.
    pub name: ImageName,
    /// Its record, or why it cannot be used.
    pub image: Result<Image, StoreError>,
}

impl Store {
    /// Begins a new image of this name. It does not exist until [`NewImage::commit`].
    ///
    /// # Errors
    /// [`StoreError::ImageExists`], before anything is copied; [`StoreError::Io`].
    pub fn begin_image(&self, name: &ImageName) -> Result<NewImage, StoreError> {
        if !is_missing(self.data.image(name).path()) {
            return Err(StoreError::ImageExists { name: name.clone() });
        }
        let dir = ImageDir::new(numbered(&self.data, NEW_PREFIX));
        atomic::create_dir(dir.path())?;
        Ok(NewImage {
            dir,
            data: self.data.clone(),
        })
    }

    /// Reads the record of an image, and sees that its files are there in their sizes.
    ///
    /// # Errors
    /// [`StoreError::NoImage`] if there is none; [`StoreError::BrokenImage`] if it cannot be used.
    pub fn image(&self, name: &ImageName) -> Result<Image, StoreError> {
        let dir = self.data.image(name);
        let broken = |reason| StoreError::BrokenImage {
            name: name.clone(),
            reason,
        };
        let bytes = match atomic::read(&dir.record()) {
            Ok(bytes) => bytes,
            // The directory is looked at after the file: one that is gone now was removed as a whole.
            Err(error) if error.kind() == ErrorKind::NotFound && is_missing(dir.path()) => {
                return Err(StoreError::NoImage { name: name.clone() });
            }
            Err(error) => return Err(broken(format!("its record cannot be read: {error}"))),
        };
        let image = Image::from_json(&bytes)
            .map_err(|error| broken(format!("its record cannot be read: {}", error_chain(&error))))?;
        if image.name != *name {
            return Err(broken(format!("its record is that of image {}", image.name)));
        }
        let fault = image
            .files()
            .find_map(|(file, taken)| snapshot::file_fault(dir.path(), &file, taken.bytes, "record"));
        match fault {
            Some(reason) => Err(broken(reason)),
            None => Ok(image),
        }
    }

    /// Reads the records of all images, in the order of their names. What has no image's name is passed over.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the directory itself cannot be read.
    pub fn images(&self) -> Result<Vec<ScannedImage>, StoreError> {
        let paths = atomic::list(&self.data.images())?;
        let mut names: Vec<ImageName> = paths
            .iter()
            .filter_map(|path| name_of(path)?.parse().ok())
            .collect();
        names.sort_unstable();
        let scanned = names.into_iter().filter_map(|name| match self.image(&name) {
            // It was removed since it was listed.
            Err(StoreError::NoImage { .. }) => None,
            image => Some(ScannedImage { name, image }),
        });
        Ok(scanned.collect())
    }

    /// The instances that were made of an image, from the records on disk, in the order of their ids. What cannot be read
    /// could be one: it is an error, never nobody.
    ///
    /// # Errors
    /// As [`Store::live_forks`].
    pub fn image_users(&self, name: &ImageName) -> Result<Vec<ImageUser>, StoreError> {
        let mut users = Vec::new();
        let seen = self.visit_records(None, |metadata| {
            if metadata.spec.image.as_ref() == Some(name) {
                users.push(ImageUser {
                    id: metadata.id,
                    name: metadata.name,
                });
            }
        })?;
        seen.all().map(|()| users)
    }

    /// Removes an image that no instance was made of, whether its own record can be read or not.
    ///
    /// # Errors
    /// [`StoreError::NoImage`]; [`StoreError::ImageInUse`]; as [`Store::image_users`] if its users cannot be told. If it fails
    /// half-way, the image is gone, and what is left over is swept at the next start.
    pub fn remove_image(&self, name: &ImageName) -> Result<(), StoreError> {
        let path = self.data.image(name).path().to_owned();
        let deleted = numbered(&self.data, DEL_PREFIX);
        let has_no_users = || {
            if is_missing(&path) {
                return Err(StoreError::NoImage { name: name.clone() });
            }
            let users = self.image_users(name)?;
            if users.is_empty() {
                return Ok(());
            }
            Err(StoreError::ImageInUse {
                name: name.clone(),
                users,
            })
        };
        let go = || match fs::rename(&path, &deleted) {
            // Somebody else removed it meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(StoreError::NoImage { name: name.clone() })
            }
            gone => gone.while_trying("remove", &path),
        };
        self.images.when_unused(name, has_no_users, go)?;
        atomic::sync_dir(&self.data.images())?;
        atomic::remove_all(&deleted)
    }
}

/// Copies a file and leaves its holes holes.
fn copy_data(from: &Path, to: &Path) -> io::Result<()> {
    let mut from = File::open(from)?;
    let mut to = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)?;
    let mut end = 0;
    loop {
        let data = match seek(&from, SeekFrom::Data(end)) {
            Ok(data) => data,
            // No data any more.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        end = seek(&from, SeekFrom::Hole(data))?;
        // Reading goes on where the last call sought to.
        seek(&from, SeekFrom::Start(data))?;
        seek(&to, SeekFrom::Start(data))?;
        io::copy(&mut (&mut from).take(end - data), &mut to)?;
    }
    to.set_len(from.metadata()?.len())
}

/// The size of a file in bytes, and the SHA-256 of its content in hexadecimal digits.
fn digest(path: &Path) -> io::Result<(u64, String)> {
    let (mut bytes, mut hash) = (0, Sha256::new());
    let mut file = BufReader::with_capacity(READ_AT_ONCE, File::open(path)?);
    loop {
        let chunk = file.fill_buf()?;
        if chunk.is_empty() {
            return Ok((bytes, hex::encode(hash.finalize())));
        }
        hash.update(chunk);
        let read = chunk.len();
        bytes += read as u64;
        file.consume(read);
    }
}

fn numbered(data: &DataDir, prefix: &str) -> PathBuf {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    data.images().join(format!("{prefix}{number}"))
}

/// An image that is being made. Dropped without [`commit`](NewImage::commit), it is removed.
#[derive(Debug)]
pub struct NewImage {
    dir: ImageDir,
    data: DataDir,
}

impl NewImage {
    /// Where it lies until it is committed.
    #[must_use]
    pub fn dir(&self) -> &ImageDir {
        &self.dir
    }

    /// Takes the file at `from` as its file `name`, such as [`ImageDir::KERNEL`]: a clone that shares the blocks where the file
    /// system can do that, else a copy that keeps holes; read-only (0400) and synced. What is said of it is what was taken, whatever becomes of
    /// the file at `from`.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn take(&self, from: &Path, name: &str) -> Result<ImageFile, StoreError> {
        let to = self.dir.path().join(name);
        // Whatever keeps it from being cloned, a copy may do; if not, its error is the one to tell.
        reflink_copy::reflink(from, &to)
            .or_else(|_| copy_data(from, &to))
            .while_trying("copy", from)?;
        fs::set_permissions(&to, Permissions::from_mode(0o400)).while_trying("make read-only", &to)?;
        atomic::sync_file(&to)?;
        let (bytes, sha256) = digest(&to).while_trying("read", &to)?;
        Ok(ImageFile { bytes, sha256 })
    }

    /// Writes its record and lets it exist, by one rename. When this returns, it survives a power loss.
    ///
    /// # Errors
    /// [`StoreError::ImageExists`] if there is one of that name, whoever was earlier; [`StoreError::Io`]. It then does not exist.
    pub fn commit(self, image: &Image) -> Result<(), StoreError> {
        let target = self.data.image(&image.name);
        let json = image.to_json().map_err(|error| StoreError::BrokenImage {
            name: image.name.clone(),
            reason: format!("its record cannot be written: {}", error_chain(&error)),
        })?;
        atomic::replace(&self.dir.record(), &json, Durability::Synced)?;
        match fs::rename(self.dir.path(), target.path()) {
            // Whatever has the name, with something in it.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory
                ) =>
            {
                return Err(StoreError::ImageExists {
                    name: image.name.clone(),
                });
            }
            renamed => renamed.while_trying("create", target.path())?,
        }
        atomic::sync_dir(&self.data.images()).inspect_err(|_| {
            // An error means that it does not exist: take its name back, and let drop remove it. If not even that works, this
            // error is still the one to tell.
            let _ = fs::rename(target.path(), self.dir.path());
        })
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        // After a commit there is nothing at this path. What cannot be removed now is swept at the next start.
        let _ = atomic::remove_all(self.dir.path());
    }
}
