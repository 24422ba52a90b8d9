//! What is booted is held against what its kernel takes and its machine has, before anything is made.

use std::fs::{self, File};
use std::path::PathBuf;

use stencil_engine::{CreateRequest, EngineError, ImageRequest};

use crate::scripted::House;

const MIB: u64 = 1 << 20;

impl House {
    /// A bzImage that takes 100 bytes of command line, and 32 MiB of memory from 16 MiB on.
    fn bzimage(&self) -> PathBuf {
        let mut image = vec![0; 0x264];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x238..0x23c].copy_from_slice(&100_u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
        image[0x260..0x264].copy_from_slice(&(32_u32 << 20).to_le_bytes());
        let path = self.data.path().join("vmlinuz");
        fs::write(&path, image).unwrap();
        path
    }

    fn with_cmdline(&self, cmdline: &str) -> CreateRequest {
        CreateRequest {
            kernel: Some(self.bzimage()),
            memory_bytes: 64 * MIB,
            cmdline: Some(cmdline.to_owned()),
            ..self.request("web")
        }
    }

    /// Why this instance is not made.
    async fn why_not(&self, request: CreateRequest) -> String {
        match self.engine.create(request).await {
            Err(EngineError::Invalid(why)) => why,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_command_line_that_the_kernel_does_not_take_is_refused_with_both_numbers() {
    let house = House::new().await;
    house
        .engine
        .create(house.with_cmdline(&"x".repeat(100)))
        .await
        .unwrap();
    house.engine.delete("web").await.unwrap();
    let too_long = "x".repeat(101);
    let why = house.why_not(house.with_cmdline(&too_long)).await;
    assert!(
        why.contains("cmdline has 101 bytes") && why.ends_with("takes at most 100"),
        "{why}"
    );
    for (cmdline, expected) in [
        (
            "quiet\nroot=/dev/vda",
            "cmdline has a line break at byte 5; a kernel takes one line of text",
        ),
        (
            "quiet\r",
            "cmdline has a line break at byte 5; a kernel takes one line of text",
        ),
        (
            "quiet\0",
            "cmdline has a NUL at byte 5; a kernel takes one line of text",
        ),
    ] {
        assert_eq!(house.why_not(house.with_cmdline(cmdline)).await, expected);
    }
    for cmdline in [too_long.as_str(), "a\nb"] {
        let image = ImageRequest {
            name: "debian".parse().unwrap(),
            kernel: house.bzimage(),
            initrd: None,
            disks: Vec::new(),
            cmdline: cmdline.to_owned(),
        };
        let refused = house.engine.add_image(image).await;
        assert!(
            matches!(&refused, Err(EngineError::Invalid(why)) if why.starts_with("cmdline has ")),
            "{refused:?}"
        );
    }
    assert!(house.engine.images().await.unwrap().is_empty());
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn memory_that_does_not_hold_the_kernel_and_its_initrd_is_refused_with_what_it_takes() {
    let house = House::new().await;
    let small = |memory_bytes| CreateRequest {
        memory_bytes,
        ..house.with_cmdline("")
    };
    let why = house.why_not(small(2 * MIB)).await;
    assert!(
        why.starts_with("memory is 2097152 bytes; kernel `")
            && why.contains("takes at least 50331648: give it more memory"),
        "{why}"
    );
    let initrd = house.data.path().join("initrd");
    File::create(&initrd).unwrap().set_len(20 * MIB).unwrap();
    let with_initrd = |memory_bytes| CreateRequest {
        initrd: Some(initrd.clone()),
        ..small(memory_bytes)
    };
    let why = house.why_not(with_initrd(64 * MIB)).await;
    assert!(
        why.contains("takes at least 71303168 with initrd `") && why.contains("which has 20971520 bytes"),
        "{why}"
    );
    assert_eq!(house.directories(), [] as [&str; 0]);
    house.engine.create(with_initrd(68 * MIB)).await.unwrap();
}
