//! Datasets of images: every format through `dataset add`, a run on one worker and on two, and sources that are bad.

use lockstep_tests::images::{
    encoded, jpeg, pixels, png, tar, tar_of_samples, write_cifar10, write_cifar100, write_classes,
};
use lockstep_tests::job::{Job, set};
use lockstep_tests::place::Place;
use lockstep_tests::process::Ended;
use serde_json::Value;
use std::fs;
use std::path::Path;

const CLASSES: [&str; 4] = ["ant", "bee", "cat", "dog"];

/// Crops, colours and evaluation for images of any size.
const AUGMENT: &str = r#"augment = [
    { name = "random-resized-crop", size = 16, area = [0.3, 1.0] },
    { name = "flip" },
    { name = "color-jitter", brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 },
    { name = "lighting" },
]
evaluate = [{ name = "resize", size = 18 }, { name = "center-crop", size = 16 }]"#;

/// A job on coloured images.
fn job(dataset: &str, classes: u32, data: &str) -> String {
    let job = Job { steps: 8, width: 4, ..Job::default() }.to_string();
    let job = set(&job, "width", &format!("width = 4\nin_channels = 3\nclasses = {classes}"));
    let job = set(&job, "train", &format!("train = \"{dataset}/train\""));
    let job = set(&job, "test", &format!("test = \"{dataset}/test\""));
    set(&job, "augment", data)
}

fn add(place: &Place, name: &str, format: &str, source: &Path, options: &[&str]) -> Ended {
    let source = source.to_string_lossy();
    place.coordinator(["dataset", "add", name, "--format", format, &*source].iter().chain(options))
}

/// The entry of `dataset ls --json`.
#[track_caller]
fn listed(place: &Place, name: &str) -> Value {
    let all = place.json(&["dataset", "ls"]);
    let found = all.as_array().and_then(|all| all.iter().find(|entry| entry["name"] == name)).cloned();
    found.unwrap_or_else(|| panic!("`{name}` is not in {all}"))
}

/// Verifies all shards, runs the job on one worker and on two, and compares.
#[track_caller]
fn trains_alike(place: &Place, job: &str) {
    place.coordinator(["dataset", "verify"]).ok();
    let one = place.run(job, 1);
    assert!(one.metrics.contains_key("test_top1"), "{one:?}");
    let two = place.run(job, 2);
    assert_eq!((one.digest(), one.metrics["test_top1"]), (two.digest(), two.metrics["test_top1"]));
}

/// The only line besides hints is an error with these words.
#[track_caller]
fn refused(ended: Ended, words: &[&str]) {
    let ended = ended.refused(1, words);
    let (errors, others): (Vec<_>, Vec<_>) = ended.stderr.lines().partition(|l| l.starts_with("error: "));
    assert_eq!(errors.len(), 1, "{}", ended.stderr);
    assert!(others.iter().all(|line| line.starts_with("hint: ")), "{}", ended.stderr);
}

#[test]
fn cifar_10_trains_alike_on_one_and_two_workers() {
    let place = Place::empty();
    write_cifar10(&place.file("source"), 40);
    let ended = add(&place, "cifar", "cifar-10", &place.file("source"), &[]).ok();
    assert!(ended.stdout.contains("added `cifar/train`, 200 samples"), "{}", ended.stdout);
    let train = listed(&place, "cifar/train");
    assert_eq!(
        (&train["samples"], &train["channels"], &train["height"]),
        (&200.into(), &3.into(), &32.into())
    );
    assert_eq!((&train["class_names"][3], &train["same_size"]), (&"cat".into(), &true.into()));
    assert_eq!(listed(&place, "cifar/test")["samples"], 40);
    let augment = r#"augment = [{ name = "pad-crop", pixels = 4 }, { name = "flip" }]"#;
    trains_alike(&place, &job("cifar", 10, augment));
}

#[test]
fn cifar_100_has_its_fine_labels_and_can_be_made_grey() {
    let place = Place::empty();
    write_cifar100(&place.file("source"), 60);
    add(&place, "cifar", "cifar-100", &place.file("source"), &[]).ok();
    assert_eq!(listed(&place, "cifar/train")["classes"], 100);
    let steps = r#"channels = 1
augment = [{ name = "random-crop", size = 24 }]
evaluate = [{ name = "center-crop", size = 24 }]"#;
    let job = set(&job("cifar", 100, steps), "in_channels", "in_channels = 1");
    trains_alike(&place, &job);
}

#[test]
fn a_folder_of_jpegs_and_pngs_of_all_sizes_trains_alike_on_one_and_two_workers() {
    let place = Place::empty();
    let source = place.file("source");
    write_classes(&source.join("train"), &CLASSES, 30, 0);
    write_classes(&source.join("val"), &CLASSES, 8, 1000);
    fs::create_dir_all(source.join("train/cat/more")).expect("a folder");
    fs::rename(source.join("train/cat/000.jpg"), source.join("train/cat/more/x.JPEG")).ok();
    fs::write(source.join("train/.DS_Store"), b"left by a system").expect("a file");
    add(&place, "pets", "folder", &source, &[]).ok();
    let train = listed(&place, "pets/train");
    assert_eq!((&train["samples"], &train["classes"]), (&120.into(), &4.into()));
    assert_eq!(train["class_names"], serde_json::json!(CLASSES));
    assert_eq!(
        (&train["same_size"], &train["height"], &train["skipped"]),
        (&false.into(), &30.into(), &0.into())
    );
    let table = place.coordinator(["dataset", "ls"]).ok().stdout;
    assert!(table.contains("3x24-30x20-30"), "{table}");
    trains_alike(&place, &job("pets", 4, AUGMENT));

    let again = add(&place, "pets", "folder", &source, &[]).ok();
    assert!(again.stdout.contains("is there already: `pets/train`"), "{}", again.stdout);
}

#[test]
fn tar_files_of_samples_train_alike_on_one_and_two_workers() {
    let place = Place::empty();
    let source = place.file("source");
    fs::create_dir_all(&source).expect("a folder");
    for (name, samples) in [("train-0", 0..70), ("train-1", 70..120), ("val-0", 1000..1032)] {
        fs::write(source.join(name).with_extension("tar"), tar_of_samples(samples, 4)).expect("a tar file");
    }
    fs::write(source.join("classes.txt"), CLASSES.join("\n")).expect("the names");
    add(&place, "web", "webdataset", &source, &[]).ok();
    let train = listed(&place, "web/train");
    assert_eq!((&train["samples"], &train["class_names"]), (&120.into(), &serde_json::json!(CLASSES)));
    assert_eq!(listed(&place, "web/test")["samples"], 32);
    trains_alike(&place, &job("web", 4, AUGMENT));

    let single = |name: &str| {
        add(&place, name, "webdataset", &source.join("train-1.tar"), &[]).ok();
        let listed = listed(&place, name);
        assert_eq!((&listed["samples"], &listed["classes"]), (&50.into(), &4.into()));
        listed["class_names"].clone()
    };
    assert_eq!(single("one"), serde_json::json!(CLASSES));
    fs::remove_file(source.join("classes.txt")).expect("removed");
    assert_eq!(single("nameless"), Value::Null);
}

#[test]
fn the_same_images_in_a_folder_and_in_a_tar_file_are_the_same_shards() {
    let place = Place::empty();
    let source = place.file("source");
    let mut members = Vec::new();
    for (class, name) in (0..).zip(CLASSES) {
        fs::create_dir_all(source.join(name)).expect("a folder");
        for i in 0..5 {
            let (extension, bytes) = encoded(i, class);
            fs::write(source.join(format!("{name}/{i}.{extension}")), &bytes).expect("an image");
            members.push((format!("{name}/{i}.{extension}"), bytes));
            members.push((format!("{name}/{i}.cls"), class.to_string().into_bytes()));
        }
    }
    let file = place.file("all.tar");
    fs::write(&file, tar(members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))))
        .expect("a tar file");
    add(&place, "folder", "folder", &source, &[]).ok();
    add(&place, "web", "webdataset", &file, &[]).ok();
    let shards = fs::read_dir(place.dir().join("datasets/shards")).expect("the shards").count();
    assert_eq!(shards, 1);
}

#[test]
fn corrupt_images_are_refused_by_name_or_left_out_and_counted() {
    let place = Place::empty();
    let source = place.file("source");
    for split in ["train", "val"] {
        write_classes(&source.join(split), &CLASSES, 12, 0);
    }
    let whole = jpeg(&pixels(1, 1, 40, 40), 40, 40);
    fs::write(source.join("train/bee/cut.jpg"), &whole[..whole.len() / 2]).expect("half a JPEG");
    fs::write(source.join("train/cat/text.jpg"), "Not found").expect("a text");
    let mut bomb = png(&[0; 12], 2, 2);
    bomb[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]);
    let checksum = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&checksum.to_be_bytes());
    fs::write(source.join("train/dog/bomb.png"), bomb).expect("a PNG");
    refused(
        add(&place, "pets", "folder", &source, &[]),
        &[
            "3 of the 51 images for `pets/train` are corrupt",
            "bee/cut.jpg` (damaged JPEG: ",
            "cat/text.jpg` (it is neither JPEG nor PNG; it begins with \"Not foun\")",
            "dog/bomb.png` (it has 100000 x 100000 pixels",
            "--skip-corrupt",
        ],
    );
    assert_eq!(place.json(&["dataset", "ls"]), serde_json::json!([]), "nothing half-added is left");

    let ended = add(&place, "pets", "folder", &source, &["--skip-corrupt"]).ok();
    assert!(
        ended.stdout.contains("`pets/train`, 48 samples in 1 shard, 3 corrupt images left out"),
        "{}",
        ended.stdout
    );
    assert_eq!(ended.stderr.matches("left out: ").count(), 3, "{}", ended.stderr);
    let train = listed(&place, "pets/train");
    assert_eq!((&train["samples"], &train["skipped"]), (&48.into(), &3.into()));
    place.run(job("pets", 4, AUGMENT), 1);
}

#[test]
fn many_corrupt_images_are_counted_and_the_first_named() {
    let place = Place::empty();
    let source = place.file("source");
    fs::create_dir_all(source.join("ant")).expect("a folder");
    for i in 0..300 {
        fs::write(source.join(format!("ant/{i:03}.jpg")), "no image").expect("a text");
    }
    let ended = add(&place, "pets", "folder", &source, &[]);
    assert!(!ended.stderr.contains("020.jpg"), "{}", ended.stderr);
    refused(ended, &["300 of the 300 images", "000.jpg", "019.jpg", " and 280 more; "]);
    refused(add(&place, "pets", "folder", &source, &["--skip-corrupt"]), &["all of its images are corrupt"]);
}

#[test]
fn bad_folders_are_refused_with_one_line() {
    let place = Place::empty();
    let source = place.file("source");
    let add = || add(&place, "pets", "folder", &source, &[]);
    refused(add(), &["cannot list", "source"]);
    fs::create_dir_all(&source).expect("a folder");
    refused(add(), &["source", "no sub-folders", "one per class"]);
    write_classes(&source, &CLASSES, 2, 0);
    fs::create_dir_all(source.join("eel")).expect("a folder");
    refused(add(), &["eel", "this class has no images"]);
    fs::remove_dir(source.join("eel")).expect("removed");
    fs::write(source.join("dog/a.bmp"), b"BM").expect("a file");
    refused(add(), &["a.bmp", "neither `.jpg`, `.jpeg` nor `.png`"]);
    fs::rename(source.join("dog/a.bmp"), source.join("a.png")).expect("renamed");
    refused(add(), &["a.png", "no class"]);
    fs::remove_file(source.join("a.png")).expect("removed");
    let splits = place.file("splits");
    write_classes(&splits.join("train"), &CLASSES[..3], 2, 0);
    write_classes(&splits.join("val"), &CLASSES, 2, 0);
    let source = &splits;
    refused(
        self::add(&place, "pets", "folder", source, &[]),
        &["val/dog", "class `dog` is not one of the 3 of the training set"],
    );
    add().ok();
}

#[test]
fn bad_cifar_files_are_refused_with_one_line() {
    let place = Place::empty();
    let source = place.file("source");
    let add = |format: &str| add(&place, "cifar", format, &source, &[]);
    fs::create_dir_all(&source).expect("a folder");
    refused(add("cifar-10"), &["no files of CIFAR-10", "data_batch_1.bin"]);
    write_cifar10(&source, 3);
    refused(add("cifar-100"), &["no files of CIFAR-100", "train.bin"]);
    let batch = source.join("data_batch_2.bin");
    let whole = fs::read(&batch).expect("a batch");
    fs::write(&batch, &whole[..whole.len() - 1]).expect("a batch");
    refused(add("cifar-10"), &["data_batch_2.bin", "9218 bytes, not a multiple of the 3073"]);
    let mut wrong = whole.clone();
    wrong[3073] = 10;
    fs::write(&batch, &wrong).expect("a batch");
    refused(add("cifar-10"), &["data_batch_2.bin", "record 1 has label 10", "0 to 9"]);
    fs::remove_file(&batch).expect("removed");
    refused(add("cifar-10"), &["cannot read", "data_batch_2.bin"]);
    fs::write(&batch, &whole).expect("a batch");
    fs::write(source.join("batches.meta.txt"), "one\ntwo\n").expect("the names");
    refused(add("cifar-10"), &["batches.meta.txt", "2 names", "10 classes"]);
    assert_eq!(place.json(&["dataset", "ls"]), serde_json::json!([]));
}

#[test]
fn bad_tar_files_are_refused_with_one_line() {
    let place = Place::empty();
    let file = place.file("some.tar");
    let (_, image) = encoded(0, 0);
    let add = |bytes: &[u8]| {
        fs::write(&file, bytes).expect("a tar file");
        add(&place, "web", "webdataset", &file, &[])
    };
    let sample = |label: &[u8]| tar([("a.jpg", &image[..]), ("a.cls", label)]);
    let whole = sample(b"1");
    refused(add(b"no tar file, but a text of some length"), &["some.tar", "it is not a tar file"]);
    refused(add(b"\x1f\x8b\x08"), &["some.tar", "compressed with gzip; unpack it first"]);
    let ended = add(&tar([("\u{1b}[31m.jpg", &image[..])]));
    assert!(!ended.stderr.contains('\u{1b}'), "{}", ended.stderr);
    refused(ended, &[r"sample `\u{1b}[31m` has no label"]);
    refused(add(&whole[..700]), &["member `a.jpg` is truncated", "download or copy"]);
    refused(add(&whole[..whole.len() - 1024]), &["ends without the mark at the end"]);
    refused(add(&tar([("a.jpg", &image[..]), ("b.jpg", &image)])), &["sample `a` has no label", "`.cls`"]);
    refused(add(&tar([("a.cls", &b"1"[..])])), &["sample `a` has no image"]);
    refused(add(&tar([("a.jpg", &image[..]), ("a.png", &image)])), &["`a.png` is the second image"]);
    for label in ["-1", "cat", "1048576", ""] {
        refused(add(&sample(label.as_bytes())), &["member `a.cls` has label", label, "0 to 1048575"]);
    }
    refused(add(&tar([("a.jpg", &image[..]), ("a.json", b"{")])), &["member `a.json` is not JSON"]);
    refused(
        add(&tar([("a.jpg", &image[..]), ("a.cls", b"1"), ("a.json", b"{\"label\": 2}")])),
        &["has label 2", "has 1"],
    );
    refused(add(&tar([("a.txt", &b"x"[..])])), &["it has no images"]);
    refused(
        add(&tar([("a.jpg", &b"no image"[..]), ("a.cls", b"1")])),
        &["1 of the 1 image ", "some.tar: a`"],
    );
    let folder = place.file("folder");
    fs::create_dir_all(&folder).expect("a folder");
    let of_folder = || self::add(&place, "web", "webdataset", &folder, &[]);
    refused(of_folder(), &["no `.tar` files"]);
    fs::write(folder.join("0.tar"), sample(b"2")).expect("a tar file");
    fs::write(folder.join("classes.txt"), "ant\nbee\n").expect("the names");
    refused(of_folder(), &["sample `a` has label 2", "names 2 classes"]);
    assert_eq!(place.json(&["dataset", "ls"]), serde_json::json!([]));
}

#[test]
fn jobs_that_do_not_fit_their_images_are_refused_with_file_and_line() {
    let place = Place::new();
    let source = place.file("pets");
    write_classes(&source.join("train"), &CLASSES, 4, 0);
    write_classes(&source.join("val"), &CLASSES, 4, 0);
    add(&place, "pets", "folder", &source, &[]).ok();
    let good = job("pets", 4, AUGMENT);
    let check = |job: &str, line: &str, words: &[&str]| {
        let at = job.lines().position(|l| l.starts_with(line)).expect("the line") + 1;
        let place_of = format!("job.toml:{at}: ");
        refused(place.start_run(job, 1).wait(), &[words, &[&place_of]].concat());
    };
    let with = |key: &str, line: &str| set(&good, key, line);
    let no_crop = good.replace("    { name = \"random-resized-crop\", size = 16, area = [0.3, 1.0] },\n", "");
    check(&no_crop, "augment", &["images of `pets/train` differ in size", "`random-resized-crop`"]);
    check(&with("evaluate", "evaluate = []"), "evaluate", &["`pets/test` differ in size", "`center-crop`"]);
    check(&with("evaluate", "evaluate = [{ name = \"flip\" }]"), "evaluate", &["`flip` is random"]);
    check(&good.replace("hue = 0.1", "hue = 0.7"), "augment", &["step 3", "`color-jitter`", "`hue` is 0.7"]);
    check(
        &good.replace("area = [0.3, 1.0]", "area = [0.3, 2.0]"),
        "augment",
        &["step 1", "`area` is [0.3, 2.0]"],
    );
    check(&good.replace("size = 16, area", "size = 0, area"), "augment", &["`size` is 0"]);
    check(&with("train", "train = \"pets/train\"\nchannels = 2"), "channels", &["1 (grey) or 3"]);
    check(&with("train", "train = \"pets/train\"\nmean = [0.5]"), "mean", &["`mean` and `std` go together"]);
    let numbers = "train = \"pets/train\"\nmean = [0.5]\nstd = [0.5]";
    check(&with("train", numbers), "mean", &["`mean` has 1 numbers", "3 channels"]);
    check(
        &with("train", "train = \"pets/train\"\nchannels = 1"),
        "augment",
        &["`color-jitter` needs colours"],
    );
    let grey =
        set(&Job::default().to_string(), "augment", "augment = [{ name = \"random-crop\", size = 20 }]");
    check(&grey, "augment", &["20 x 20 pixels of images of `tiny/train` that have 16 x 16", "`resize`"]);
    let blue_first = set(&Job::default().to_string(), "augment", "augment = []\nchannel_order = \"bgr\"");
    check(&blue_first, "channel_order", &["`tiny/train` have no colours to reorder", "`channels = 3`"]);
    let unknown = good.replace("\"lighting\"", "\"lightning\"");
    refused(place.start_run(unknown, 1).wait(), &["`lightning`", "did you mean `lighting`"]);
}

#[test]
fn small_grey_images_are_enlarged_and_coloured_by_the_job_file() {
    let place = Place::new();
    let steps = r#"channels = 3
augment = [{ name = "resize", size = 24 }, { name = "pad-crop", pixels = 2 }, { name = "flip" }]
evaluate = [{ name = "resize", size = 24 }]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]"#;
    trains_alike(&place, &job("tiny", 10, steps));
}

/// The checksum of PNG's chunks (ISO 3309), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}
