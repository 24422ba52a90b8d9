//! Images, as people are shown them.

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use jiff::Timestamp;
use stencil_api::reply::{Image, ImageDisk, ImageFile};

use super::{age, align_right, bytes, column_gaps, or_nothing, plain};

/// The list of images; `now` is what ages are counted to.
pub(crate) fn images(list: &[Image], now: Timestamp) -> String {
    if list.is_empty() {
        return "no images".to_owned();
    }
    let size = |file: &Option<ImageFile>| or_nothing(file.as_ref().map(|file| bytes(file.bytes)));
    let mut table = plain(&["NAME", "KERNEL", "INITRD", "DISKS", "AGE"]);
    let mut errors = String::new();
    for image in list {
        table.add_row([
            image.name.to_string(),
            size(&image.kernel),
            size(&image.initrd),
            or_nothing(disk_sizes(image)),
            or_nothing(image.created_at.map(|made| age(made, now))),
        ]);
        if let Some(error) = &image.error {
            errors.push_str(&format!("\n{error}"));
        }
    }
    align_right(&mut table, &[1, 2, 3, 4]);
    table.trim_fmt() + &errors
}

/// The sizes of its disks, if it has any.
fn disk_sizes(image: &Image) -> Option<String> {
    let disks = image.disks.as_ref().filter(|disks| !disks.is_empty())?;
    let sizes: Vec<String> = disks.iter().map(|disk| bytes(disk.file.bytes)).collect();
    Some(sizes.join(", "))
}

/// One image, a line for each of its facts.
pub(crate) fn image(image: &Image) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    let file = |file: &ImageFile| format!("{}, sha256 {}", bytes(file.bytes), file.sha256);
    let mut facts = vec![
        ("name", Some(image.name.to_string())),
        ("kernel", image.kernel.as_ref().map(file)),
        ("initrd", image.initrd.as_ref().map(file)),
    ];
    let disk = |disk: &ImageDisk| ("disk", Some(format!("{}, {}", disk.format, file(&disk.file))));
    facts.extend(image.disks.iter().flatten().map(disk));
    facts.extend([
        ("cmdline", image.cmdline.clone().filter(|line| !line.is_empty())),
        ("added", image.created_at.map(|made| made.to_string())),
    ]);
    for (title, fact) in facts {
        if let Some(fact) = fact {
            table.add_row([title.to_owned(), fact]);
        }
    }
    column_gaps(&mut table);
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn example() -> Image {
        let file = |bytes: u64| json!({ "bytes": bytes, "sha256": "00112233".repeat(8) });
        serde_json::from_value(json!({
            "name": "debian", "created_at": "2026-01-02T03:04:05Z", "kernel": file(45 << 20), "initrd": file(1_500_000),
            "disks": [{ "format": "qcow2", "bytes": 300 << 20, "sha256": "44556677".repeat(8) }],
            "cmdline": "console=ttyS0",
        }))
        .unwrap()
    }

    #[test]
    fn images_are_listed_with_what_is_wrong_with_them_below() {
        let broken = json!({ "name": "broken", "error": "image broken cannot be used: kernel is missing" });
        let list = [serde_json::from_value(broken).unwrap(), example()];
        insta::assert_snapshot!(images(&list, "2026-01-02T05:04:05Z".parse().unwrap()));
        assert_eq!(images(&[], Timestamp::now()), "no images");
    }

    #[test]
    fn an_image_tells_its_files_with_their_sizes_and_digests() {
        insta::assert_snapshot!(image(&example()));
    }
}
