//! Sources of images: splits, classes, and what is refused. The images are texts here, and one that begins with `bad` is
//! corrupt.

use super::*;
use crate::dataset::SourceFormat::{Cifar10, Folder, Idx, WebDataset};
use crate::dataset::{ChannelSums, DatasetReader, ImageFacts, ImageImport, InspectImage, SampleSize};
use crate::dataset::{DatasetError, Imported, ShardCache, SourceFormat};
use std::fs;
use std::sync::Arc;

struct Texts;

impl InspectImage for Texts {
    fn inspect(&self, encoded: &[u8]) -> Result<ImageFacts, String> {
        if encoded.starts_with(b"bad") {
            return Err("it is a text".to_owned());
        }
        let sums = ChannelSums::of([1, 2]);
        Ok(ImageFacts { size: SampleSize { height: 2, width: 1 }, sums: [sums; 3] })
    }
}

impl Fixture {
    fn add(&self, name: &str, format: SourceFormat, source: &str) -> Result<Vec<Imported>, DatasetError> {
        self.add_with(name, format, source, None)
    }

    fn add_with(
        &self,
        name: &str,
        format: SourceFormat,
        source: &str,
        classes_of: Option<&str>,
    ) -> Result<Vec<Imported>, DatasetError> {
        let images = ImageImport { inspect: &Texts, skip_corrupt: false, classes_of };
        self.store.import(name, format, &self.dir.path().join(source), images, |_| ())
    }

    /// Writes files, and the folders above them.
    fn write(&self, files: &[(&str, &[u8])]) {
        for (path, bytes) in files {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    fn names(&self) -> Vec<String> {
        self.store.list().unwrap().iter().map(|m| m.name.to_string()).collect()
    }

    fn labels(&self, name: &str) -> Vec<u32> {
        let cache = ShardCache::new(&self.dir.path().join("cache"), 0).unwrap();
        let cache = Arc::new(cache.with_local([self.store.shards_dir().to_path_buf()]));
        let reader = DatasetReader::new(Arc::new(self.store.manifest(name).unwrap()), cache).unwrap();
        (0..reader.len()).map(|i| reader.sample(i).unwrap().label).collect()
    }
}

/// One line with all of these words.
#[track_caller]
fn refused(result: Result<Vec<Imported>, DatasetError>, words: &[&str]) {
    let error = result.unwrap_err().to_string();
    assert!(!error.contains(char::is_control), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

fn tar(members: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (name, text) in members {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        builder.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A tar file of the sample `a` with a label.
fn tar_of(label: &str) -> Vec<u8> {
    tar(&[("a.jpg", label), ("a.cls", label)])
}

#[test]
fn a_refused_test_split_leaves_no_training_split() {
    let record = [0; 3073];
    let check = |format, files: &[(&str, &[u8])], words: &[&str]| {
        let f = Fixture::new();
        f.write(files);
        refused(f.add("d", format, "s"), words);
        assert!(f.names().is_empty(), "{:?}", f.names());
        assert_eq!(fs::read_dir(f.store.shards_dir()).unwrap().count(), 0);
    };
    let batches = ["s/data_batch_1.bin", "s/data_batch_2.bin", "s/data_batch_3.bin", "s/data_batch_4.bin"];
    let mut cifar: Vec<(&str, &[u8])> = batches.iter().map(|path| (*path, &record[..])).collect();
    cifar.extend([("s/data_batch_5.bin", &record[..]), ("s/test_batch.bin", &record[1..])]);
    check(Cifar10, &cifar, &["test_batch.bin", "truncated"]);
    check(
        Folder,
        &[("s/train/x/1.jpg", b"1"), ("s/val/x/1.jpg", b"bad")],
        &["1 of the 1 image for `d/test` is corrupt"],
    );
    let whole = tar_of("0");
    check(WebDataset, &[("s/train.tar", &whole), ("s/val.tar", &whole[..2048])], &["val.tar", "truncated"]);

    let f = Fixture::new();
    let source = f.source("s");
    write_pair(&source, "train", 3, Compression::Plain);
    write_pair(&source, "t10k", 3, Compression::Plain);
    truncate(&source.join("t10k-images-idx3-ubyte"), 1);
    refused(f.add("d", Idx, "s"), &["t10k-images"]);
    assert!(f.names().is_empty());
}

#[test]
fn a_test_split_that_is_there_with_other_content_leaves_no_training_split() {
    let f = Fixture::new();
    f.write(&[("s/val/x/1.jpg", b"1")]);
    f.add("d", Folder, "s").unwrap();
    f.write(&[("s/val/x/2.jpg", b"2"), ("s/train/x/1.jpg", b"3")]);
    refused(f.add("d", Folder, "s"), &["`d/test` already exists"]);
    assert_eq!(f.names(), ["d/test"]);
    assert_eq!(fs::read_dir(f.store.shards_dir()).unwrap().count(), 1);
}

#[test]
fn val_and_test_together_are_refused_and_can_be_added_one_by_one() {
    let f = Fixture::new();
    f.write(&[("s/train/x/1.jpg", b"1"), ("s/val/x/1.jpg", b"2"), ("s/test/x/1.jpg", b"3")]);
    let words = ["both", "would become `d/test`", "`coordinator dataset add d/val ... --classes-of d/train`"];
    refused(f.add("d", Folder, "s"), &words);
    for split in ["train", "val", "test"] {
        f.add(&format!("d/{split}"), Folder, &format!("s/{split}")).unwrap();
    }
    let (zero, one) = (tar_of("0"), tar_of("1"));
    f.write(&[("w/train/0.tar", &zero), ("w/val/0.tar", &zero), ("w/test/0.tar", &one)]);
    refused(f.add("w", WebDataset, "w"), &["w/val", "w/test", "both", "would become `w/test`"]);
    f.write(&[("b/train-0.tar", &zero), ("b/val-0.tar", &zero), ("b/test-0.tar", &one)]);
    refused(f.add("b", WebDataset, "b"), &["val-0.tar", "test-0.tar", "would become `b/test`"]);
    f.write(&[("c/train-0.tar", &zero), ("c/train/1.tar", &one)]);
    refused(f.add("c", WebDataset, "c"), &["train-0.tar", "c/train`", "would become `c/train`"]);
    assert_eq!(f.names(), ["d/test", "d/train", "d/val"]);
}

#[test]
fn a_folder_named_like_a_split_without_classes_is_neither_left_out_nor_a_class() {
    let f = Fixture::new();
    f.write(&[("one/train/x/1.jpg", b"1"), ("one/test/1.jpg", b"2")]);
    let words = ["`test` is a split", "no folders of classes", "rename it if it is itself a class"];
    refused(f.add("d", Folder, "one"), &[&words[..], &["one/test"]].concat());
    f.write(&[("both/train/1.jpg", b"1"), ("both/test/1.jpg", b"2")]);
    refused(f.add("d", Folder, "both"), &["both/train", "`train` is a split", "no folders of classes"]);
    fs::create_dir_all(f.dir.path().join("both/train/.thumbnails")).unwrap();
    refused(f.add("d", Folder, "both"), &["both/train", "no folders of classes"]);
    f.write(&[("tars/train/0.tar", &tar_of("0")), ("tars/val/0.zip", b"")]);
    refused(f.add("d", WebDataset, "tars"), &["tars/val", "`val` is a split", "no `.tar` files"]);
    assert!(f.names().is_empty());
}

#[test]
fn a_split_by_itself_is_numbered_by_the_classes_of_another_dataset() {
    let f = Fixture::new();
    f.write(&[("s/ant/1.jpg", b"1"), ("s/bee/1.jpg", b"2"), ("s/cat/1.jpg", b"3")]);
    f.add("d/train", Folder, "s").unwrap();
    f.write(&[("t/bee/1.jpg", b"4"), ("t/cat/1.jpg", b"5")]);
    f.add("alone", Folder, "t").unwrap();
    assert_eq!(f.labels("alone"), [0, 1]);
    let train = Some("d/train");
    f.add_with("d/test", Folder, "t", train).unwrap();
    assert_eq!(f.labels("d/test"), [1, 2]);
    let (ours, theirs) = (f.store.manifest("d/train").unwrap(), f.store.manifest("d/test").unwrap());
    assert_eq!((ours.class_names, ours.classes), (theirs.class_names, theirs.classes));
    f.write(&[("t/dog/1.jpg", b"6")]);
    refused(
        f.add_with("d/more", Folder, "t", train),
        &["t/dog", "class `dog` is not one of the 3 of dataset `d/train`"],
    );

    f.write(&[("2.tar", &tar_of("2")), ("3.tar", &tar_of("3"))]);
    f.add_with("w", WebDataset, "2.tar", train).unwrap();
    assert_eq!(f.store.manifest("w").unwrap().class_names.unwrap(), ["ant", "bee", "cat"]);
    refused(f.add_with("w3", WebDataset, "3.tar", train), &["label 3", "dataset `d/train` names 3 classes"]);
    f.add("unnamed", WebDataset, "3.tar").unwrap();
    refused(f.add_with("x", Folder, "s", Some("unnamed")), &["`unnamed` has no names of classes"]);
    refused(f.add_with("x", Folder, "s", Some("d/trian")), &["did you mean `d/train`?"]);
    refused(f.add_with("x", Idx, "s", train), &["numbers the classes", "`--classes-of`"]);
}

#[test]
fn links_to_images_and_labels_in_a_tar_file_are_refused_by_name() {
    use ::tar::{Builder, EntryType, Header};
    let f = Fixture::new();
    let linked = |kind, name: &str| {
        let mut builder = Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(0);
        header.set_entry_type(kind);
        builder.append_link(&mut header, name, "elsewhere").unwrap();
        let mut bytes = builder.into_inner().unwrap();
        bytes.truncate(bytes.len() - 1024);
        bytes.extend(tar_of("0"));
        f.write(&[("l.tar", &bytes)]);
        f.add("d", WebDataset, "l.tar")
    };
    refused(linked(EntryType::Symlink, "b.jpg"), &["l.tar", "`b.jpg` is a symbolic link", "--dereference"]);
    refused(linked(EntryType::Link, "b.cls"), &["`b.cls` is a hard link", "--hard-dereference"]);
    refused(linked(EntryType::Fifo, "b.json"), &["`b.json` is no regular file"]);
    for unused in [(EntryType::Directory, "b.jpg/"), (EntryType::Symlink, "b.txt")] {
        linked(unused.0, unused.1).unwrap();
    }

    // A name of more than 100 bytes takes a header of its own, of GNU's or of POSIX' kind.
    let long = "n".repeat(150);
    let (image, label) = (format!("{long}.jpg"), format!("{long}.cls"));
    f.write(&[("gnu.tar", &tar(&[(&image, "1"), (&label, "1")]))]);
    f.add("gnu", WebDataset, "gnu.tar").unwrap();
    let mut builder = Builder::new(Vec::new());
    let mut global = Header::new_ustar();
    global.set_entry_type(EntryType::XGlobalHeader);
    let comment = b"21 comment=of a tool\n";
    global.set_size(comment.len() as u64);
    builder.append_data(&mut global, "pax_global_header", &comment[..]).unwrap();
    for (short, name, text) in [("x.1", &image, "1"), ("x.2", &label, "1")] {
        builder.append_pax_extensions([("path", name.as_bytes())]).unwrap();
        let mut header = Header::new_ustar();
        header.set_size(text.len() as u64);
        builder.append_data(&mut header, short, text.as_bytes()).unwrap();
    }
    f.write(&[("pax.tar", &builder.into_inner().unwrap())]);
    f.add("pax", WebDataset, "pax.tar").unwrap();
    assert_eq!((f.labels("gnu"), f.labels("pax")), (vec![1], vec![1]));
}

#[test]
fn a_tar_file_that_is_not_sorted_is_told_so() {
    let f = Fixture::new();
    f.write(&[("u.tar", &tar(&[("a.jpg", "1"), ("b.jpg", "2"), ("a.cls", "0"), ("b.cls", "1")]))]);
    refused(
        f.add("d", WebDataset, "u.tar"),
        &["sample `a` has no label", "must follow one another", "--sort=name"],
    );
    f.write(&[("u.tar", &tar(&[("a.cls", "0"), ("b.cls", "1"), ("a.jpg", "1"), ("b.jpg", "2")]))]);
    refused(f.add("d", WebDataset, "u.tar"), &["sample `a` has no image", "must follow one another"]);
}

#[test]
fn the_names_of_classes_are_found_beside_a_single_tar_file() {
    let f = Fixture::new();
    f.write(&[("s/0.tar", &tar_of("1")), ("s/classes.txt", b"ant\nbee\n")]);
    f.add("d", WebDataset, "s/0.tar").unwrap();
    assert_eq!(f.store.manifest("d").unwrap().class_names.unwrap(), ["ant", "bee"]);
    f.write(&[("s/1.tar", &tar_of("2"))]);
    refused(f.add("e", WebDataset, "s/1.tar"), &["label 2", "`classes.txt` names 2 classes"]);
}

/// Two classes of one name could not be told apart, and an empty line moved all labels after it by one.
#[test]
fn names_of_classes_that_are_empty_or_there_twice_are_refused_by_line() {
    let f = Fixture::new();
    let add = |names: &str| {
        f.write(&[("s/0.tar", &tar_of("1")), ("s/classes.txt", names.as_bytes())]);
        f.add("d", WebDataset, "s/0.tar")
    };
    refused(add("ant\nbee\n ant\n"), &["classes.txt", "lines 1 and 3 are both `ant`"]);
    refused(add("ant\n\u{1b}\n\u{1b}\n"), &[r"lines 2 and 3 are both `\u{1b}`"]);
    refused(add("ant\n \nbee\n"), &["classes.txt", "line 2 is empty"]);
    refused(add("\nant\nbee\n"), &["line 1 is empty"]);
    assert!(f.names().is_empty());
    add("ant\nbee\n\n\n").unwrap();
    assert_eq!(f.store.manifest("d").unwrap().class_names.unwrap(), ["ant", "bee"]);
}

/// What a library said of such a file had its bytes in it, and the terminal obeyed them.
#[test]
fn a_file_that_is_no_tar_file_is_told_what_it_is_and_none_of_its_bytes_are_shown() {
    let f = Fixture::new();
    let add = |bytes: &[u8]| {
        f.write(&[("x.tar", bytes)]);
        f.add("d", WebDataset, "x.tar")
    };
    for (first, program) in
        [("1f8b0800", "gzip"), ("28b52ffd", "zstd"), ("425a6839", "bzip2"), ("fd377a585a00", "xz")]
    {
        let mut bytes = hex::decode(first).unwrap();
        refused(add(&bytes), &["x.tar", &format!("it is compressed with {program}; unpack it first")]);
        bytes.resize(2000, 0x1b);
        refused(add(&bytes), &["x.tar", &format!("it is compressed with {program}; unpack it first")]);
    }
    for bytes in [&b"\x1b[31m"[..], &[0x1b; 4000], &tar_of("1")[3..]] {
        let error = add(bytes).unwrap_err().to_string();
        assert!(error.ends_with("it is not a tar file") && !error.contains('\u{1b}'), "{error}");
    }
    // Of a second member's header, and names within.
    let whole = tar_of("1");
    let mut bytes = whole[..1024].to_vec();
    bytes.extend([0x1b; 1024]);
    refused(add(&bytes), &["x.tar", "it is damaged (", "download or copy"]);
    let red = "\u{1b}[31m\n";
    refused(add(&tar(&[(&format!("{red}.jpg"), "1")])), &[r"sample `\u{1b}[31m\n` has no label"]);
    refused(add(&tar(&[(&format!("{red}.cls"), red)])), &[r"member `\u{1b}[31m\n.cls` has label"]);
    refused(
        add(&tar(&[(&format!("{red}.jpg"), "bad"), (&format!("{red}.cls"), "1")])),
        &[r"x.tar: \u{1b}[31m\n` ("],
    );
    for cut in [1, 511] {
        refused(add(&whole[..cut]), &["it is not a tar file"]);
    }
}

/// The bytes of files did not count: 256 of the largest were held in memory, 8 GiB.
#[test]
fn a_batch_of_large_files_ends_at_its_bytes() {
    let f = Fixture::new();
    for i in 0..3 {
        f.write(&[(&format!("s/x/{i}.jpg"), b"")]);
        let file = fs::File::options().write(true).open(f.dir.path().join(format!("s/x/{i}.jpg"))).unwrap();
        file.set_len(32 << 20).unwrap();
    }
    let mut done = Vec::new();
    let images = ImageImport { inspect: &Texts, skip_corrupt: false, classes_of: None };
    f.store.import("d", Folder, &f.dir.path().join("s"), images, |p| done.push(p.done)).unwrap();
    assert_eq!(done, [2, 3]);
    fs::File::options()
        .write(true)
        .open(f.dir.path().join("s/x/1.jpg"))
        .unwrap()
        .set_len((32 << 20) + 1)
        .unwrap();
    refused(f.add("e", Folder, "s"), &["1.jpg", "has 33554433 bytes and may have 33554432"]);
}
