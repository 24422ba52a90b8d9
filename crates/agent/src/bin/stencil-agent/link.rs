//! The stream to the host. It is read and written as far as it goes, and never waited for.
//!
//! A virtio-serial port without a host says "hung up" for as long as that lasts, so a poll for it would never wait. So the
//! stream is watched for changes (edge-triggered), and what it can do is remembered until it says that it cannot.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use stencil_agent::{Decoder, Frame, FrameError, Nonce, ToGuest, ToHost, encode};

use crate::place::{Listener, Place};

/// While more than this is unwritten, nothing that would add to it is begun.
const ROOM: usize = 256 << 10;

/// The host's end of the agent.
#[derive(Debug)]
pub(crate) struct Link {
    /// Becomes readable when there is something to do here.
    watch: OwnedFd,
    listener: Option<Listener>,
    stream: Option<OwnedFd>,
    may_read: bool,
    may_write: bool,
    decoder: Decoder<ToGuest>,
    read: Box<[u8]>,
    /// Which part of `read` was not decoded yet.
    undecoded: std::ops::Range<usize>,
    unwritten: Vec<u8>,
    /// How much of `unwritten` was written.
    written: usize,
}

impl Link {
    pub(crate) fn new(place: Place) -> rustix::io::Result<Self> {
        let mut link = Self {
            watch: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener: None,
            stream: None,
            may_read: false,
            may_write: false,
            decoder: Decoder::new(),
            read: vec![0; 64 << 10].into_boxed_slice(),
            undecoded: 0..0,
            unwritten: Vec::new(),
            written: 0,
        };
        match place {
            Place::Port(_, port) => link.take(port)?,
            Place::Listener(listener) => {
                epoll::add(&link.watch, &listener, EventData::new_u64(0), EventFlags::IN)?;
                link.listener = Some(listener);
            }
        }
        Ok(link)
    }

    /// What to poll for reading.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Notes what has changed; a host that comes takes the place of the one before.
    pub(crate) fn look(&mut self) -> rustix::io::Result<()> {
        let mut events = [MaybeUninit::uninit(); 4];
        match epoll::wait(&self.watch, &mut events, Some(&rustix::time::Timespec::default())) {
            Ok(([], _)) | Err(Errno::INTR) => {}
            Ok(_) => (self.may_read, self.may_write) = (true, true),
            Err(error) => return Err(error),
        }
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        match listener.accept() {
            Ok(stream) => {
                self.drop_stream();
                self.take(stream)
            }
            // Nobody came, who came is gone again, or it was not the host.
            Err(_) => Ok(()),
        }
    }

    fn take(&mut self, stream: OwnedFd) -> rustix::io::Result<()> {
        let changes = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.watch, &stream, EventData::new_u64(1), changes)?;
        self.stream = Some(stream);
        (self.may_read, self.may_write) = (true, true);
        Ok(())
    }

    fn drop_stream(&mut self) {
        // Closing it takes it out of the watch: nobody else has it open.
        self.stream = None;
        self.undecoded = 0..0;
        self.decoder = Decoder::new();
        self.forget_unwritten();
    }

    /// Whether answers to what comes next have room.
    pub(crate) fn has_room(&self) -> bool {
        self.unwritten.len() - self.written < ROOM
    }

    /// Whether something can be read without anything changing.
    pub(crate) fn has_more(&self) -> bool {
        !self.undecoded.is_empty() || (self.may_read && self.stream.is_some())
    }

    /// The next frame that has arrived.
    pub(crate) fn next(&mut self) -> Option<Result<Frame<ToGuest>, FrameError>> {
        loop {
            let mut unread = &self.read[self.undecoded.clone()];
            let decoded = self.decoder.next(&mut unread);
            self.undecoded.start = self.undecoded.end - unread.len();
            if decoded.is_some() {
                return decoded;
            }
            let (true, Some(stream)) = (self.may_read, &self.stream) else {
                return None;
            };
            match rustix::io::read(stream, &mut *self.read) {
                // A port says so while there is no host; another stream has ended.
                Ok(0) => self.lost(),
                Ok(length) => self.undecoded = 0..length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.may_read = false,
                Err(_) => self.lost(),
            }
        }
    }

    fn lost(&mut self) {
        self.may_read = false;
        if self.listener.is_some() {
            self.drop_stream();
        }
    }

    /// Puts a message behind those that are not written yet.
    pub(crate) fn send(&mut self, nonce: Nonce, message: &ToHost) -> io::Result<()> {
        if self.listener.is_some() && self.stream.is_none() {
            return Ok(());
        }
        encode(nonce, message, &mut self.unwritten).map_err(io::Error::other)
    }

    /// What is not written yet is for nobody. A frame of it that was half written is ended by the next one.
    pub(crate) fn forget_unwritten(&mut self) {
        self.unwritten.clear();
        self.written = 0;
    }

    /// Writes what the stream takes.
    pub(crate) fn flush(&mut self) {
        while self.may_write && self.written < self.unwritten.len() {
            let Some(stream) = &self.stream else {
                return;
            };
            match rustix::io::write(stream, &self.unwritten[self.written..]) {
                Ok(length) => self.written += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.may_write = false,
                Err(_) => {
                    self.may_write = false;
                    self.lost();
                }
            }
        }
        if self.written == self.unwritten.len() {
            self.forget_unwritten();
        } else if self.written >= ROOM {
            self.unwritten.drain(..self.written);
            self.written = 0;
        }
    }
}
