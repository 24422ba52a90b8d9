//! Images: instances made of one boot its files, and it stays as long as one of them, or a fork of one, is there.

use std::fs;
use std::path::PathBuf;

use stencil_core::{ImageName, Metadata, State, StoreError};
use stencil_engine::{CreateRequest, EngineError, ForkRequest, ImageRequest};

use crate::scripted::House;

fn debian() -> ImageName {
    "debian".parse().unwrap()
}

impl House {
    fn image_request(&self) -> ImageRequest {
        let initrd = self.data.path().join("initrd.img");
        fs::write(&initrd, "initrd").unwrap();
        ImageRequest {
            name: debian(),
            kernel: self.request("any").kernel.unwrap(),
            initrd: Some(initrd),
            disks: Vec::new(),
            cmdline: "console=ttyS0".to_owned(),
        }
    }

    /// A request for an instance of the image `debian`.
    fn of_debian(&self, name: &str) -> CreateRequest {
        CreateRequest {
            image: Some(debian()),
            kernel: None,
            ..self.request(name)
        }
    }

    async fn metadata(&self, name: &str) -> Metadata {
        self.engine.get(name).await.unwrap().metadata.unwrap()
    }

    fn images(&self) -> Vec<PathBuf> {
        let images = fs::read_dir(self.data.path().join("images")).unwrap();
        images.map(|entry| entry.unwrap().path()).collect()
    }
}

#[tokio::test]
async fn an_instance_boots_its_image_s_files_whatever_becomes_of_those_that_were_added() {
    let house = House::new().await;
    let request = house.image_request();
    let added = house.engine.add_image(request.clone()).await.unwrap();
    assert_eq!(house.engine.image(debian()).await.unwrap(), added);
    fs::remove_file(request.kernel).unwrap();
    fs::remove_file(request.initrd.unwrap()).unwrap();
    let web = house.of_debian("web");
    fs::remove_file(house.data.path().join("kernel.elf")).unwrap();
    house.engine.create(web).await.unwrap();
    let spec = house.metadata("web").await.spec;
    assert_eq!(spec.image, Some(debian()));
    assert_eq!(fs::read(spec.initrd.unwrap()).unwrap(), b"initrd");
    let kernel = spec.kernel.as_ref().unwrap();
    assert!(kernel.starts_with(&house.images()[0]), "{kernel:?}");
    assert_eq!(spec.cmdline, "console=ttyS0");
    let other = CreateRequest {
        cmdline: Some("quiet".to_owned()),
        ..house.of_debian("other")
    };
    house.engine.create(other).await.unwrap();
    assert_eq!(house.metadata("other").await.spec.cmdline, "quiet");
}

#[tokio::test]
async fn an_image_is_in_use_by_its_instances_and_by_their_forks() {
    let house = House::new().await;
    house.engine.add_image(house.image_request()).await.unwrap();
    house.engine.create(house.of_debian("warm")).await.unwrap();
    house.engine.standby("warm").await.unwrap();
    // Not of a template, so that the source can go before its fork.
    house
        .engine
        .fork("warm", None, ForkRequest::default())
        .await
        .unwrap();
    house.running("of-no-image").await;
    for (in_use_by, then_delete) in [("warm, warm-1", "warm"), ("warm-1", "warm-1")] {
        let refused = house.engine.remove_image(debian()).await.unwrap_err();
        assert!(
            matches!(refused, EngineError::Store(StoreError::ImageInUse { .. })),
            "{refused:?}"
        );
        let told = stencil_core::error_chain(&refused).to_string();
        assert!(told.ends_with(&format!(": delete {in_use_by} first")), "{told}");
        house.engine.delete(then_delete).await.unwrap();
    }
    house.engine.remove_image(debian()).await.unwrap();
    assert!(house.images().is_empty());
    let gone = house.engine.create(house.of_debian("late")).await.unwrap_err();
    assert!(
        matches!(gone, EngineError::Store(StoreError::NoImage { .. })),
        "{gone:?}"
    );
}

#[tokio::test]
async fn an_instance_has_an_image_or_files_of_its_own() {
    let house = House::new().await;
    house.engine.add_image(house.image_request()).await.unwrap();
    let with = |image, kernel, initrd| CreateRequest {
        image,
        kernel,
        initrd,
        ..house.request("web")
    };
    let file = || Some(house.data.path().join("kernel.elf"));
    for (request, expected) in [
        (with(Some(debian()), file(), None), "an image has its own kernel"),
        (with(Some(debian()), None, file()), "an image has its own kernel"),
        (
            with(None, None, None),
            "there is nothing to boot; give image, kernel or firmware",
        ),
    ] {
        let refused = house.engine.create(request).await;
        assert!(
            matches!(&refused, Err(EngineError::Invalid(why)) if why.contains(expected)),
            "{refused:?}"
        );
    }
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn an_image_that_cannot_be_booted_is_not_added() {
    let house = House::new().await;
    let request = house.image_request();
    let missing = || house.data.path().join("missing");
    let text = || house.data.path().join("initrd.img");
    let on_another = house.data.path().join("overlay.qcow2");
    // Version 3, on a backing file whose name is at offset 1.
    fs::write(
        &on_another,
        [&b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\x01"[..], &[0; 64]].concat(),
    )
    .unwrap();
    let kernel = || request.kernel.clone();
    for (kernel, initrd, disks, expected) in [
        (missing(), None, vec![], "is not there"),
        (text(), None, vec![], "is neither an ELF file nor a bzImage"),
        (kernel(), Some(missing()), vec![], "is not there"),
        ("kernel.elf".into(), None, vec![], "is a relative path"),
        (kernel(), None, vec![missing()], "is not there"),
        (kernel(), None, vec![text()], "is no disk image"),
        (kernel(), None, vec![on_another], "is an image on a backing file"),
        (kernel(), None, vec![missing(); 17], "there are 17 disks"),
    ] {
        let bad = ImageRequest {
            kernel,
            initrd,
            disks,
            ..request.clone()
        };
        let refused = house.engine.add_image(bad).await;
        assert!(
            matches!(&refused, Err(EngineError::Invalid(why)) if why.contains(expected)),
            "{refused:?}"
        );
        assert!(house.images().is_empty());
    }
    house.engine.add_image(request.clone()).await.unwrap();
    let taken = house.engine.add_image(request).await.unwrap_err();
    assert!(
        matches!(taken, EngineError::Store(StoreError::ImageExists { .. })),
        "{taken:?}"
    );
}

#[tokio::test]
async fn what_a_killed_server_left_of_an_image_is_swept_and_the_images_are_there_again() {
    let house = House::new().await;
    house.engine.add_image(house.image_request()).await.unwrap();
    house.engine.create(house.of_debian("web")).await.unwrap();
    let half = house.data.path().join("images/.new-7");
    let house = house.restart_after(|| fs::create_dir(half).unwrap()).await;
    assert_eq!(house.images().len(), 1);
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
    assert!(house.engine.remove_image(debian()).await.is_err());
    let listed = house.engine.images().await.unwrap();
    assert_eq!(listed[0].name, debian());
    assert!(listed[0].image.is_ok());
}
