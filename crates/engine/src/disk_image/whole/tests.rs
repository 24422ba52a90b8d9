//! Images that are cut off anywhere, and images whose tables cannot be right.

use imago::qcow2::Qcow2;
use imago::storage::StorageCreateOptions;
use imago::{FormatAccess, FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage};

use super::super::tests::qcow2;
use super::super::{Base, check_base};
use super::*;

const CLUSTER: u64 = 512;
/// Of an entry: nobody else has the cluster.
const COPIED: u64 = 1 << 63;

/// An image with clusters of 512 bytes: header, refcount table, L1 table, refcount block, L2 table, and two clusters of the disk,
/// whose entries in the L2 table are these.
fn image(change: impl FnOnce(&mut Header), entries: &[u64]) -> File {
    let file = qcow2(change);
    let put = |place: u64, word: u64| file.write_all_at(&word.to_be_bytes(), place).unwrap();
    put(CLUSTER, 3 * CLUSTER);
    put(2 * CLUSTER, COPIED | (4 * CLUSTER));
    file.set_len(7 * CLUSTER).unwrap();
    for (number, entry) in (0..).zip(entries) {
        put(4 * CLUSTER + WORD * number, *entry);
    }
    file
}

fn cut_off(file: &File, length: u64) -> Result<Base, NoDisk> {
    file.set_len(length).unwrap();
    check_base(file)
}

#[test]
fn an_image_that_is_cut_off_anywhere_is_refused_with_the_numbers() {
    let whole = [COPIED | (5 * CLUSTER), COPIED | (6 * CLUSTER)];
    assert!(check_base(&image(|_| {}, &whole)).is_ok());
    for (length, what, start, end) in [
        (7 * CLUSTER - 1, "cluster", 6 * CLUSTER, 7 * CLUSTER),
        (6 * CLUSTER, "cluster", 6 * CLUSTER, 7 * CLUSTER),
        (5 * CLUSTER, "cluster", 5 * CLUSTER, 6 * CLUSTER),
        (5 * CLUSTER - 1, "L2 table", 4 * CLUSTER, 5 * CLUSTER),
        (4 * CLUSTER - 1, "refcount block", 3 * CLUSTER, 4 * CLUSTER),
        (3 * CLUSTER - 257, "refcount block", 3 * CLUSTER, 4 * CLUSTER),
        // Its head alone.
        (80, "refcount table", CLUSTER, 2 * CLUSTER),
    ] {
        let refused = cut_off(&image(|_| {}, &whole), length).unwrap_err();
        assert_eq!(
            refused,
            NoDisk::CutOff {
                what,
                start,
                end,
                length
            }
        );
    }
    let told = cut_off(&image(|_| {}, &whole), 3000).unwrap_err().to_string();
    assert!(
        told.contains("ends at byte 3072, and the file has 3000 bytes"),
        "{told}"
    );
}

#[test]
fn an_image_as_it_is_written_is_whole_and_no_part_of_it_is() {
    const DISK: u64 = 3 << 20;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("disk.qcow2");
    let new = imago::file::File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
    Qcow2::<imago::file::File>::create_builder(new)
        .size(DISK)
        .create()
        .unwrap();
    let disk = Qcow2::<imago::file::File>::builder_path(&path).write(true);
    let disk = FormatAccess::new(disk.open(PermissiveImplicitOpenGate::default()).unwrap());
    for place in (0..DISK).step_by(200_000) {
        disk.write(&b"something"[..], place).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    assert_eq!(check_base(&file).map(|base| base.disk_bytes), Ok(DISK));
    // What lies last may end amid its cluster.
    for length in (512..length - (64 << 10)).rev().step_by(60_001) {
        let refused = cut_off(&file, length);
        assert!(
            matches!(refused, Err(NoDisk::CutOff { .. })),
            "{length}: {refused:?}"
        );
    }
}

#[test]
fn the_last_cluster_reaches_as_far_as_the_disk() {
    let disk = |header: &mut Header| header.size = (2 * CLUSTER - 100).into();
    let entries = [5 * CLUSTER, 6 * CLUSTER];
    assert!(cut_off(&image(disk, &entries), 7 * CLUSTER - 100).is_ok());
    assert!(cut_off(&image(disk, &entries), 7 * CLUSTER - 101).is_err());
}

#[test]
fn clusters_that_need_no_bytes_of_the_file_may_lie_anywhere() {
    let far = 1 << 30;
    assert!(check_base(&image(|_| {}, &[5 * CLUSTER, far | ZERO])).is_ok());
    // Version 2 has no clusters of zeros.
    let old = |header: &mut Header| header.version = 2.into();
    assert!(check_base(&image(old, &[far | ZERO])).is_err());
    // A cluster in 32 parts: the first alone is there; none is; the last of them is.
    let extended = |header: &mut Header| {
        header.incompatible_features = EXTENDED_L2.into();
        header.l1_size = 64.into();
    };
    let at_the_end = 7 * CLUSTER - 512;
    assert!(check_base(&image(extended, &[at_the_end, 1, far, 0, far, u64::MAX << 32])).is_ok());
    assert!(check_base(&image(extended, &[7 * CLUSTER, 1])).is_err());
    assert!(cut_off(&image(extended, &[at_the_end, 1 << 31]), 7 * CLUSTER - 1).is_err());
    assert!(cut_off(&image(extended, &[at_the_end, 1]), 6 * CLUSTER + 16).is_ok());
}

#[test]
fn compressed_clusters_end_in_their_last_sector() {
    // With clusters of 512 bytes the offset has 61 bits, and 1 counts the sectors beyond the first.
    let one = COMPRESSED | (6 * CLUSTER + 100);
    let two = one | 1 << 61;
    assert!(cut_off(&image(|_| {}, &[one]), 6 * CLUSTER + 101).is_ok());
    assert!(cut_off(&image(|_| {}, &[one]), 6 * CLUSTER + 100).is_err());
    assert!(cut_off(&image(|_| {}, &[two]), 7 * CLUSTER + 1).is_ok());
    assert!(cut_off(&image(|_| {}, &[two]), 7 * CLUSTER).is_err());
}

#[test]
fn tables_that_cannot_be_right_are_damaged_and_cost_no_more_than_the_file_is_long() {
    let damaged = |change: fn(&mut Header)| {
        let refused = check_base(&image(change, &[]));
        assert!(matches!(refused, Err(NoDisk::Damaged(_))), "{refused:?}");
    };
    damaged(|header| header.cluster_bits = 8.into());
    damaged(|header| header.cluster_bits = 64.into());
    damaged(|header| header.l1_size = 31.into());
    damaged(|header| header.l1_size = u32::MAX.into());
    damaged(|header| header.l1_table_offset = 1025.into());
    damaged(|header| header.refcount_table_clusters = 0.into());
    damaged(|header| header.refcount_table_clusters = u32::MAX.into());
    let far_off = check_base(&image(
        |header| header.l1_table_offset = (u64::MAX << 9).into(),
        &[],
    ));
    assert!(matches!(far_off, Err(NoDisk::CutOff { .. })), "{far_off:?}");
    // With larger clusters, one that begins amid another: in a table that is all in the file.
    let large = |header: &mut Header| {
        header.cluster_bits = 10.into();
        header.refcount_table_offset = 1024.into();
        header.l1_table_offset = 2048.into();
    };
    let file = qcow2(large);
    file.set_len(8192).unwrap();
    file.write_all_at(&4096_u64.to_be_bytes(), 2048).unwrap();
    file.write_all_at(&(6144_u64 + 512).to_be_bytes(), 4096).unwrap();
    let amid = check_base(&file);
    assert!(matches!(amid, Err(NoDisk::Damaged(_))), "{amid:?}");
    // All entries name the same L2 table.
    let file = image(|_| {}, &[]);
    for entry in 0..32 {
        file.write_all_at(&(4 * CLUSTER).to_be_bytes(), 2 * CLUSTER + entry * WORD)
            .unwrap();
    }
    let refused = check_base(&file);
    assert!(matches!(refused, Err(NoDisk::Damaged(_))), "{refused:?}");
}
