//! Whether a qcow2 image is all there: what its tables name is held against the length of its file (QEMU,
//! docs/interop/qcow2.rst).
//!
//! The tables are read in pieces. Tables that lie in holes of the file are not read: all of their entries are zero. No two entries
//! of a sound image name the same table, so all tables together are not larger than the file; an image that names more is damaged,
//! and the walk ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{Header, NoDisk};

/// How large clusters can be, as powers of 2 (QEMU, block/qcow2.h).
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The largest tables that QEMU reads, in bytes, in the same file.
const MOST_L1_BYTES: u64 = 32 << 20;
const MOST_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Entries of tables in the file are words of this many bytes.
const WORD: u64 = 8;
/// Bytes of a table that are read at a time: whole entries.
const PIECE: u64 = 64 << 10;
/// A snapshot in the snapshot table has at least this many bytes.
const LEAST_SNAPSHOT_BYTES: u64 = 40;

/// Where a table or cluster begins, in an entry of an L1 or L2 table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The same in an entry of the refcount table.
const REFCOUNT_OFFSET: u64 = !0x1ff;
/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros, whatever lies where it begins.
const ZERO: u64 = 1;
/// Of `incompatible_features`: entries of L2 tables have a second word, of 32 bits for parts that are there, and 32 for zeros.
const EXTENDED_L2: u64 = 1 << 4;
/// Parts of a cluster that such a word tells of.
const PARTS: u64 = 32;
/// Compressed clusters are counted in sectors.
const SECTOR: u64 = 512;

/// Refuses an image of which a table or a cluster is not in the file, and one whose tables cannot be right.
pub(super) fn check(file: &File, header: &Header) -> Result<(), NoDisk> {
    let cluster_bits = header.cluster_bits.get();
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(NoDisk::Damaged("its clusters have no size that qcow2 has"));
    }
    let image = Image {
        file,
        length: file.metadata()?.len(),
        disk: header.size.get(),
        cluster_bits,
        cluster: 1 << cluster_bits,
        words: if header.has(EXTENDED_L2) { 2 } else { 1 },
        has_zero_clusters: header.version.get() >= 3,
    };
    image.refcounts(header)?;
    if header.nb_snapshots.get() > 0 {
        let bytes = u64::from(header.nb_snapshots.get()) * LEAST_SNAPSHOT_BYTES;
        image.holds("snapshot table", header.snapshots_offset.get(), bytes)?;
    }
    image.clusters(header)
}

struct Image<'a> {
    file: &'a File,
    /// Of the file, in bytes.
    length: u64,
    /// The size of the disk, in bytes.
    disk: u64,
    cluster_bits: u32,
    cluster: u64,
    /// Words of an entry of an L2 table.
    words: usize,
    has_zero_clusters: bool,
}

impl Image<'_> {
    /// Of an L2 table.
    const fn entry_bytes(&self) -> u64 {
        self.words as u64 * WORD
    }

    /// That the file has so many bytes from there on.
    fn holds(&self, what: &'static str, start: u64, bytes: u64) -> Result<(), NoDisk> {
        let end = start.saturating_add(bytes);
        if end > self.length {
            return Err(NoDisk::CutOff {
                what,
                start,
                end,
                length: self.length,
            });
        }
        Ok(())
    }

    fn refcounts(&self, header: &Header) -> Result<(), NoDisk> {
        let start = header.refcount_table_offset.get();
        let bytes = u64::from(header.refcount_table_clusters.get()) << self.cluster_bits;
        if bytes == 0 || bytes > MOST_REFCOUNT_TABLE_BYTES || !start.is_multiple_of(self.cluster) {
            return Err(NoDisk::Damaged("its refcount table cannot be one"));
        }
        self.holds("refcount table", start, bytes)?;
        self.entries(start, bytes / WORD, 1, |_, entry| {
            match entry[0] & REFCOUNT_OFFSET {
                0 => Ok(()),
                block => self.holds("refcount block", block, self.cluster),
            }
        })
    }

    /// Walks through the L1 table, as far as the disk reaches, and through each L2 table.
    fn clusters(&self, header: &Header) -> Result<(), NoDisk> {
        let start = header.l1_table_offset.get();
        let has = u64::from(header.l1_size.get());
        let reach = (self.cluster / (self.entry_bytes())) << self.cluster_bits;
        let needs = self.disk.div_ceil(reach);
        if has < needs || has * WORD > MOST_L1_BYTES {
            return Err(NoDisk::Damaged("its L1 table has no size that fits its disk"));
        }
        if has > 0 && !start.is_multiple_of(self.cluster) {
            return Err(NoDisk::Damaged("its L1 table does not begin with a cluster"));
        }
        self.holds("L1 table", start, has * WORD)?;
        let mut left = self.length / self.cluster;
        self.entries(start, needs, 1, |index, entry| {
            let table = entry[0] & OFFSET;
            if table == 0 {
                return Ok(());
            }
            left = left
                .checked_sub(1)
                .ok_or(NoDisk::Damaged("it has more L2 tables than its file holds"))?;
            if !table.is_multiple_of(self.cluster) {
                return Err(NoDisk::Damaged("an L2 table does not begin with a cluster"));
            }
            self.holds("L2 table", table, self.cluster)?;
            self.l2(table, index * reach)
        })
    }

    /// Walks through an L2 table, whose first entry is of the cluster at `from` of the disk.
    fn l2(&self, table: u64, from: u64) -> Result<(), NoDisk> {
        let clusters = (self.disk - from).div_ceil(self.cluster);
        let entries = clusters.min(self.cluster / (self.entry_bytes()));
        self.entries(table, entries, self.words, |index, entry| {
            if entry[0] & COMPRESSED != 0 {
                return self.compressed(entry[0]);
            }
            let start = entry[0] & OFFSET;
            // A disk may end amid its last cluster, and its file with it.
            let reaches = self.disk - from - index * self.cluster;
            let bytes = self.in_use(entry).min(reaches);
            if start == 0 || bytes == 0 {
                return Ok(());
            }
            if !start.is_multiple_of(self.cluster) {
                return Err(NoDisk::Damaged("a cluster begins amid another one"));
            }
            self.holds("cluster", start, bytes)
        })
    }

    /// How many bytes of a cluster that is not compressed the disk has from the file.
    fn in_use(&self, entry: &[u64]) -> u64 {
        match entry {
            [first] if self.has_zero_clusters && first & ZERO != 0 => 0,
            [_, parts] => {
                // The upper half of the word tells of zeros. Parts behind the last that is there need no bytes.
                let there = u64::BITS - (parts & u64::from(u32::MAX)).leading_zeros();
                self.cluster / PARTS * u64::from(there)
            }
            _ => self.cluster,
        }
    }

    /// The data end somewhere in the last of their sectors, and the file may end there.
    fn compressed(&self, entry: u64) -> Result<(), NoDisk> {
        let offset_bits = 62 - (self.cluster_bits - 8);
        let start = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        let last_sector = (start / SECTOR + more_sectors) * SECTOR;
        self.holds("compressed cluster", start, last_sector.saturating_sub(start) + 1)
    }

    /// Calls `each` with the number and the words of each entry of a table that is in the file.
    fn entries(
        &self,
        start: u64,
        count: u64,
        words: usize,
        mut each: impl FnMut(u64, &[u64]) -> Result<(), NoDisk>,
    ) -> Result<(), NoDisk> {
        let entry_bytes = words as u64 * WORD;
        let end = start + count * entry_bytes;
        let mut at = start;
        let mut piece = Vec::new();
        while at < end {
            // Entries in a hole are zero.
            let Some(data) = next_data(self.file, at)?.filter(|data| *data < end) else {
                return Ok(());
            };
            at = at.max(start + (data - start) / entry_bytes * entry_bytes);
            piece.resize(usize::try_from(PIECE.min(end - at)).unwrap_or(0), 0);
            self.file.read_exact_at(&mut piece, at)?;
            let read: Vec<u64> = piece
                .as_chunks()
                .0
                .iter()
                .map(|word| u64::from_be_bytes(*word))
                .collect();
            let first = (at - start) / entry_bytes;
            for (index, entry) in (first..).zip(read.chunks(words)) {
                each(index, entry)?;
            }
            at += piece.len() as u64;
        }
        Ok(())
    }
}

/// Where the next data of a file are that are no hole, from `from` on.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(start) => Ok(Some(start)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
