//! Disks: bases are never written, no instance sees what another one writes, and a disk goes with its instance's memory. What
//! a guest would write is written here, to the layer that its VMM would be given.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use imago::qcow2::Qcow2;
use imago::storage::StorageCreateOptions;
use imago::{FormatAccess, FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage};
use stencil_core::{DiskFormat, InstanceDir, State};
use stencil_engine::{CreateRequest, DiskRequest, EngineError, ForkRequest, ImageRequest};

use crate::scripted::House;

const DISK_BYTES: usize = 1 << 20;
/// Where guests write, each the same number of bytes.
const PLACES: [u64; 3] = [0, 4096, 700_000];

impl House {
    fn base(&self) -> PathBuf {
        self.data.path().join("base.raw")
    }

    /// A base of which every byte is 0xbb, and an instance on it.
    pub(crate) async fn with_disk(&self, name: &str) {
        fs::write(self.base(), vec![0xbb; DISK_BYTES]).unwrap();
        let request = CreateRequest {
            disks: vec![DiskRequest {
                path: self.base(),
                read_only: false,
            }],
            ..self.request(name)
        };
        self.engine.create(request).await.unwrap();
    }

    async fn template_with_disk(&self, name: &str) {
        self.with_disk(name).await;
        self.write(name, PLACES[0], b"template").await;
        self.engine.standby(name).await.unwrap();
        self.engine.promote(name, None).await.unwrap();
    }

    pub(crate) async fn dir(&self, name: &str) -> InstanceDir {
        let id = self.engine.get(name).await.unwrap().id;
        InstanceDir::new(self.metadata_path(&id).parent().unwrap())
    }

    async fn disk(&self, name: &str, write: bool) -> FormatAccess<imago::file::File> {
        let path = self.dir(name).await.disk(0);
        let disk = Qcow2::<imago::file::File>::builder_path(path).write(write);
        FormatAccess::new(disk.open(PermissiveImplicitOpenGate::default()).unwrap())
    }

    pub(crate) async fn write(&self, name: &str, place: u64, what: &[u8; 8]) {
        let disk = self.disk(name, true).await;
        disk.write(&what[..], place).unwrap();
        disk.flush().unwrap();
    }

    pub(crate) async fn read(&self, name: &str, place: u64) -> [u8; 8] {
        let mut found = [0; 8];
        self.disk(name, false).await.read(&mut found[..], place).unwrap();
        found
    }

    pub(crate) async fn layers(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.dir(name).await.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut layers: Vec<String> = names.filter(|name| name.contains("disk")).collect();
        layers.sort();
        layers
    }

    pub(crate) async fn fork_now(&self, source: &str) -> Result<String, EngineError> {
        let fork = self.engine.fork(source, None, ForkRequest::default()).await?;
        Ok(fork.name.unwrap().to_string())
    }
}

/// As a VMM leaves a layer that did not close it: with the mark of qcow2 for an image that is open.
pub(crate) fn leave_open(layer: &Path) {
    let layer = File::options().write(true).open(layer).unwrap();
    layer.write_all_at(&[1], 79).unwrap();
}

#[tokio::test]
async fn forks_write_to_their_own_disks_and_nobody_sees_what_another_one_writes() {
    let house = House::new().await;
    house.template_with_disk("warm").await;
    let made = house.engine.forks("warm", crate::forks(3)).await.unwrap();
    assert!(made.iter().all(|fork| fork.result.is_ok()), "{made:?}");
    for (number, what) in [(1, b"fork one"), (2, b"fork two")] {
        for place in PLACES {
            house.write(&format!("warm-{number}"), place, what).await;
        }
    }
    for place in PLACES {
        assert_eq!(&house.read("warm-1", place).await, b"fork one");
        assert_eq!(&house.read("warm-2", place).await, b"fork two");
    }
    assert_eq!(&house.read("warm-3", PLACES[0]).await, b"template");
    assert_eq!(house.read("warm-3", PLACES[1]).await, [0xbb; 8]);
    assert_eq!(&house.read("warm", PLACES[0]).await, b"template");
    assert_eq!(fs::read(house.base()).unwrap(), vec![0xbb; DISK_BYTES]);
}

#[tokio::test]
async fn instances_of_an_image_write_to_layers_of_their_own_on_its_disks() {
    let house = House::new().await;
    fs::write(house.base(), vec![0xbb; DISK_BYTES]).unwrap();
    let named = house.request("web");
    let image = ImageRequest {
        name: "debian".parse().unwrap(),
        kernel: named.kernel.clone().unwrap(),
        initrd: None,
        disks: vec![house.base()],
        cmdline: String::new(),
    };
    let added = house.engine.add_image(image.clone()).await.unwrap();
    assert_eq!(added.disks[0].format, DiskFormat::Raw);
    assert_eq!(added.disks[0].file.bytes, DISK_BYTES as u64);
    // The image has one of its own: this one becomes another's.
    let own = DiskRequest {
        path: house.base(),
        read_only: false,
    };
    fs::write(house.base(), vec![0xee; DISK_BYTES]).unwrap();
    let request = CreateRequest {
        image: Some(image.name.clone()),
        kernel: None,
        disks: vec![own],
        ..named
    };
    house.engine.create(request).await.unwrap();
    assert_eq!(house.layers("web").await, ["disk0.qcow2", "disk1.qcow2"]);
    assert_eq!(house.read("web", 0).await, [0xbb; 8]);
    house.engine.standby("web").await.unwrap();
    for what in [b"fork one", b"fork two"] {
        let fork = house.fork_now("web").await.unwrap();
        assert_eq!(house.read(&fork, 0).await, [0xbb; 8]);
        house.write(&fork, 0, what).await;
        assert_eq!(&house.read(&fork, 0).await, what);
    }
    let disk = house.data.path().join("images/debian/disk0");
    assert_eq!(fs::metadata(&disk).unwrap().mode() & 0o777, 0o400);
    assert_eq!(fs::read(disk).unwrap(), vec![0xbb; DISK_BYTES]);
    house.engine.delete("web").await.unwrap();
    let refused = house.engine.remove_image(image.name).await.unwrap_err();
    let told = stencil_core::error_chain(&refused).to_string();
    assert!(told.ends_with(": delete web-1, web-2 first"), "{told}");
}

#[tokio::test]
async fn a_fork_needs_nothing_of_its_source_s_directory() {
    let house = House::new().await;
    house.with_disk("web").await;
    house.write("web", 0, b"from web").await;
    house.engine.standby("web").await.unwrap();
    let fork = house.fork_now("web").await.unwrap();
    house.engine.delete("web").await.unwrap();
    assert_eq!(&house.read(&fork, 0).await, b"from web");
    assert_eq!(house.layers(&fork).await, ["disk0-0.qcow2", "disk0.qcow2"]);
}

#[tokio::test]
async fn a_chain_of_layers_grows_by_forks_and_not_by_standby() {
    let house = House::new().await;
    house.with_disk("web").await;
    for _ in 0..3 {
        house.engine.standby("web").await.unwrap();
        house.engine.restore("web").await.unwrap();
        house.engine.stop("web").await.unwrap();
        house.engine.start("web").await.unwrap();
    }
    assert_eq!(house.layers("web").await, ["disk0.qcow2"]);
}

#[tokio::test]
async fn a_source_that_goes_on_does_not_write_what_its_forks_have() {
    let house = House::new().await;
    house.with_disk("web").await;
    house.write("web", 0, b"at first").await;
    let from_running = ForkRequest {
        from_running: true,
        ..ForkRequest::default()
    };
    house.engine.fork("web", None, from_running).await.unwrap();
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
    house.write("web", 0, b"later on").await;
    assert_eq!(&house.read("web-1", 0).await, b"at first");
    house.write("web-1", 0, b"its fork").await;
    assert_eq!(&house.read("web", 0).await, b"later on");
    // And the same of one that boots anew.
    house.engine.stop("web").await.unwrap();
    let stopped = house.fork_now("web").await.unwrap();
    house.engine.start("web").await.unwrap();
    house.write("web", 0, b"very end").await;
    assert_eq!(&house.read(&stopped, 0).await, b"later on");
}

#[tokio::test]
async fn a_disk_goes_with_its_memory_and_stays_when_that_is_thrown_away() {
    let house = House::new().await;
    house.with_disk("web").await;
    house.write("web", 0, b"with ram").await;
    house.engine.standby("web").await.unwrap();
    house.engine.restore("web").await.unwrap();
    assert_eq!(&house.read("web", 0).await, b"with ram");
    house.engine.standby("web").await.unwrap();
    house.engine.stop("web").await.unwrap();
    assert_eq!(&house.read("web", 0).await, b"with ram");
}

#[tokio::test]
async fn a_fork_of_the_configuration_of_a_running_instance_begins_with_the_base() {
    let house = House::new().await;
    house.with_disk("web").await;
    house.write("web", 0, b"running!").await;
    let of_config = ForkRequest {
        from_running: true,
        target_state: Some(State::Stopped),
        ..ForkRequest::default()
    };
    house.engine.fork("web", None, of_config).await.unwrap();
    assert_eq!(house.read("web-1", 0).await, [0xbb; 8]);
    assert_eq!(house.layers("web").await, ["disk0.qcow2"]);
}

#[tokio::test]
async fn a_fork_that_fails_leaves_no_layer_and_no_name_of_one() {
    let house = House::new().await;
    house.template_with_disk("warm").await;
    let before = house.directories();
    for step in ["spawn", "restore", "resume"] {
        house.hypervisor.fail(step);
        assert!(house.fork_now("warm").await.is_err(), "{step}");
        assert_eq!(house.directories(), before, "{step}");
        let layer = fs::metadata(house.dir("warm").await.disk(0)).unwrap();
        assert_eq!(layer.nlink(), 1, "{step}");
    }
}

#[tokio::test]
async fn a_fork_too_far_from_its_base_is_refused_before_anything_is_made() {
    let house = House::new().await;
    house.template_with_disk("warm").await;
    let first = house.fork_now("warm").await.unwrap();
    house.engine.standby(&first).await.unwrap();
    let second = house.fork_now(&first).await.unwrap();
    assert_eq!(&house.read(&second, 0).await, b"template");
    house.engine.standby(&second).await.unwrap();
    let before = house.directories();
    let refused = house.fork_now(&second).await.unwrap_err();
    assert!(
        matches!(&refused, EngineError::Invalid(why) if why.starts_with("a disk of this fork would lie on 4 others; scripted takes 3")),
        "{refused}"
    );
    assert_eq!(house.directories(), before);
    // It goes on itself: nobody else has its last layer.
    house.engine.restore(&second).await.unwrap();
}

#[tokio::test]
async fn a_crash_between_a_frozen_layer_and_the_next_costs_nothing() {
    let house = House::new().await;
    house.with_disk("web").await;
    house.write("web", 0, b"precious").await;
    house.engine.stop("web").await.unwrap();
    let dir = house.dir("web").await;
    fs::hard_link(dir.disk(0), dir.frozen_disk(0, 0)).unwrap();
    fs::write(dir.new_disk(0), "half a layer").unwrap();
    let house = house.restart().await;
    assert_eq!(
        house.layers("web").await,
        ["disk0-0.qcow2", "disk0.qcow2"],
        "swept"
    );
    let fork = house.fork_now("web").await.unwrap();
    house.engine.start("web").await.unwrap();
    for name in ["web", &fork] {
        assert_eq!(house.layers(name).await, ["disk0-0.qcow2", "disk0.qcow2"]);
        assert_eq!(&house.read(name, 0).await, b"precious");
    }
}

#[tokio::test]
async fn a_vmm_that_did_not_write_down_a_disk_costs_the_snapshot_and_no_more() {
    let house = House::new().await;
    house.with_disk("web").await;
    leave_open(&house.dir("web").await.disk(0));
    let lost = house.engine.standby("web").await.unwrap_err();
    assert!(matches!(lost, EngineError::DiskLost(0)), "{lost:?}");
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Stopped);
    house.engine.start("web").await.unwrap();
}

#[tokio::test]
async fn a_disk_that_cannot_be_one_is_refused_and_no_instance_is_made() {
    let house = House::new().await;
    let file = |name: &str, content: &[u8]| {
        let path = house.data.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    for (path, expected) in [
        (house.data.path().join("missing"), "is not there"),
        ("disk.raw".into(), "is a relative path"),
        (house.data.path().to_owned(), "is no regular file"),
        (file("text", b"hello"), "is no disk image"),
        (file("disk.vmdk", b"KDMV"), "is a VMDK image; convert it"),
    ] {
        for read_only in [false, true] {
            let request = CreateRequest {
                disks: vec![DiskRequest {
                    path: path.clone(),
                    read_only,
                }],
                ..house.request("web")
            };
            let refused = house.engine.create(request).await;
            assert!(
                matches!(&refused, Err(EngineError::Invalid(why)) if why.starts_with("disk `") && why.contains(expected)),
                "{refused:?}"
            );
        }
    }
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_read_only_disk_has_no_layer_and_a_base_that_became_another_is_told_at_the_start() {
    let house = House::new().await;
    fs::write(house.base(), vec![0xbb; DISK_BYTES]).unwrap();
    let request = CreateRequest {
        disks: vec![DiskRequest {
            path: house.base(),
            read_only: true,
        }],
        ..house.request("web")
    };
    house.engine.create(request).await.unwrap();
    assert_eq!(house.layers("web").await, [] as [&str; 0]);
    house.engine.stop("web").await.unwrap();
    fs::remove_file(house.base()).unwrap();
    let refused = house.engine.start("web").await;
    assert!(
        matches!(&refused, Err(EngineError::Invalid(why)) if why.contains("is not there")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_base_that_is_gone_or_of_another_length_is_told_at_start_restore_and_fork() {
    let house = House::new().await;
    for (name, read_only) in [("stopped", false), ("asleep", false), ("reads", true)] {
        fs::write(house.base(), vec![0xbb; DISK_BYTES]).unwrap();
        let disks = vec![DiskRequest {
            path: house.base(),
            read_only,
        }];
        let request = CreateRequest {
            disks,
            ..house.request(name)
        };
        house.engine.create(request).await.unwrap();
        if name == "stopped" {
            house.engine.stop(name).await.unwrap();
        } else {
            house.engine.standby(name).await.unwrap();
        }
    }
    let cut = || fs::write(house.base(), vec![0xbb; DISK_BYTES / 2]).unwrap();
    let grown = || fs::write(house.base(), vec![0xbb; DISK_BYTES * 2]).unwrap();
    let gone = || fs::remove_file(house.base()).unwrap();
    let changes: [(&dyn Fn(), &str); 3] = [
        (&cut, "has 524288 bytes, and had 1048576"),
        (&grown, "has 2097152 bytes, and had 1048576"),
        (&gone, "is not there"),
    ];
    for (change, expected) in changes {
        change();
        let before = house.directories();
        let asked = house.hypervisor.calls().len();
        for refused in [
            house.engine.start("stopped").await.map(drop),
            house.engine.restore("asleep").await.map(drop),
            house.engine.restore("reads").await.map(drop),
            house.fork_now("asleep").await.map(drop),
            house.fork_now("reads").await.map(drop),
        ] {
            assert!(
                matches!(&refused, Err(EngineError::Invalid(why)) if why.starts_with("disk `") && why.contains(expected)),
                "{refused:?}"
            );
        }
        assert_eq!(house.directories(), before, "{expected}");
        assert_eq!(
            house.hypervisor.calls().len(),
            asked,
            "no VMM was started: {expected}"
        );
    }
    // Put back, it serves again.
    fs::write(house.base(), vec![0xbb; DISK_BYTES]).unwrap();
    house.engine.start("stopped").await.unwrap();
    house.engine.restore("asleep").await.unwrap();
    house.fork_now("reads").await.unwrap();
}

#[tokio::test]
async fn a_qcow2_base_that_is_cut_off_is_taken_for_no_instance_and_no_image() {
    let house = House::new().await;
    let path = house.data.path().join("base.qcow2");
    let new = imago::file::File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
    let builder = Qcow2::<imago::file::File>::create_builder(new).size(DISK_BYTES as u64);
    builder.create().unwrap();
    let disk = Qcow2::<imago::file::File>::builder_path(&path).write(true);
    let disk = FormatAccess::new(disk.open(PermissiveImplicitOpenGate::default()).unwrap());
    disk.write(&b"a"[..], 0).unwrap();
    disk.write(&b"z"[..], DISK_BYTES as u64 - 1).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let whole = fs::read(&path).unwrap();
    for length in [whole.len() / 2, 80] {
        fs::write(&path, &whole[..length]).unwrap();
        let request = CreateRequest {
            disks: vec![DiskRequest {
                path: path.clone(),
                read_only: false,
            }],
            ..house.request("web")
        };
        let image = ImageRequest {
            name: "debian".parse().unwrap(),
            kernel: request.kernel.clone().unwrap(),
            initrd: None,
            disks: vec![path.clone()],
            cmdline: String::new(),
        };
        for refused in [
            house.engine.create(request).await.map(drop),
            house.engine.add_image(image).await.map(drop),
        ] {
            let numbers = format!("and the file has {length} bytes");
            assert!(
                matches!(&refused, Err(EngineError::Invalid(why)) if why.contains("cut off") && why.contains(&numbers)),
                "{refused:?}"
            );
        }
    }
    assert_eq!(house.directories(), [] as [&str; 0]);
    assert!(house.engine.images().await.unwrap().is_empty());
}

/// Whether others go on while `operation` waits for the file at `pipe`, which somebody opens at last for it.
async fn holds_nobody_up<T>(pipe: &Path, operation: impl Future<Output = T>) -> bool {
    let (opened, is_opened) = mpsc::channel();
    let path = pipe.to_owned();
    let watchdog = thread::spawn(move || match is_opened.recv_timeout(crate::PATIENCE) {
        Ok(()) => None,
        Err(_) => Some(File::options().read(true).write(true).open(path).unwrap()),
    });
    let others = async {
        // This opens it when somebody waits to read it, and fails until then (fifo(7)).
        let for_who_waits = || {
            let mut options = File::options();
            options.write(true).custom_flags(libc::O_NONBLOCK).open(pipe)
        };
        while for_who_waits().is_err() {
            tokio::task::yield_now().await;
        }
        opened.send(()).is_ok()
    };
    let (_, in_time) = tokio::join!(operation, others);
    watchdog.join().unwrap().is_none() && in_time
}

#[tokio::test]
async fn a_disk_that_does_not_answer_holds_up_nobody_else() {
    let house = House::new().await;
    house.template_with_disk("warm").await;
    house.with_disk("web").await;
    house.engine.standby("web").await.unwrap();
    for name in ["warm", "web"] {
        let pipe = house.dir(name).await.disk(0);
        fs::remove_file(&pipe).unwrap();
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let in_time = if name == "warm" {
            holds_nobody_up(&pipe, house.fork_now(name)).await
        } else {
            holds_nobody_up(&pipe, house.engine.restore(name)).await
        };
        assert!(in_time, "{name}");
    }
}
