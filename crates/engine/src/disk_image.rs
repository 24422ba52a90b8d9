//! Disk images: what a file is, told by its content, and layers that lie on another image.

mod whole;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use imago::qcow2::Qcow2;
use imago::storage::StorageCreateOptions;
use imago::{FormatCreateBuilder, Storage};
use stencil_core::DiskFormat;
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

/// Disks are given out in sectors of this many bytes.
const SECTOR_BYTES: u64 = 512;
/// The longest name of a backing file in bytes (QEMU, docs/interop/qcow2.rst, "backing_file_size").
const LONGEST_BACKING_NAME: usize = 1023;

const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bits of `incompatible_features`, in the same document.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA_FILE: u64 = 1 << 2;

/// What a file begins with that is no raw disk, at which offset, and what it is.
const OTHER_FORMATS: [(u64, &[u8], &str); 11] = [
    (0, b"QFI", "a damaged qcow2 image"),
    (0, b"QED\0", "a QED image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"LUKS\xba\xbe", "an encrypted image"),
    (0, b"\x1f\x8b", "compressed by gzip"),
    (0, b"\xfd7zXZ\0", "compressed by xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
];

/// Where QEMU's locks in an image begin, each on a byte that stands for something that it may do with it, all of them shared:
/// `RAW_LOCK_PERM_BASE` (block/file-posix.c).
const QEMU_LOCKS: i64 = 100;
/// The one that stands for writing: the bit of `BLK_PERM_WRITE` (include/block/block-common.h).
const QEMU_WRITES: i64 = QEMU_LOCKS + 1;

/// Why a file cannot be the base of a disk; each reads on after the file's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoDisk {
    #[error("is no disk image: it is neither qcow2 nor raw, whose size is a multiple of 512 bytes")]
    NotAnImage,
    #[error("is {0}; convert it to qcow2 or raw")]
    OtherFormat(&'static str),
    #[error(
        "is an image on a backing file, which could be any file of this host; flatten it with `qemu-img convert`"
    )]
    HasBackingFile,
    #[error("is a qcow2 image whose data is in another file; convert it with `qemu-img convert`")]
    DataElsewhere,
    #[error("is an encrypted qcow2 image; decrypt it with `qemu-img convert`")]
    Encrypted,
    #[error("is a qcow2 image that was not closed; repair it with `qemu-img check -r all`")]
    NotClosed,
    #[error(
        "is a qcow2 image that is cut off: its {what} from byte {start} on ends at byte {end}, and the file has {length} bytes; \
         take a whole copy of it"
    )]
    CutOff {
        what: &'static str,
        start: u64,
        end: u64,
        length: u64,
    },
    #[error("is a damaged qcow2 image: {0}; take a whole copy of it")]
    Damaged(&'static str),
    #[error("is in use by a program that can write to it; end that first")]
    InUse,
    #[error("cannot be read by the server: {0}")]
    Unreadable(String),
}

impl From<io::Error> for NoDisk {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(error.to_string())
    }
}

/// What all versions of qcow2 begin with.
#[derive(FromBytes)]
#[cfg_attr(test, derive(zerocopy::IntoBytes, zerocopy::Immutable))]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    /// Of version 3.
    incompatible_features: U64,
}

impl Header {
    /// Nothing of a file that is too short for one or has another magic.
    fn read(file: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0; size_of::<Self>()];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let header: Self = zerocopy::transmute!(bytes);
        Ok((header.magic == QCOW2_MAGIC).then_some(header))
    }

    fn has(&self, incompatible_feature: u64) -> bool {
        self.version.get() >= 3 && self.incompatible_features.get() & incompatible_feature != 0
    }
}

/// An image that can be the base of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) format: DiskFormat,
    /// The size of the disk, in bytes.
    pub(crate) disk_bytes: u64,
    /// The length of the file, in bytes.
    pub(crate) bytes: u64,
}

/// What an image is. It must be whole in this one file, and nobody may write to it. All tables of a qcow2 image are read for that.
pub(crate) fn check_base(file: &File) -> Result<Base, NoDisk> {
    let base = look_at(file)?;
    if let Some(header) = Header::read(file)? {
        whole::check(file, &header)?;
    }
    Ok(base)
}

/// The same of an image that was found whole before, and still has the length that it had then.
pub(crate) fn look_at(file: &File) -> Result<Base, NoDisk> {
    let (format, disk_bytes) = match Header::read(file)? {
        Some(header) => (DiskFormat::Qcow2, check_qcow2(&header)?),
        None => (DiskFormat::Raw, check_raw(file)?),
    };
    if is_being_written(file)? {
        return Err(NoDisk::InUse);
    }
    Ok(Base {
        format,
        disk_bytes,
        bytes: file.metadata()?.len(),
    })
}

fn check_qcow2(header: &Header) -> Result<u64, NoDisk> {
    if !matches!(header.version.get(), 2 | 3) {
        return Err(NoDisk::OtherFormat("qcow2 of an unknown version"));
    }
    if header.backing_file_offset.get() != 0 {
        return Err(NoDisk::HasBackingFile);
    }
    if header.has(EXTERNAL_DATA_FILE) {
        return Err(NoDisk::DataElsewhere);
    }
    if header.crypt_method.get() != 0 {
        return Err(NoDisk::Encrypted);
    }
    if header.has(DIRTY | CORRUPT) {
        return Err(NoDisk::NotClosed);
    }
    Ok(header.size.get())
}

fn check_raw(file: &File) -> Result<u64, NoDisk> {
    for (offset, magic, what) in OTHER_FORMATS {
        let mut found = vec![0; magic.len()];
        if file.read_exact_at(&mut found, offset).is_ok() && found == magic {
            return Err(NoDisk::OtherFormat(what));
        }
    }
    let size = file.metadata()?.len();
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) {
        return Err(NoDisk::NotAnImage);
    }
    Ok(size)
}

/// Whether another program has a lock that says that it writes: a lock to write, or QEMU's sign.
fn is_being_written(file: &File) -> io::Result<bool> {
    if conflicting_lock(file, libc::F_RDLCK, 0, 0)?.is_some() {
        return Ok(true);
    }
    // A shared lock that begins before those of QEMU is on all of the file, and that of a reader. Of several locks the kernel tells
    // one: a QEMU that writes beside such a reader is not noticed.
    let sign = conflicting_lock(file, libc::F_WRLCK, QEMU_WRITES, 1)?;
    Ok(sign.is_some_and(|start| start >= QEMU_LOCKS))
}

/// Where a lock begins that somebody has on `length` bytes from `start`, 0 for all from there, and that does not go with one of
/// this `kind`.
#[expect(clippy::cast_possible_truncation, reason = "all of them are 0, 1 or 2")]
fn conflicting_lock(file: &File, kind: libc::c_int, start: i64, length: i64) -> io::Result<Option<i64>> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: the call reads and writes `lock`, which lives longer than it, and the descriptor is open.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((lock.l_type != libc::F_UNLCK as libc::c_short).then_some(lock.l_start))
}

/// The size in bytes of the disk whose layer is at `path`.
pub(crate) fn layer_size(path: &Path) -> io::Result<u64> {
    layer_header(path).map(|header| header.size.get())
}

/// Whether whoever wrote this layer has not closed it: what it kept in memory is lost.
pub(crate) fn is_open(path: &Path) -> io::Result<bool> {
    layer_header(path).map(|header| header.has(DIRTY))
}

fn layer_header(path: &Path) -> io::Result<Header> {
    Header::read(&File::open(path)?)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no qcow2 image"))
}

/// Makes an empty layer of a disk of `size` bytes at `path`, on the image that is called `backing` as seen from there. What is
/// at `path` already is replaced.
pub(crate) fn make_layer(path: &Path, backing: &str, format: DiskFormat, size: u64) -> io::Result<()> {
    if backing.len() > LONGEST_BACKING_NAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidFilename,
            format!("the path of its base has more than {LONGEST_BACKING_NAME} bytes"),
        ));
    }
    let file = imago::file::File::create_open(StorageCreateOptions::new().filename(path).overwrite(true))?;
    // It has a guest's data in it, like the instance's other files.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Qcow2::<imago::file::File>::create_builder(file)
        .size(size)
        .backing(backing.to_owned(), format.to_string())
        .create()
}

#[cfg(test)]
mod tests;
