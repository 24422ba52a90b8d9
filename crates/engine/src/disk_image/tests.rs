//! What is taken for a disk's base and what is not, and what a layer is.

use std::fs;

use zerocopy::{FromZeros, IntoBytes};

use super::*;

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

/// A qcow2 image of a disk of 1 MiB that nothing was written to, whose header is changed.
pub(super) fn qcow2(change: impl FnOnce(&mut Header)) -> File {
    let mut header = Header::new_zeroed();
    header.magic = QCOW2_MAGIC;
    header.version = 3.into();
    header.size = (1 << 20).into();
    header.cluster_bits = 9.into();
    header.refcount_table_offset = 512.into();
    header.refcount_table_clusters = 1.into();
    header.l1_table_offset = 1024.into();
    header.l1_size = 32.into();
    change(&mut header);
    let file = file(header.as_bytes());
    file.set_len(1536).unwrap();
    file
}

#[test]
fn a_base_is_qcow2_by_its_magic_and_else_raw_by_its_size() {
    let base = |format, disk_bytes, bytes| {
        Ok(Base {
            format,
            disk_bytes,
            bytes,
        })
    };
    assert_eq!(check_base(&qcow2(|_| {})), base(DiskFormat::Qcow2, 1 << 20, 1536));
    assert_eq!(check_base(&file(&[0; 1024])), base(DiskFormat::Raw, 1024, 1024));
    for size in [0, 1, 511, 513] {
        assert_eq!(
            check_base(&file(&vec![7; size])),
            Err(NoDisk::NotAnImage),
            "{size}"
        );
    }
}

#[test]
fn another_format_is_never_taken_for_raw() {
    for (offset, magic, what) in OTHER_FORMATS {
        let mut content = [0; 1024];
        let offset = usize::try_from(offset).unwrap();
        content[offset..offset + magic.len()].copy_from_slice(magic);
        assert_eq!(check_base(&file(&content)), Err(NoDisk::OtherFormat(what)));
    }
    let future = qcow2(|header| header.version = 4.into());
    assert!(matches!(check_base(&future), Err(NoDisk::OtherFormat(_))));
}

#[test]
fn a_qcow2_image_must_be_whole_and_closed() {
    let features = |bits: u64| qcow2(|header| header.incompatible_features = bits.into());
    for (image, expected) in [
        (
            qcow2(|header| header.backing_file_offset = 104.into()),
            NoDisk::HasBackingFile,
        ),
        (qcow2(|header| header.crypt_method = 2.into()), NoDisk::Encrypted),
        (features(EXTERNAL_DATA_FILE), NoDisk::DataElsewhere),
        (features(DIRTY), NoDisk::NotClosed),
        (features(CORRUPT), NoDisk::NotClosed),
    ] {
        assert_eq!(check_base(&image), Err(expected));
    }
    // Version 2 has no such bits: its header ends before them.
    let old = qcow2(|header| {
        header.version = 2.into();
        header.incompatible_features = u64::MAX.into();
    });
    assert!(check_base(&old).is_ok());
}

#[test]
fn an_image_that_somebody_may_write_is_in_use() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("disk.raw");
    fs::write(&path, [0; 4096]).unwrap();
    let image = File::open(&path).unwrap();
    let other = File::options().read(true).write(true).open(&path).unwrap();
    // As Cloud Hypervisor does: a lock on all of it.
    lock(&other, libc::F_WRLCK, 0, 0);
    assert_eq!(check_base(&image), Err(NoDisk::InUse));
    lock(&other, libc::F_UNLCK, 0, 0);
    // Cloud Hypervisor where its guest only reads.
    lock(&other, libc::F_RDLCK, 0, 0);
    assert!(check_base(&image).is_ok(), "it reads");
    lock(&other, libc::F_UNLCK, 0, 0);
    // As QEMU does: shared locks on bytes that stand for what it may do.
    lock(&other, libc::F_RDLCK, QEMU_WRITES - 1, 1);
    assert!(check_base(&image).is_ok(), "it reads");
    lock(&other, libc::F_RDLCK, QEMU_WRITES, 1);
    assert_eq!(check_base(&image), Err(NoDisk::InUse));
}

/// An open file description lock, as VMMs have them.
#[expect(clippy::cast_possible_truncation, reason = "all of them are 0, 1 or 2")]
fn lock(file: &File, kind: libc::c_int, start: i64, length: i64) {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: the call reads `lock`, which lives longer than it, and the descriptor is open.
    let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    assert_eq!(locked, 0);
}

#[test]
fn a_layer_says_its_size_and_whether_it_was_closed() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("layer.qcow2");
    fs::write(&path, "what was there").unwrap();
    make_layer(&path, "/images/base.raw", DiskFormat::Raw, 3 << 20).unwrap();
    assert_eq!(layer_size(&path).unwrap(), 3 << 20);
    assert!(!is_open(&path).unwrap());
    let layer = File::open(&path).unwrap();
    assert_eq!(check_base(&layer), Err(NoDisk::HasBackingFile));
    let layer = File::options().write(true).open(&path).unwrap();
    layer.write_all_at(&[1], 79).unwrap();
    assert!(is_open(&path).unwrap());
    let too_long = "x".repeat(LONGEST_BACKING_NAME + 1);
    assert!(make_layer(&path, &too_long, DiskFormat::Raw, 512).is_err());
}
