//! The host's side by hand: gives the guest at the other end of a Unix socket an epoch, freezes it, runs commands in it.
//!
//! ```console
//! $ cargo run -p stencil-agent --example host -- agent.sock epoch fork-1
//! $ cargo run -p stencil-agent --example host -- agent.sock exec cat /proc/sys/kernel/random/uuid
//! ```

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use stencil_agent::{
    Decoder, Entropy, Epoch, EpochId, Exec, Nonce, Output, SessionId, ToGuest, ToHost, encode,
};

const USAGE: &str = "usage: host SOCKET epoch NAME | freeze | exec PROGRAM [ARGUMENT]... | poweroff";

/// An agent that says nothing for so long is none.
const PATIENCE: Duration = Duration::from_secs(60);

struct Host {
    stream: UnixStream,
    nonce: Nonce,
    decoder: Decoder<ToHost>,
    read: Vec<u8>,
}

impl Host {
    fn send(&mut self, message: &ToGuest) -> Result<(), Box<dyn Error>> {
        let mut bytes = Vec::new();
        encode(self.nonce, message, &mut bytes)?;
        Ok(self.stream.write_all(&bytes)?)
    }

    /// The next message of this conversation.
    fn next(&mut self) -> Result<ToHost, Box<dyn Error>> {
        loop {
            let mut unread = &self.read[..];
            let decoded = self.decoder.next(&mut unread);
            let decoded_bytes = self.read.len() - unread.len();
            self.read.drain(..decoded_bytes);
            match decoded {
                Some(Ok(frame)) if frame.nonce == self.nonce => return Ok(frame.message),
                // Of a conversation before this one, or its end.
                Some(_) => {}
                None => {
                    let mut bytes = [0; 65536];
                    match self.stream.read(&mut bytes)? {
                        0 => return Err("the stream has ended".into()),
                        length => self.read.extend(&bytes[..length]),
                    }
                }
            }
        }
    }
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, what, arguments @ ..] = &arguments[..] else {
        return Err(USAGE.into());
    };
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let nonce = u64::from_ne_bytes(random()?);
    let mut host = Host {
        stream,
        nonce: Nonce::new(NonZeroU64::new(nonce).unwrap_or(NonZeroU64::MIN)),
        decoder: Decoder::new(),
        read: Vec::new(),
    };
    let began = Instant::now();
    host.send(&ToGuest::Hello)?;
    eprintln!("{:?} after {:?}", host.next()?, began.elapsed());
    let began = Instant::now();
    match (&**what, arguments) {
        ("epoch", [name]) => {
            host.send(&ToGuest::Epoch(Epoch {
                id: EpochId(random()?),
                entropy: Entropy(random()?),
                wall_clock: SystemTime::now().duration_since(UNIX_EPOCH)?,
                host_name: name.clone(),
                machine_id: random()?,
            }))?;
            eprintln!("{:?} after {:?}", host.next()?, began.elapsed());
        }
        ("freeze", []) => {
            host.send(&ToGuest::Freeze)?;
            eprintln!("{:?} after {:?}", host.next()?, began.elapsed());
        }
        ("poweroff", []) => host.send(&ToGuest::PowerOff)?,
        ("exec", argv) => {
            let exec = Exec {
                argv: argv.to_vec(),
                ..Exec::default()
            };
            run(&mut host, exec)?;
            eprintln!("after {:?}", began.elapsed());
        }
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

/// Runs a command, and prints what it prints.
fn run(host: &mut Host, exec: Exec) -> Result<(), Box<dyn Error>> {
    let session = SessionId(0);
    host.send(&ToGuest::Exec { session, exec })?;
    loop {
        match host.next()? {
            ToHost::Output { stream, bytes, .. } => {
                match stream {
                    Output::Stdout => std::io::stdout().write_all(&bytes)?,
                    Output::Stderr => std::io::stderr().write_all(&bytes)?,
                }
                let bytes = u32::try_from(bytes.len())?;
                host.send(&ToGuest::Credit {
                    session,
                    stream,
                    bytes,
                })?;
            }
            ToHost::Started { .. } => {}
            end => {
                eprint!("{end:?} ");
                return Ok(());
            }
        }
    }
}
