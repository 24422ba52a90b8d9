//! Which kernel modules the guest needs, and in which order. Debian's package has no modules.dep: that is made where it is
//! installed. Each module says itself which others it needs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use elf::ElfBytes;
use elf::endian::LittleEndian;

use super::{LinuxError, at};

/// How a guest reaches its host and its disks, and hears its power button.
const WANTED: [&str; 7] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
];

/// The files of those modules and of all that they need, each behind what it needs.
pub(super) fn in_order(modules: &Path) -> Result<Vec<PathBuf>, LinuxError> {
    let mut files = BTreeMap::new();
    collect(modules, &mut files).map_err(at(modules))?;
    let mut ordered = Vec::new();
    for name in WANTED {
        add(name, &files, &mut ordered)?;
    }
    Ok(ordered)
}

fn add(name: &str, files: &BTreeMap<String, PathBuf>, ordered: &mut Vec<PathBuf>) -> Result<(), LinuxError> {
    let file = files
        .get(name)
        .ok_or_else(|| LinuxError::NoModule(name.to_owned()))?;
    if ordered.contains(file) {
        return Ok(());
    }
    for needed in needs(file)? {
        add(&needed, files, ordered)?;
    }
    ordered.push(file.clone());
    Ok(())
}

/// The modules below a directory, by the names by which they know each other: with `_` for `-`.
fn collect(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(".ko"))
        {
            files.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

/// What a module needs: `depends=a,b` among the strings of its section `.modinfo` (Linux, scripts/mod/modpost.c).
fn needs(module: &Path) -> Result<Vec<String>, LinuxError> {
    let bytes = fs::read(module).map_err(at(module))?;
    let unreadable = || LinuxError::Module(module.to_owned());
    let elf = ElfBytes::<LittleEndian>::minimal_parse(&bytes).map_err(|_| unreadable())?;
    let section = elf
        .section_header_by_name(".modinfo")
        .ok()
        .flatten()
        .ok_or_else(unreadable)?;
    let (strings, _) = elf.section_data(&section).map_err(|_| unreadable())?;
    let depends = strings
        .split(|byte| *byte == 0)
        .find_map(|string| string.strip_prefix(b"depends="));
    let depends = depends.ok_or_else(unreadable)?;
    let names = String::from_utf8_lossy(depends);
    let names = names.split(',').filter(|name| !name.is_empty());
    Ok(names.map(|name| name.replace('-', "_")).collect())
}
