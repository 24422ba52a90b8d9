//! Makes the guest the machine of an epoch: the kernel's randomness, its clock, its name, its machine id.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use rustix::ioctl::{Setter, opcode};
use rustix::time::{ClockId, Timespec};
use stencil_agent::{Entropy, Epoch};

const MACHINE_ID: &str = "/etc/machine-id";
/// What lies over [`MACHINE_ID`] where that cannot be written.
const RUN: &str = "/run/stencil-agent";
/// The longest host name of Linux (sethostname(2)).
const HOST_NAME_MAX: usize = 64;

/// Why the guest is not that machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("a host name has 1 to {HOST_NAME_MAX} letters, digits, dashes and dots, unlike {0:?}")]
    HostName(String),
    #[error("a machine id of zeros is none")]
    MachineId,
    #[error("could not give the kernel fresh randomness")]
    Entropy(#[source] io::Error),
    #[error("could not set the clock")]
    Clock(#[source] io::Error),
    #[error("could not set the host name")]
    SetHostName(#[source] io::Error),
    #[error("could not renew {MACHINE_ID}")]
    SetMachineId(#[source] io::Error),
}

/// How much of the machine is the guest's.
#[derive(Debug)]
pub(crate) struct Identity {
    /// The kernel's randomness, open already as a fork waits for that; absent where randomness and clock are not the guest's.
    random: Option<File>,
}

impl Identity {
    /// Of a machine whose kernel is the guest's alone, or is not.
    ///
    /// # Errors
    /// If the kernel's randomness cannot be opened.
    pub(crate) fn new(shared_kernel: bool) -> io::Result<Self> {
        let random = (!shared_kernel).then(|| File::open("/dev/urandom"));
        Ok(Self {
            random: random.transpose()?,
        })
    }

    /// Takes the identity of `epoch`. What fails leaves what came before it done; taking it again is harmless.
    pub(crate) fn take(&self, epoch: &Epoch) -> Result<(), IdentityError> {
        let name = &epoch.host_name;
        let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
        if name.is_empty() || name.len() > HOST_NAME_MAX || !name.bytes().all(is_of_name) {
            return Err(IdentityError::HostName(
                name.chars().take(HOST_NAME_MAX).collect(),
            ));
        }
        if epoch.machine_id == [0; 16] {
            return Err(IdentityError::MachineId);
        }
        if let Some(random) = &self.random {
            add_entropy(random, &epoch.entropy).map_err(IdentityError::Entropy)?;
            let time = Timespec::try_from(epoch.wall_clock);
            let time = time.map_err(|_| IdentityError::Clock(ErrorKind::InvalidInput.into()))?;
            rustix::time::clock_settime(ClockId::Realtime, time)
                .map_err(|error| IdentityError::Clock(error.into()))?;
        }
        rustix::system::sethostname(name.as_bytes())
            .map_err(|error| IdentityError::SetHostName(error.into()))?;
        set_machine_id(epoch.machine_id).map_err(IdentityError::SetMachineId)
    }
}

/// `struct rand_pool_info` (Linux, include/uapi/linux/random.h).
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: i32,
    bytes: i32,
    pool: [u8; 64],
}

/// Mixes the bytes into the kernel's pool, and makes all of its generators start again from that.
fn add_entropy(random: &File, entropy: &Entropy) -> io::Result<()> {
    let info = RandPoolInfo {
        entropy_bits: 512,
        bytes: 64,
        pool: entropy.0,
    };
    // SAFETY: RNDADDENTROPY is _IOW('R', 3, int[2]) and reads a rand_pool_info with as many bytes as it says;
    // RNDRESEEDCRNG is _IO('R', 7).
    unsafe {
        rustix::ioctl::ioctl(
            random,
            Setter::<{ opcode::write::<[i32; 2]>(b'R', 3) }, _>::new(info),
        )?;
        rustix::ioctl::ioctl(random, rustix::ioctl::NoArg::<{ opcode::none(b'R', 7) }>::new())?;
    }
    Ok(())
}

/// Writes a file in place. What is as long as before is not cut off first, which takes longer than writing it.
fn overwrite(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(bytes)?;
    let length = bytes.len() as u64;
    if file.metadata()?.len() > length {
        file.set_len(length)?;
    }
    Ok(())
}

/// Writes the machine id, in place so that whatever lies there stays that; where that is read-only, over it.
fn set_machine_id(id: [u8; 16]) -> io::Result<()> {
    let mut text = id.iter().fold(String::new(), |mut text, byte| {
        // A String takes all that is written.
        let _ = write!(text, "{byte:02x}");
        text
    });
    text.push('\n');
    match overwrite(Path::new(MACHINE_ID), text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {}
        written => return written,
    }
    fs::create_dir_all(RUN)?;
    let over = Path::new(RUN).join("machine-id");
    fs::write(&over, &text)?;
    // There is no machine-id to lie over on some images; then there is none to be wrong.
    match OpenOptions::new().read(true).open(MACHINE_ID) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Ok(rustix::mount::mount_bind(&over, MACHINE_ID)?),
    }
}
