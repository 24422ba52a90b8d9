//! Images on disk: whole or not there, read-only, one for each name, and there as long as a record names them.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;

use stencil_core::{
    DiskFormat, Durability, Image, ImageDir, ImageDisk, ImageName, Metadata, NewImage, Store, StoreError,
    VmSpec,
};

use crate::given::{self, names};

/// The SHA-256 of "kernel" and of nothing, as sha256sum(1) has them.
const OF_KERNEL: &str = "6923dd1bc0460082c5d55a831908c24a282860b7f1cd6c2b79cf1bc8857c639c";
const OF_NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// The size of a disk, in bytes.
const DISK_BYTES: u64 = 8 << 20;

fn name(text: &str) -> ImageName {
    text.parse().unwrap()
}

/// A file to take, beside the data.
fn file(scratch: &Path, content: &str) -> PathBuf {
    let path = scratch.join("to-take");
    fs::write(&path, content).unwrap();
    path
}

/// A disk to take, of which all but the middle is a hole.
fn sparse(scratch: &Path) -> PathBuf {
    let path = scratch.join("disk-to-take");
    let disk = fs::File::create(&path).unwrap();
    disk.set_len(DISK_BYTES).unwrap();
    disk.write_all_at(b"middle", DISK_BYTES / 2).unwrap();
    path
}

fn begun(store: &Store, called: &str) -> (NewImage, Image) {
    let new = store.begin_image(&name(called)).unwrap();
    let data = store.data().path();
    let kernel = new.take(&file(data, "kernel"), ImageDir::KERNEL).unwrap();
    let initrd = new.take(&file(data, ""), ImageDir::INITRD).unwrap();
    let disk = ImageDisk {
        file: new.take(&sparse(data), &ImageDir::disk_name(0)).unwrap(),
        format: DiskFormat::Raw,
    };
    let image = Image {
        schema: Image::SCHEMA,
        name: name(called),
        created_at: given::time(),
        kernel,
        initrd: Some(initrd),
        disks: vec![disk],
        cmdline: "console=ttyS0".to_owned(),
        other: serde_json::Map::new(),
    };
    (new, image)
}

fn added(store: &Store, called: &str) -> Image {
    let (new, image) = begun(store, called);
    new.commit(&image).unwrap();
    image
}

fn of_image(image: &str, called: &str) -> Metadata {
    let record = given::record(called);
    Metadata {
        spec: VmSpec {
            image: Some(name(image)),
            ..record.spec.clone()
        },
        ..record
    }
}

#[test]
fn an_image_is_taken_whole_and_read_only() {
    let (_scratch, store) = given::store();
    let image = added(&store, "debian");
    // What was taken does not change with the file that it was taken from.
    file(store.data().path(), "something else");
    assert_eq!(store.image(&image.name).unwrap(), image);
    assert_eq!((image.kernel.bytes, image.kernel.sha256.as_str()), (6, OF_KERNEL));
    assert_eq!(image.initrd.unwrap().sha256, OF_NOTHING);
    let dir = store.data().image(&image.name);
    assert_eq!(fs::read(dir.kernel()).unwrap(), b"kernel");
    assert_eq!(names(dir.path()), ["disk0", "image.json", "initrd", "kernel"]);
    for path in [dir.kernel(), dir.initrd(), dir.disk(0)] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o400);
    }
    insta::assert_snapshot!(fs::read_to_string(dir.record()).unwrap());
}

#[test]
fn a_disk_of_an_image_keeps_its_holes() {
    let (_scratch, store) = given::store();
    let image = added(&store, "debian");
    let disk = store.data().image(&image.name).disk(0);
    let found = fs::metadata(&disk).unwrap();
    assert_eq!((found.len(), image.disks[0].file.bytes), (DISK_BYTES, DISK_BYTES));
    // st_blocks counts in 512 bytes (stat(2)).
    assert!(found.blocks() * 512 < DISK_BYTES / 2, "{} blocks", found.blocks());
    let content = fs::read(disk).unwrap();
    let (before, from_middle) = content.split_at(content.len() / 2);
    let (middle, after) = from_middle.split_at(b"middle".len());
    assert_eq!(middle, b"middle");
    assert!(before.iter().chain(after).all(|byte| *byte == 0));
}

#[test]
fn an_image_that_is_not_committed_leaves_nothing() {
    let (_scratch, store) = given::store();
    let (new, image) = begun(&store, "debian");
    assert!(matches!(
        store.image(&image.name),
        Err(StoreError::NoImage { .. })
    ));
    drop(new);
    assert!(names(&store.data().images()).is_empty());
    let new = store.begin_image(&image.name).unwrap();
    let missing = new.take(Path::new("/nonexistent/kernel"), ImageDir::KERNEL);
    assert!(
        matches!(missing, Err(StoreError::Io { what: "copy", .. })),
        "{missing:?}"
    );
}

#[test]
fn of_images_of_one_name_that_are_added_at_once_one_is_there_as_a_whole() {
    let (_scratch, store) = given::store();
    let begun: Vec<(NewImage, Image)> = (0..4)
        .map(|number| {
            let (new, image) = begun(&store, "debian");
            (
                new,
                Image {
                    cmdline: number.to_string(),
                    ..image
                },
            )
        })
        .collect();
    let together = Barrier::new(begun.len());
    let won: Vec<Image> = thread::scope(|scope| {
        let threads: Vec<_> = begun
            .into_iter()
            .map(|(new, image)| {
                let together = &together;
                scope.spawn(move || {
                    together.wait();
                    match new.commit(&image) {
                        Ok(()) => Some(image),
                        Err(StoreError::ImageExists { .. }) => None,
                        Err(error) => panic!("{error:?}"),
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().unwrap())
            .collect()
    });
    let late = store.begin_image(&name("debian"));
    assert!(matches!(late, Err(StoreError::ImageExists { .. })), "{late:?}");
    assert_eq!(won, [store.image(&name("debian")).unwrap()]);
    assert_eq!(names(&store.data().images()), ["debian"]);
}

#[test]
fn an_image_stays_while_a_record_names_it_and_goes_with_the_last_one() {
    let (_scratch, store) = given::store();
    added(&store, "debian");
    added(&store, "other");
    let (one, two) = (of_image("debian", "one"), of_image("debian", "two"));
    for metadata in [&one, &two, &of_image("other", "three"), &given::record("four")] {
        given::instance(&store, metadata);
    }
    let error = store.remove_image(&name("debian")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot remove image debian while instances were made of it: delete one, two first"
    );
    store.remove(&one.id).unwrap();
    let StoreError::ImageInUse { users, .. } = store.remove_image(&name("debian")).unwrap_err() else {
        panic!("another error")
    };
    assert_eq!(users.iter().map(|user| user.id).collect::<Vec<_>>(), [two.id]);
    store.remove(&two.id).unwrap();
    store.remove_image(&name("debian")).unwrap();
    assert_eq!(names(&store.data().images()), ["other"]);
    assert!(matches!(
        store.remove_image(&name("debian")),
        Err(StoreError::NoImage { .. })
    ));
}

#[test]
fn an_instance_of_an_image_that_is_gone_does_not_come_to_be() {
    let (_scratch, store) = given::store();
    let metadata = of_image("debian", "web");
    let new = store.begin(metadata.id).unwrap();
    let error = new.commit(&metadata, Durability::Renamed).unwrap_err();
    assert!(
        matches!(&error, StoreError::NoImage { name } if name.as_str() == "debian"),
        "{error:?}"
    );
    assert!(names(&store.data().instances()).is_empty());
}

#[test]
fn an_image_is_never_gone_from_under_an_instance_that_was_made_meanwhile() {
    let (_scratch, store) = given::store();
    for round in 0..50 {
        added(&store, "debian");
        let metadata = of_image("debian", "web");
        let new = store.begin(metadata.id).unwrap();
        let together = Barrier::new(2);
        let (made, removed) = thread::scope(|scope| {
            let making = scope.spawn(|| {
                together.wait();
                new.commit(&metadata, Durability::Renamed).is_ok()
            });
            together.wait();
            let removed = store.remove_image(&name("debian")).is_ok();
            (making.join().unwrap(), removed)
        });
        assert_ne!(made, removed, "round {round}");
        if made {
            store.remove(&metadata.id).unwrap();
            store.remove_image(&name("debian")).unwrap();
        }
    }
}

#[test]
fn an_image_whose_users_cannot_be_told_is_not_removed() {
    let (_scratch, store) = given::store();
    added(&store, "debian");
    let bystander = given::record("bystander");
    fs::write(given::instance(&store, &bystander).metadata(), "{").unwrap();
    let unreadable = store.remove_image(&name("debian"));
    assert!(
        matches!(&unreadable, Err(StoreError::Uncounted { unreadable, .. }) if *unreadable == [bystander.id]),
        "{unreadable:?}"
    );
    store.remove(&bystander.id).unwrap();
    let stranger = store.data().instances().join("lost+found");
    fs::create_dir(&stranger).unwrap();
    let strange = store.remove_image(&name("debian"));
    assert!(
        matches!(&strange, Err(StoreError::Uncounted { strangers, .. }) if *strangers == [stranger.clone()]),
        "{strange:?}"
    );
    fs::remove_dir(stranger).unwrap();
    store.remove_image(&name("debian")).unwrap();
}

#[test]
fn a_damaged_image_says_what_is_wrong_and_can_be_removed() {
    type Damage = (fn(&ImageDir), &'static str);
    let damages: [Damage; 6] = [
        (
            |dir| fs::write(dir.record(), "{").unwrap(),
            "its record cannot be read: it is no valid JSON",
        ),
        (
            |dir| fs::remove_file(dir.record()).unwrap(),
            "its record cannot be read: No such file",
        ),
        (|dir| fs::remove_file(dir.initrd()).unwrap(), "initrd is missing"),
        (|dir| fs::remove_file(dir.disk(0)).unwrap(), "disk0 is missing"),
        (
            |dir| {
                fs::remove_file(dir.kernel()).unwrap();
                fs::write(dir.kernel(), "kern").unwrap();
            },
            "kernel has 4 bytes, and its record says 6",
        ),
        (
            |dir| {
                let record = fs::read_to_string(dir.record()).unwrap();
                fs::write(dir.record(), record.replace("debian", "other")).unwrap();
            },
            "its record is that of image other",
        ),
    ];
    for (damage, expected) in damages {
        let (_scratch, store) = given::store();
        let debian = added(&store, "debian").name;
        damage(&store.data().image(&debian));
        let error = store.image(&debian).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        added(&store, "alpine");
        let scanned = store.images().unwrap();
        let readable: Vec<_> = scanned
            .iter()
            .map(|found| (found.name.as_str(), found.image.is_ok()))
            .collect();
        assert_eq!(readable, [("alpine", true), ("debian", false)]);
        store.remove_image(&debian).unwrap();
        assert_eq!(names(&store.data().images()), ["alpine"]);
    }
}

#[test]
fn what_a_crash_left_of_images_is_swept() {
    let (_scratch, store) = given::store();
    added(&store, "debian");
    let images = store.data().images();
    for left in [".new-0", ".del-1"] {
        fs::create_dir(images.join(left)).unwrap();
        fs::write(images.join(left).join("kernel"), "ker").unwrap();
    }
    let leftovers = store.leftovers().unwrap();
    assert_eq!(leftovers, [images.join(".del-1"), images.join(".new-0")]);
    leftovers
        .iter()
        .for_each(|leftover| store.sweep(leftover).unwrap());
    assert_eq!(names(&images), ["debian"]);
}
