//! Bytes that are no frames, or frames that are not what they seem: nothing panics, nothing grows, and the next frame is found.

use proptest::collection::vec;
use proptest::prelude::*;
use stencil_agent::{Decoder, Frame, FrameError, MAX_FRAME, ToGuest, ToHost, encode};

use crate::samples;

/// A frame with these bytes and the right CRC, whatever they are.
pub(crate) fn framed(bytes: &[u8]) -> Vec<u8> {
    let mut frame = bytes.to_vec();
    frame.extend(crc32fast::hash(bytes).to_le_bytes());
    cobs::encode_vec_including_sentinels(&frame)
}

fn hello() -> Vec<u8> {
    let mut stream = Vec::new();
    encode(samples::nonce(), &ToGuest::Hello, &mut stream).unwrap();
    stream
}

/// All that `decoder` finds in `stream`, which it gets in pieces of `piece` bytes.
fn decode_all(stream: &[u8], piece: usize) -> Vec<Result<Frame<ToGuest>, FrameError>> {
    let mut decoder = Decoder::new();
    let mut found = Vec::new();
    for mut unread in stream.chunks(piece) {
        while let Some(decoded) = decoder.next(&mut unread) {
            found.push(decoded);
        }
        assert!(unread.is_empty());
    }
    found
}

fn is_hello(found: Option<&Result<Frame<ToGuest>, FrameError>>) -> bool {
    found.is_some_and(|found| found.as_ref().is_ok_and(|frame| frame.message == ToGuest::Hello))
}

#[test]
fn more_than_a_frame_without_an_end_is_one_error() {
    let mut stream = vec![1; 10 * MAX_FRAME];
    stream.extend(hello());
    let found = decode_all(&stream, 4096);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0], Err(FrameError::TooLarge));
    assert!(is_hello(found.last()));
}

#[test]
fn lengths_beyond_the_frame_are_refused() {
    let head = [1, 1, 0, 0, 0, 0, 0, 0, 0];
    let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    // Exec for session 0 with so many arguments; Stdin for session 0 with so many bytes.
    for message in [&[3, 0][..], &[4, 0]] {
        let found = decode_all(&framed(&[&head, message, &huge].concat()), usize::MAX);
        assert_eq!(found, [Err(FrameError::Message)]);
    }
}

#[test]
fn what_follows_a_message_in_its_frame_is_refused() {
    let hello_and_more = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        decode_all(&framed(&hello_and_more), 7),
        [Err(FrameError::Message)]
    );
}

#[test]
fn a_frame_without_room_for_its_head_is_damaged() {
    for length in 0..9 {
        let short = &[1, 1, 0, 0, 0, 0, 0, 0][..length.min(8)];
        let found = decode_all(&framed(short), 7);
        assert_eq!(found, [Err(FrameError::Damaged)], "{length}");
    }
}

proptest! {
    #[test]
    fn noise_is_no_message_and_the_next_frame_is_found(
        noise in vec(prop_oneof![Just(0), any::<u8>()], 0..2000),
        piece in 1..300_usize,
    ) {
        let mut stream = noise;
        stream.extend(hello());
        let mut found = decode_all(&stream, piece);
        prop_assert!(is_hello(found.last()));
        found.pop();
        prop_assert!(found.iter().all(Result::is_err));
    }

    #[test]
    fn noise_with_a_right_crc_never_panics(noise in vec(any::<u8>(), 0..400)) {
        let mut stream = framed(&noise);
        stream.extend(framed(&[&[1, 9, 9, 9, 9, 9, 9, 9, 9], &noise[..]].concat()));
        prop_assert_eq!(decode_all(&stream, usize::MAX).len(), 2);
        let mut unread = &stream[..];
        let mut decoder = Decoder::<ToHost>::new();
        while decoder.next(&mut unread).is_some() {}
        prop_assert!(unread.is_empty());
    }

    #[test]
    fn a_frame_that_was_cut_off_costs_no_other(
        cut in samples::any_to_guest(),
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        piece in 1..5000_usize,
    ) {
        let mut frame = Vec::new();
        encode(samples::nonce(), &cut, &mut frame).unwrap();
        let (a, b) = (from.index(frame.len()), to.index(frame.len()));
        let mut stream = frame[a.min(b)..a.max(b)].to_vec();
        stream.extend(hello());
        let found = decode_all(&stream, piece);
        prop_assert!(is_hello(found.last()));
        prop_assert!(found.len() <= 2);
    }

    #[test]
    fn messages_survive_the_stream_in_any_pieces(
        messages in vec(samples::any_to_guest(), 0..6),
        piece in 1..100_000_usize,
    ) {
        let mut stream = Vec::new();
        for message in &messages {
            encode(samples::nonce(), message, &mut stream).unwrap();
        }
        let found: Vec<ToGuest> = decode_all(&stream, piece).into_iter().map(|frame| frame.unwrap().message).collect();
        prop_assert_eq!(found, messages);
    }

    #[test]
    fn a_changed_byte_is_noticed(
        message in samples::any_to_guest(),
        at in any::<prop::sample::Index>(),
        change in 1..=255_u8,
    ) {
        let mut stream = Vec::new();
        encode(samples::nonce(), &message, &mut stream).unwrap();
        // The 00 before and behind the frame may become noise, or the frame two.
        let at = 1 + at.index(stream.len() - 2);
        stream[at] ^= change;
        stream.extend(hello());
        let mut found = decode_all(&stream, usize::MAX);
        prop_assert!(is_hello(found.last()));
        found.pop();
        prop_assert!(found.iter().all(Result::is_err), "{:?}", found);
    }
}
