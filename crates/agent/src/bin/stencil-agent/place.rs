//! Where the host is reached: a virtio-serial port, vsock, or a Unix socket.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};
use stencil_agent::{PORT_NAME, VSOCK_PORT};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

/// What the kernel knows of virtio-serial ports, by name.
const PORTS: &str = "/sys/class/virtio-ports";
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";
/// Device ids and a feature bit (Virtual I/O Device Version 1.2, 5 and 5.3.3).
const VIRTIO_CONSOLE: &str = "0x0003";
const VIRTIO_VSOCK: &str = "0x0013";
const VIRTIO_CONSOLE_F_MULTIPORT: usize = 1;

/// There is no way to the host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("could not open {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    #[error("could not listen on {}", .0.display())]
    Listen(PathBuf, #[source] io::Error),
    #[error("could not listen on vsock port {VSOCK_PORT}")]
    Vsock(#[source] io::Error),
    #[error(
        "this machine has neither a virtio-serial port {PORT_NAME} nor a vsock device; name one with --port"
    )]
    None,
    #[error("could not listen for devices")]
    Events(#[source] io::Error),
}

/// A way to the host.
#[derive(Debug)]
pub(crate) enum Place {
    /// A character device: one stream for ever, whoever is at its other end.
    Port(PathBuf, OwnedFd),
    /// A stream for each host that comes; the last one counts.
    Listener(Listener),
}

/// Where streams come from.
#[derive(Debug)]
pub(crate) enum Listener {
    Vsock(VsockListener),
    Unix(PathBuf, UnixListener),
}

impl Listener {
    /// The stream of who has come. By vsock that must be the host: processes of this machine (`vsock_loopback`) and of
    /// machines in it can connect too, and whoever speaks here runs commands as root.
    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Vsock(listener) => {
                let (stream, from) = listener.accept()?;
                if from.cid() != VMADDR_CID_HOST {
                    return Err(ErrorKind::PermissionDenied.into());
                }
                stream.set_nonblocking(true)?;
                Ok(stream.into())
            }
            Self::Unix(_, listener) => {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                Ok(rustix::net::accept_with(listener, flags)?)
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Vsock(listener) => listener.as_fd(),
            Self::Unix(_, listener) => listener.as_fd(),
        }
    }
}

impl Place {
    /// Opens a port.
    pub(crate) fn port(path: &Path) -> Result<Self, PlaceError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(port) => Ok(Self::Port(path.to_owned(), port)),
            Err(error) => Err(PlaceError::Open(path.to_owned(), error.into())),
        }
    }

    /// Listens on a Unix socket, in the place of one on which nobody listens any more.
    pub(crate) fn socket(path: &Path) -> Result<Self, PlaceError> {
        let listen = || {
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok(Self::Listener(Listener::Unix(path.to_owned(), listener)))
        };
        listen().map_err(|error| PlaceError::Listen(path.to_owned(), error))
    }

    fn vsock() -> Result<Self, PlaceError> {
        let listen = || {
            let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, VSOCK_PORT)?;
            listener.set_nonblocking(true)?;
            Ok(Self::Listener(Listener::Vsock(listener)))
        };
        listen().map_err(PlaceError::Vsock)
    }

    /// The port of the right name, or else vsock.
    pub(crate) fn find() -> Result<Self, PlaceError> {
        if let Some(port) = port_device() {
            Self::port(&port)
        } else if has_device(VIRTIO_VSOCK, |_| true) {
            Self::vsock()
        } else {
            Err(PlaceError::None)
        }
    }

    /// As [`Self::find`], on a machine whose devices may still be on their way.
    pub(crate) fn await_device() -> Result<Self, PlaceError> {
        // Listening first, then looking: what comes in between is not missed.
        let events = device_events().map_err(|error| PlaceError::Events(error.into()))?;
        loop {
            // A console with ports tells of them after it was found.
            let ports_may_come = has_device(VIRTIO_CONSOLE, |features| {
                features.as_bytes().get(VIRTIO_CONSOLE_F_MULTIPORT) == Some(&b'1')
            });
            match Self::find() {
                Ok(Self::Listener(_)) | Err(PlaceError::None) if ports_may_come => {}
                Err(PlaceError::None) => {}
                found => return found,
            }
            // Only that something happened counts, and that events were lost says as much.
            let mut event = [0; 8192];
            match rustix::net::recv(&events, &mut event, RecvFlags::empty()) {
                Ok(_) | Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(PlaceError::Events(error.into())),
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(path, _) | Self::Listener(Listener::Unix(path, _)) => write!(f, "{}", path.display()),
            Self::Listener(Listener::Vsock(_)) => write!(f, "vsock port {VSOCK_PORT}"),
        }
    }
}

/// The device of the port of the right name.
fn port_device() -> Option<PathBuf> {
    let is_ours =
        |port: &PathBuf| fs::read_to_string(port.join("name")).is_ok_and(|name| name.trim() == PORT_NAME);
    let mut ports = fs::read_dir(PORTS).ok()?.flatten().map(|entry| entry.path());
    let port = ports.find(is_ours)?;
    Some(Path::new("/dev").join(port.file_name()?))
}

/// Whether there is a virtio device of this kind, with a driver, and with such features: a digit for each bit, the lowest first.
fn has_device(kind: &str, is_such: impl Fn(&str) -> bool) -> bool {
    let devices = fs::read_dir(VIRTIO_DEVICES).into_iter().flatten().flatten();
    devices.map(|entry| entry.path()).any(|device| {
        fs::read_to_string(device.join("device")).is_ok_and(|id| id.trim() == kind)
            && device.join("driver").exists()
            && fs::read_to_string(device.join("features")).is_ok_and(|features| is_such(&features))
    })
}

/// The kernel's own announcements of devices (group 1 of NETLINK_KOBJECT_UEVENT).
fn device_events() -> rustix::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
    Ok(socket)
}
