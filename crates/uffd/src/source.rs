//! Where pages come from.

use std::fmt;
use std::io;

use stencil_core::generation::MemoryGeneration;

use crate::ranges::RangeTable;

/// What lies at a place in the memory of a snapshot, and how far, in bytes: whole pages, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Bytes that must be read.
    Data(u64),
    /// Nothing but zeros, known without reading.
    Zeros(u64),
}

/// A snapshot's memory, wherever it is kept: a file ([`MemoryImage`](crate::MemoryImage)), compressed, far away.
///
/// Its contents never change while it is used. It is called by the threads of a server, which serve nothing else
/// meanwhile, and must never touch the memory that is served.
pub trait PageSource: fmt::Debug + Send + Sync + 'static {
    /// Where guest memory lies in it.
    fn table(&self) -> &RangeTable;

    /// Which memory it is.
    fn generation(&self) -> MemoryGeneration;

    /// What begins at `offset`, and how far at most `limit` bytes on. Both are whole pages within the table.
    ///
    /// # Errors
    ///
    /// It cannot be told. Who cannot tell must not answer [`Extent::Zeros`].
    fn extent(&self, offset: u64, limit: u64) -> io::Result<Extent>;

    /// Fills `buffer`, of whole pages, with what is at `offset`.
    ///
    /// # Errors
    ///
    /// Not all of it can be read. What is in the buffer then is used for nothing.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Says that `length` bytes at `offset` will be read soon. Returns at once.
    fn will_need(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }
}
