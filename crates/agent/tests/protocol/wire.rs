//! The bytes of every message. A change here is a change of the protocol: its version must change with it.

use std::fmt::Write;

use stencil_agent::{
    CHUNK, Decoder, MAX_FRAME, Message, Nonce, Output, SessionId, ToGuest, ToHost, TooLarge, encode,
};

use crate::samples;

fn bytes_of<M: Message>(nonce: Nonce, message: &M) -> Vec<u8> {
    let mut stream = Vec::new();
    encode(nonce, message, &mut stream).unwrap();
    stream
}

fn listing<M: Message + std::fmt::Debug>(messages: &[M]) -> String {
    messages.iter().fold(String::new(), |mut text, message| {
        let bytes = bytes_of(samples::nonce(), message);
        writeln!(text, "{message:?}\n    {}", hex::encode(bytes)).unwrap();
        text
    })
}

#[test]
fn each_message_has_the_bytes_it_always_had() {
    insta::assert_snapshot!("to_guest", listing(&samples::to_guest()));
    insta::assert_snapshot!("to_host", listing(&samples::to_host()));
    let hello = ToHost::Hello {
        epoch: None,
        frozen: false,
    };
    insta::assert_snapshot!("hello_to_nobody", hex::encode(bytes_of(Nonce::NONE, &hello)));
}

#[test]
fn what_is_encoded_is_decoded() {
    for message in samples::to_guest() {
        let bytes = bytes_of(samples::nonce(), &message);
        let frame = Decoder::new().next(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!((frame.nonce, frame.message), (samples::nonce(), message));
    }
    for message in samples::to_host() {
        let bytes = bytes_of(samples::nonce(), &message);
        let frame = Decoder::new().next(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!((frame.nonce, frame.message), (samples::nonce(), message));
    }
}

#[test]
fn a_frame_holds_a_whole_chunk_and_is_bounded() {
    let output = |bytes: usize| ToHost::Output {
        session: SessionId(u32::MAX),
        stream: Output::Stderr,
        bytes: vec![7; bytes],
    };
    bytes_of(samples::nonce(), &output(CHUNK));
    let mut stream = b"as it was".to_vec();
    assert_eq!(
        encode(samples::nonce(), &output(MAX_FRAME), &mut stream),
        Err(TooLarge)
    );
    assert_eq!(stream, b"as it was");
}

#[test]
fn entropy_is_in_no_log() {
    let shown = format!("{:?}", samples::to_guest());
    assert!(shown.contains("entropy: Entropy(..)"), "{shown}");
    assert!(!shown.contains("165"), "{shown}");
}

#[test]
fn frames_of_another_version_are_told_apart() {
    let mut stream = Vec::new();
    let frame = [2, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff];
    stream.extend(crate::hostile::framed(&frame));
    assert_eq!(
        Decoder::<ToGuest>::new().next(&mut &stream[..]),
        Some(Err(stencil_agent::FrameError::Version(2)))
    );
}
