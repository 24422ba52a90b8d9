//! Which kernel modules the guest needs, and in which order. Debian's package has no modules.dep: that is made where it is
//! installed. Each module says itself which others it needs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use elf::ElfBytes;
use elf::endian::LittleEndian;

use super::{LinuxError, at};

/// How a guest reaches its host and its disks, tells of a panic, and hears its power button.
const WANTED: [&str; 8] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "pvpanic_mmio",
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

/// Adds a module behind all that it needs.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file of three sections: none, `.modinfo` and the names of these.
    fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let (modinfo_at, names_at) = (64, 64 + modinfo.len());
        let sections_at = names_at + names.len();
        let word = |number: usize| (number as u64).to_le_bytes();
        let section = |name: u32, kind: u32, offset: usize, size: usize| {
            let head = [name.to_le_bytes(), kind.to_le_bytes()].concat();
            let rest = [
                word(0),
                word(0),
                word(offset),
                word(size),
                word(0),
                word(1),
                word(0),
            ];
            [head, rest.concat()].concat()
        };
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\x3e\0\x01\0\0\0".to_vec();
        elf.extend([word(0), word(0), word(sections_at)].concat());
        // Flags; the sizes of this header, of program headers and of section headers; which section has the names.
        elf.extend(b"\0\0\0\0\x40\0\x38\0\0\0\x40\0\x03\0\x02\0");
        elf.extend_from_slice(modinfo);
        elf.extend_from_slice(names);
        elf.extend(section(0, 0, 0, 0));
        elf.extend(section(1, 1, modinfo_at, modinfo.len()));
        elf.extend(section(10, 3, names_at, names.len()));
        elf
    }

    fn files(dir: &Path, modules: &[(&str, &str)]) -> BTreeMap<String, PathBuf> {
        for (name, depends) in modules {
            let modinfo = format!("license=GPL\0depends={depends}\0name={name}\0");
            fs::write(dir.join(format!("{name}.ko")), module(modinfo.as_bytes())).unwrap();
        }
        let mut files = BTreeMap::new();
        collect(dir, &mut files).unwrap();
        files
    }

    #[test]
    fn each_module_comes_once_and_behind_what_it_needs() {
        let dir = tempfile::tempdir().unwrap();
        let modules = [
            ("virtio-net", "net_failover,virtio"),
            ("net_failover", "fail-over"),
            ("fail_over", ""),
            ("virtio", ""),
        ];
        let files = files(dir.path(), &modules);
        let mut ordered = Vec::new();
        add("virtio", &files, &mut ordered).unwrap();
        add("virtio_net", &files, &mut ordered).unwrap();
        let names: Vec<_> = ordered
            .iter()
            .filter_map(|path| path.file_stem()?.to_str())
            .collect();
        assert_eq!(names, ["virtio", "fail_over", "net_failover", "virtio-net"]);
    }

    #[test]
    fn a_module_that_is_missing_or_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path(), &[("virtio_blk", "virtio")]);
        let missing = add("virtio_blk", &files, &mut Vec::new()).unwrap_err();
        assert!(missing.to_string().ends_with("no module virtio"), "{missing}");
        let damaged = dir.path().join("virtio_blk.ko");
        fs::write(&damaged, "no ELF file").unwrap();
        assert!(matches!(needs(&damaged), Err(LinuxError::Module(path)) if path == damaged));
    }
}
