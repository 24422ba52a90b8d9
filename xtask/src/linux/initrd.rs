//! The initramfs: a cpio archive in the newc format, which the kernel unpacks into its first file system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cpio::newc::{self, ModeFileType};

use super::{LinuxError, at};
use crate::command::{self, Output};

const DIRECTORIES: [&str; 15] = [
    "bin",
    "dev",
    "etc",
    "home",
    "lib",
    "lib/modules",
    "mnt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "var",
];

/// The first process of a guest.
#[derive(Clone, Debug)]
pub(super) enum Init {
    /// The agent, which is there.
    Agent(PathBuf),
    /// A script of busybox's shell, and the agent as a program, if it is to be there.
    Script {
        script: &'static str,
        agent: Option<PathBuf>,
    },
}

const FILES: [(&str, &str); 4] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n"),
    // As systemd has it in images: to be filled when it is a machine.
    ("etc/machine-id", "uninitialized\n"),
];

/// The archive: what is its init, busybox under all of its names, the modules and their order.
pub(super) fn archive(init: &Init, busybox: &Path, modules: &[PathBuf]) -> Result<Vec<u8>, LinuxError> {
    let read = |path: &Path| fs::read(path).map_err(at(path));
    let mut archive = Archive(Vec::new());
    let mut list = String::new();
    for directory in DIRECTORIES {
        archive.add(directory, ModeFileType::Directory, 0o755, &[])?;
    }
    for (name, text) in FILES {
        archive.add(name, ModeFileType::Regular, 0o644, text.as_bytes())?;
    }
    match init {
        Init::Agent(agent) => {
            archive.add("init", ModeFileType::Regular, 0o755, &read(agent)?)?;
            // Found in PATH by its own name, too.
            archive.add("bin/stencil-agent", ModeFileType::Symlink, 0o777, b"/init")?;
        }
        Init::Script { script, agent } => {
            archive.add("init", ModeFileType::Regular, 0o755, script.as_bytes())?;
            if let Some(agent) = agent {
                archive.add("bin/stencil-agent", ModeFileType::Regular, 0o755, &read(agent)?)?;
            }
        }
    }
    archive.add("bin/busybox", ModeFileType::Regular, 0o755, &read(busybox)?)?;
    for name in applets(busybox)? {
        archive.add(&format!("bin/{name}"), ModeFileType::Symlink, 0o777, b"busybox")?;
    }
    for module in modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.add(
            &format!("lib/modules/{name}"),
            ModeFileType::Regular,
            0o644,
            &read(module)?,
        )?;
        list += &format!("/lib/modules/{name}\n");
    }
    archive.add("lib/modules/list", ModeFileType::Regular, 0o644, list.as_bytes())?;
    newc::trailer(archive.0).map_err(at(busybox))
}

/// The names that this busybox answers to, but its own.
fn applets(busybox: &Path) -> Result<Vec<String>, LinuxError> {
    let limit = Duration::from_secs(30);
    let listed = command::run(Command::new(busybox).arg("--list"), limit, Output::Kept)?;
    let names = listed.output.lines().filter(|name| *name != "busybox");
    Ok(names.map(str::to_owned).collect())
}

struct Archive(Vec<u8>);

impl Archive {
    fn add(
        &mut self,
        name: &str,
        kind: ModeFileType,
        permissions: u32,
        bytes: &[u8],
    ) -> Result<(), LinuxError> {
        let add = || {
            let size = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
            let entry = newc::Builder::new(name)
                .mode(permissions)
                .set_mode_file_type(kind);
            let mut entry = entry.write(&mut self.0, size);
            io::Write::write_all(&mut entry, bytes)?;
            entry.finish().map(drop)
        };
        add().map_err(at(Path::new(name)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_archive_has_the_agent_as_init_and_busybox_by_all_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("agent"), "agent").unwrap();
        fs::write(path("virtio.ko"), "module").unwrap();
        fs::write(path("busybox"), "#!/bin/sh\necho busybox\necho sh\n").unwrap();
        fs::set_permissions(path("busybox"), fs::Permissions::from_mode(0o755)).unwrap();
        let archive = archive(
            &Init::Agent(path("agent")),
            &path("busybox"),
            &[path("virtio.ko")],
        )
        .unwrap();

        let mut found = BTreeMap::new();
        let mut rest = &archive[..];
        loop {
            let mut entry = newc::Reader::new(rest).unwrap();
            if entry.entry().is_trailer() {
                break;
            }
            let (name, mode) = (entry.entry().name().to_owned(), entry.entry().mode());
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            found.insert(name, (mode, content));
            rest = entry.finish().unwrap();
        }
        let has = |name: &str, mode: u32, content: &str| {
            assert_eq!(found.get(name), Some(&(mode, content.to_owned())), "{name}");
        };
        has("init", 0o100_755, "agent");
        has("bin/sh", 0o120_777, "busybox");
        has("bin/busybox", 0o100_755, "#!/bin/sh\necho busybox\necho sh\n");
        has("lib/modules/virtio.ko", 0o100_644, "module");
        has("lib/modules/list", 0o100_644, "/lib/modules/virtio.ko\n");
        has("proc", 0o040_755, "");
    }
}
