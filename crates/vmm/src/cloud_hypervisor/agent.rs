//! The way to the agent in the guest: a vsock device, whose host side is the Unix socket `vsock.sock` in the instance's
//! directory.
//!
//! Who connects says `CONNECT <port>` on a line, and gets a line `OK <number>` when somebody in the guest listens on that
//! port; from there on the stream is that connection. If nobody listens, Cloud Hypervisor hangs up; before the guest's driver
//! is there, it says nothing. Source: Cloud Hypervisor v53, `docs/vsock.md` and `virtio-devices/src/vsock/unix/muxer.rs`.

use std::io;
use std::time::Duration;

use stencil_core::InstanceDir;
use stencil_vmm_api::VsockConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::VmmError;

/// Every guest's own address; each has a device of its own, so that they do not meet. 0 to 2 are special (vsock(7)).
const CID: u32 = 3;
/// The port on which the agent listens.
const PORT: u32 = 1024;
/// How long it may take until somebody in the guest has accepted.
const DEADLINE: Duration = Duration::from_secs(2);
/// More than any answer has, in bytes.
const LONGEST_ANSWER: u64 = 32;

/// The device of a new VM. Its socket is relative, so that it is in the VMM's working directory.
pub(super) fn vsock() -> VsockConfig {
    VsockConfig {
        cid: CID,
        socket: InstanceDir::VSOCK_SOCKET.to_owned(),
    }
}

/// A connection to the agent.
pub(super) async fn connect(dir: &InstanceDir) -> Result<UnixStream, VmmError> {
    let socket = dir.vsock_socket();
    let converse = async {
        let mut stream = UnixStream::connect(&socket).await?;
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
        let mut answer = Vec::new();
        // Byte by byte: what comes after the line is the agent's.
        let mut bounded = (&mut stream).take(LONGEST_ANSWER);
        while answer.last() != Some(&b'\n') {
            match bounded.read_u8().await {
                Ok(byte) => answer.push(byte),
                Err(error) if answer.is_empty() && error.kind() == io::ErrorKind::UnexpectedEof => {
                    let nobody = format!("nobody in the guest listens on vsock port {PORT}");
                    return Err(io::Error::new(io::ErrorKind::ConnectionRefused, nobody));
                }
                Err(_) => break,
            }
        }
        if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
            Ok(stream)
        } else {
            let said = format!("the VMM answered {:?}", String::from_utf8_lossy(&answer));
            Err(io::Error::new(io::ErrorKind::InvalidData, said))
        }
    };
    let connected = match tokio::time::timeout(DEADLINE, converse).await {
        Ok(connected) => connected,
        Err(_elapsed) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("nobody in the guest answered on vsock port {PORT} within {DEADLINE:?}"),
        )),
    };
    connected.map_err(|source| VmmError::Agent { socket, source })
}
