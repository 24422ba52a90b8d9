//! A small Linux guest: Debian's cloud kernel, and an initramfs with busybox and the agent as init. Nothing is installed: the
//! packages are unpacked below `target/linux`.

mod initrd;
mod modules;
pub(crate) mod shell;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::build::{self, BuildError};
use crate::command::{self, CommandError, Output};
use crate::report;
use initrd::Init;

/// A slow mirror of packages.
const APT_LIMIT: Duration = Duration::from_secs(10 * 60);
const UNPACK_LIMIT: Duration = Duration::from_secs(2 * 60);

/// The package that always needs the newest kernel for clouds, and the one with busybox.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";

/// There is no Linux guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinuxError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(
        "the Linux guest is made of Debian's packages {KERNEL} and {BUSYBOX}, and apt-get does not know them here; on Debian, run `apt-get update` as root, then try again"
    )]
    Unknown,
    #[error("`{what}` failed:\n{output}")]
    Failed { what: &'static str, output: String },
    #[error("could not make the Linux guest in {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is no kernel module that can be read", .0.display())]
    Module(PathBuf),
    #[error("Debian's kernel has no module {0}")]
    NoModule(String),
}

/// What a hypervisor boots.
#[derive(Clone, Debug)]
pub(crate) struct LinuxImage {
    /// A bzImage.
    pub(crate) kernel: PathBuf,
    /// An uncompressed cpio archive: what is not unpacked in the guest takes no time there.
    pub(crate) initrd: PathBuf,
}

/// The `linux` task.
pub(crate) fn run() -> Result<(), LinuxError> {
    let image = image()?;
    println!(
        "--kernel {} --initrd {}",
        image.kernel.display(),
        image.initrd.display()
    );
    Ok(())
}

/// Gets the packages, if they are not there yet; where they lie unpacked.
pub(crate) fn fetch() -> Result<PathBuf, LinuxError> {
    let linux = build::target_directory()?.join("linux");
    let debian = linux.join("debian");
    if debian.exists() {
        return Ok(debian);
    }
    let kernel = kernel_package()?;
    let new = linux.join(format!("debian.{}.new", std::process::id()));
    let fetched = report::step(&format!("getting {kernel} and {BUSYBOX}"), || {
        unpack(&kernel, &new)
    });
    let placed = fetched.and_then(|()| fs::rename(&new, &debian).map_err(at(&debian)));
    if let Err(error) = placed {
        // The error says what went wrong; what is left is only in the way.
        let _ = fs::remove_dir_all(&new);
        return Err(error);
    }
    Ok(debian)
}

/// Builds the guest: kernel and initramfs, with the agent as it is in this tree.
pub(crate) fn image() -> Result<LinuxImage, LinuxError> {
    packed("initrd.cpio", &Init::Agent(build::agent()?))
}

/// The same guest with another init, a script that starts the agent as it likes.
pub(crate) fn image_with_service(script: &'static str) -> Result<LinuxImage, LinuxError> {
    let agent = Some(build::agent()?);
    packed("initrd-service.cpio", &Init::Script { script, agent })
}

/// The same guest with a script as its init, and without an agent.
pub(crate) fn image_without_agent(script: &'static str) -> Result<LinuxImage, LinuxError> {
    packed("initrd-without-agent.cpio", &Init::Script { script, agent: None })
}

/// The kernel, and an initramfs of this name with this init.
fn packed(name: &str, init: &Init) -> Result<LinuxImage, LinuxError> {
    let debian = fetch()?;
    let boot = debian.join("boot");
    let kernel = find(&boot, |name| name.starts_with("vmlinuz-")).map_err(at(&boot))?;
    let modules = modules::in_order(&debian.join("lib/modules"))?;
    let archive = initrd::archive(init, &debian.join("bin/busybox"), &modules)?;
    let initrd = debian.with_file_name(name);
    write_whole(&initrd, &archive).map_err(at(&initrd))?;
    Ok(LinuxImage { kernel, initrd })
}

/// The name of the newest kernel's own package, which the one that needs it says first.
fn kernel_package() -> Result<String, LinuxError> {
    let look = || -> Result<Option<String>, LinuxError> {
        let mut show = Command::new("apt-cache");
        show.args(["show", "--no-all-versions", KERNEL]);
        // Without apt there is no such package either.
        let Ok(shown) = command::run(&mut show, APT_LIMIT, Output::Kept) else {
            return Ok(None);
        };
        let depends = shown
            .output
            .lines()
            .find_map(|line| line.strip_prefix("Depends: "));
        let name = depends.and_then(|depends| depends.split([' ', ',']).next());
        Ok(name.map(str::to_owned))
    };
    if let Some(name) = look()? {
        return Ok(name);
    }
    if rustix::process::geteuid().is_root() {
        // Where it fails there is still no package.
        let _ = command::run(Command::new("apt-get").arg("update"), APT_LIMIT, Output::Kept);
    }
    look()?.ok_or(LinuxError::Unknown)
}

/// Downloads the packages and unpacks them into `dir`.
fn unpack(kernel: &str, dir: &Path) -> Result<(), LinuxError> {
    let packages = tempfile::tempdir().map_err(at(dir))?;
    let mut download = Command::new("apt-get");
    download
        .args([
            "download",
            "--quiet",
            "-o",
            "APT::Sandbox::User=root",
            kernel,
            BUSYBOX,
        ])
        .current_dir(packages.path());
    succeed("apt-get download", &mut download, APT_LIMIT)?;
    fs::create_dir_all(dir).map_err(at(dir))?;
    for package in fs::read_dir(packages.path()).map_err(at(packages.path()))? {
        let package = package.map_err(at(packages.path()))?;
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--extract").arg(package.path()).arg(dir);
        succeed("dpkg-deb --extract", &mut unpack, UNPACK_LIMIT)?;
    }
    Ok(())
}

fn succeed(what: &'static str, command: &mut Command, limit: Duration) -> Result<(), LinuxError> {
    let finished = command::run(command, limit, Output::Kept)?;
    if finished.succeeded() {
        return Ok(());
    }
    Err(LinuxError::Failed {
        what,
        output: finished.output,
    })
}

/// The one file of a directory that has such a name.
fn find(dir: &Path, is_it: impl Fn(&str) -> bool) -> io::Result<PathBuf> {
    let mut names = fs::read_dir(dir)?.flatten();
    let found = names.find(|entry| entry.file_name().to_str().is_some_and(&is_it));
    found
        .map(|entry| entry.path())
        .ok_or(io::ErrorKind::NotFound.into())
}

/// Writes a file so that whoever opens it finds the old one or the new one, whole; one that is the same stays.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let new = path.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, bytes)?;
    fs::rename(&new, path)
}

fn at(path: &Path) -> impl Fn(io::Error) -> LinuxError {
    let path = path.to_owned();
    move |source| LinuxError::Io {
        path: path.clone(),
        source,
    }
}
