//! How a message becomes bytes, and how bytes that may be anything become messages.
//!
//! A frame is `00`, then by COBS (so that no other byte is 00) its version, its nonce, its message by postcard and the
//! CRC-32 of these, then `00`. The first `00` ends whatever was cut off before; empty frames are nothing.

use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::message::Message;

/// The version of the protocol. Frames of another one are told apart by their first byte, whatever else changed.
pub const VERSION: u8 = 1;

/// The most bytes of a frame before COBS: version, nonce, message and CRC together.
pub const MAX_FRAME: usize = 64 << 10;

/// The version and the nonce.
const HEAD: usize = 1 + 8;
const CRC: usize = 4;
/// COBS adds a byte at the beginning and one for each 254.
const MAX_ENCODED: usize = cobs::max_encoding_length(MAX_FRAME);

/// Which conversation a frame belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Nonce(u64);

impl Nonce {
    /// What an agent says before any host has begun a conversation.
    pub const NONE: Self = Self(0);

    /// The nonce of a new conversation. The number is to be random.
    #[must_use]
    pub const fn new(number: NonZeroU64) -> Self {
        Self(number.get())
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A message, and which conversation it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<M> {
    /// The conversation.
    pub nonce: Nonce,
    /// What is said.
    pub message: M,
}

/// Bytes that were no frame. The decoder is at the beginning of the next one: go on reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Part of a frame, or noise.
    #[error("bytes that are no frame")]
    Damaged,
    /// More than any frame has.
    #[error("a frame of more than {MAX_FRAME} bytes")]
    TooLarge,
    /// A whole frame in another version of the protocol.
    #[error("a frame in version {0} of the protocol; this is version {VERSION}")]
    Version(u8),
    /// A whole frame whose message this version does not have.
    #[error("a frame with an unknown message")]
    Message,
}

/// A message that no frame can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message has more than the {} bytes that a frame has room for", MAX_FRAME - HEAD - CRC)]
pub struct TooLarge;

/// Appends `message` to `stream` as a frame.
///
/// # Errors
///
/// [`TooLarge`]; `stream` is as it was.
pub fn encode<M: Message>(nonce: Nonce, message: &M, stream: &mut Vec<u8>) -> Result<(), TooLarge> {
    let mut head = Vec::with_capacity(128);
    head.push(VERSION);
    head.extend(nonce.0.to_le_bytes());
    // A vector takes all that messages are made of: there is no other error than their size.
    let mut frame = postcard::to_extend(message, head).map_err(|_| TooLarge)?;
    if frame.len() + CRC > MAX_FRAME {
        return Err(TooLarge);
    }
    frame.extend(crc32fast::hash(&frame).to_le_bytes());
    stream.push(0);
    let start = stream.len();
    stream.resize(start + cobs::max_encoding_length(frame.len()), 0);
    let length = cobs::encode(&frame, &mut stream[start..]);
    stream.truncate(start + length);
    stream.push(0);
    Ok(())
}

/// Finds the frames in a stream of bytes. It keeps at most one frame.
#[derive(Debug)]
pub struct Decoder<M> {
    /// What came since the last 00.
    frame: Vec<u8>,
    /// More came since the last 00 than a frame has; it is not kept.
    too_large: bool,
    message: PhantomData<fn() -> M>,
}

impl<M> Default for Decoder<M> {
    fn default() -> Self {
        Self {
            frame: Vec::new(),
            too_large: false,
            message: PhantomData,
        }
    }
}

impl<M: Message> Decoder<M> {
    /// A decoder at the beginning of a stream, which may be the middle of a frame.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes off the front of `unread` up to the end of the next frame, or of what is none. `None`: all were taken
    /// and none ended.
    ///
    /// # Errors
    ///
    /// What ended there was no frame of this protocol. The stream goes on behind it.
    pub fn next(&mut self, unread: &mut &[u8]) -> Option<Result<Frame<M>, FrameError>> {
        while let Some(end) = unread.iter().position(|byte| *byte == 0) {
            self.keep(&unread[..end]);
            *unread = &unread[end + 1..];
            if std::mem::take(&mut self.too_large) {
                return Some(Err(FrameError::TooLarge));
            }
            if !self.frame.is_empty() {
                let decoded = decode(&mut self.frame);
                self.frame.clear();
                return Some(decoded);
            }
        }
        self.keep(unread);
        *unread = &[];
        None
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.too_large || self.frame.len() + bytes.len() > MAX_ENCODED {
            self.too_large = true;
            self.frame.clear();
        } else {
            self.frame.extend_from_slice(bytes);
        }
    }
}

/// What stood between two 00.
fn decode<M: Message>(encoded: &mut [u8]) -> Result<Frame<M>, FrameError> {
    let length = cobs::decode_in_place(encoded).map_err(|_| FrameError::Damaged)?;
    let (frame, crc) = encoded[..length]
        .split_last_chunk::<CRC>()
        .ok_or(FrameError::Damaged)?;
    if crc32fast::hash(frame) != u32::from_le_bytes(*crc) {
        return Err(FrameError::Damaged);
    }
    let (&version, rest) = frame.split_first().ok_or(FrameError::Damaged)?;
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let (nonce, message) = rest.split_first_chunk().ok_or(FrameError::Damaged)?;
    match postcard::take_from_bytes(message) {
        Ok((message, [])) => Ok(Frame {
            nonce: Nonce(u64::from_le_bytes(*nonce)),
            message,
        }),
        _ => Err(FrameError::Message),
    }
}
