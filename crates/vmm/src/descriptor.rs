//! Handing an open file to another process over a Unix socket.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Sends `bytes` and, with the first of them, the open file (`SCM_RIGHTS`, unix(7)). How many bytes were taken, which may be fewer:
/// the file went with these.
pub(crate) fn send_with(socket: impl AsFd, bytes: &[u8], file: BorrowedFd<'_>) -> io::Result<usize> {
    let files = [file];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    // There is room for it: the space is made for one descriptor.
    ancillary.push(SendAncillaryMessage::ScmRights(&files));
    let parts = [IoSlice::new(bytes)];
    Ok(sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL)?)
}
