//! An archive on its way between a thread that reads or writes it and the connection to the guest.

use std::io::{self, ErrorKind, Read, Write};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

/// Bytes of an archive that are passed on at a time.
pub(super) const CHUNK: usize = 32 << 10;

/// Passes on what is written, chunk by chunk.
pub(super) struct Chunks(pub(super) mpsc::Sender<Bytes>);

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        match self.0.blocking_send(Bytes::copy_from_slice(chunk)) {
            Ok(()) => Ok(chunk.len()),
            Err(_) => Err(ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what is passed on.
pub(super) struct Stream {
    chunks: mpsc::Receiver<Bytes>,
    unread: Bytes,
}

impl Stream {
    pub(super) fn new(chunks: mpsc::Receiver<Bytes>) -> Self {
        Self {
            chunks,
            unread: Bytes::new(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.unread.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.unread = chunk,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.unread.len());
        self.unread.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
