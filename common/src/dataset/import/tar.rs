//! WebDataset: tar files in which members with the same name up to the first dot are one sample.
//!
//! A sample is an image (`.jpg`, `.jpeg`, `.png`) with its label: a number in `.cls`, or `label` in `.json`. Other members
//! are left out. `classes.txt` beside the files (or beside the folders of the splits), one name a line, names the classes.

mod beginning;

use super::images::{ImageWriter, MAX_IMAGE_BYTES, Origin, too_large};
use super::{
    Classes, ImageImport, Progress, SPLITS, Staged, read_class_names, same_name, sorted_entries, source_error,
};
use crate::dataset::{DatasetError, DatasetName, Store};
use crate::durable::FileError;
use crate::shown::shown;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use tar::EntryType;

/// A label of more bytes is not a number, and not a sample's JSON either.
const MAX_LABEL_BYTES: u64 = 1 << 20;
/// No dataset has more classes; a damaged label must not make the network's last layer larger than memory.
const MAX_CLASSES: u32 = 1 << 20;
/// The unit of a tar file. Two of zeros end it.
const BLOCK_BYTES: u64 = 512;

/// Imports one tar file, a folder of them, or a folder of splits.
pub(super) fn import(
    store: &Store,
    name: &DatasetName,
    source: &Path,
    images: ImageImport<'_>,
    classes: Option<Classes>,
    progress: Progress<'_>,
) -> Result<Vec<Staged>, DatasetError> {
    let named = match classes {
        Some(classes) => Some(classes),
        None => beside(source)?,
    };
    let mut staged = Vec::new();
    for Split { name, files, .. } in splits(name, source)? {
        let mut writer = ImageWriter::new(store, name, images, None)?;
        let mut classes = named.as_ref().map_or(0, |named| named.names.len() as u32);
        for path in &files {
            read(path, &mut |key, bytes, label| {
                match &named {
                    Some(Classes { names, origin }) if label as usize >= names.len() => {
                        let count = names.len();
                        let problem = format!(
                            "sample `{}` has label {label} and {origin} names {count} classes",
                            shown(key)
                        );
                        return Err(source_error(path, problem));
                    }
                    _ => classes = classes.max(label + 1),
                }
                let origin = Origin::Bytes(format!("{}: {}", path.display(), shown(key)), bytes);
                writer.push(label, origin, progress)
            })?;
        }
        let names = named.as_ref().map(|named| named.names.clone());
        staged.push(writer.finish(store, classes, names, source, progress)?);
    }
    Ok(staged)
}

/// The classes of `classes.txt` in the folder `source`, or beside the file `source`.
fn beside(source: &Path) -> Result<Option<Classes>, DatasetError> {
    let file =
        if source.is_dir() { source.join("classes.txt") } else { source.with_file_name("classes.txt") };
    if !file.exists() {
        return Ok(None);
    }
    Ok(Some(Classes { names: read_class_names(&file)?, origin: "`classes.txt`".to_owned() }))
}

/// The tar files that become one dataset.
struct Split {
    name: DatasetName,
    files: Vec<PathBuf>,
    /// The folder in which they are, or the first of them.
    from: PathBuf,
}

/// The tar files of each split, in order.
fn splits(name: &DatasetName, source: &Path) -> Result<Vec<Split>, DatasetError> {
    let whole = |files| vec![Split { name: name.clone(), files, from: source.to_path_buf() }];
    if !source.is_dir() {
        return Ok(whole(vec![source.to_path_buf()]));
    }
    let tars = tars_in(source)?;
    let mut splits: Vec<Split> = Vec::new();
    let mut taken = 0;
    for (split, segment) in SPLITS {
        let of_split = |path: &&PathBuf| {
            let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            stem.strip_prefix(split).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphabetic()))
        };
        let beside: Vec<_> = tars.iter().filter(of_split).cloned().collect();
        taken += beside.len();
        let folder = source.join(split);
        let within = if folder.is_dir() { tars_in(&folder)? } else { Vec::new() };
        if folder.is_dir() && within.is_empty() {
            let problem =
                format!("`{split}` is a split, and it has no `.tar` files; fill, rename or remove it");
            return Err(source_error(&folder, problem));
        }
        let name_of = name.join(segment)?;
        for (from, files) in [(Some(folder), within), (beside.first().cloned(), beside)] {
            let Some(from) = from.filter(|_| !files.is_empty()) else { continue };
            if let Some(other) = splits.iter().find(|other| other.name == name_of) {
                return Err(same_name(&from, &other.from, name, &name_of));
            }
            splits.push(Split { name: name_of.clone(), files, from });
        }
    }
    if splits.is_empty() && !tars.is_empty() {
        return Ok(whole(tars));
    }
    if splits.is_empty() {
        let problem = "it has no `.tar` files; expected some, or `train` and `val` folders with such";
        return Err(source_error(source, problem));
    }
    if taken < tars.len() {
        let problem = "some of its tar files begin with `train`, `val` or `test` and others do not; move those elsewhere";
        return Err(source_error(source, problem));
    }
    Ok(splits)
}

fn tars_in(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let is_tar =
        |path: &PathBuf| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar")) && path.is_file();
    Ok(sorted_entries(folder)?.into_iter().filter(is_tar).collect())
}

/// The members of one sample that have been read.
#[derive(Default)]
struct Parts {
    key: String,
    image: Option<Vec<u8>>,
    label: Option<u32>,
    /// A member that would be an image or a label if its name had one dot.
    dotted: Option<String>,
}

/// Receives a sample: its key, the encoded image and the label.
type Receive<'a> = &'a mut dyn FnMut(&str, Vec<u8>, u32) -> Result<(), DatasetError>;

/// Hands every sample of the tar file `path` to `receive`.
fn read(path: &Path, receive: Receive<'_>) -> Result<(), DatasetError> {
    let file = File::open(path).map_err(FileError::on("read", path))?;
    let mut reader = BufReader::new(file);
    let mut first = Vec::new();
    reader.by_ref().take(BLOCK_BYTES).read_to_end(&mut first).map_err(FileError::on("read", path))?;
    beginning::check(&first).map_err(|problem| source_error(path, problem))?;
    let mut archive = tar::Archive::new(Ending { reader: first.as_slice().chain(reader), zeros: 0 });
    let damaged = |e: io::Error| {
        let why = e.to_string();
        source_error(path, format!("it is damaged ({}); download or copy it again", shown(&why)))
    };
    let mut parts = Parts::default();
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let form = entry.header().entry_type();
        if form.is_dir() {
            continue;
        }
        let member = entry.path().map_err(damaged)?.to_string_lossy().into_owned();
        let Some((key, extension)) = split_name(&member) else { continue };
        let Some(kind) = Kind::of(extension) else { continue };
        if key != parts.key {
            std::mem::replace(&mut parts, Parts { key: key.to_owned(), ..Parts::default() })
                .finish(path, receive)?;
        }
        if kind == Kind::Dotted {
            parts.dotted.get_or_insert(member);
            continue;
        }
        let wrong =
            |problem: String| source_error(path, format!("its member `{}` {problem}", shown(&member)));
        if !form.is_file() {
            let what = match form {
                EntryType::Symlink => "is a symbolic link",
                EntryType::Link => "is a hard link",
                _ => "is no regular file",
            };
            return Err(wrong(format!(
                "{what}; make the tar file again with the files themselves (GNU tar: `--dereference --hard-dereference`)"
            )));
        }
        let limit = if kind == Kind::Image { MAX_IMAGE_BYTES } else { MAX_LABEL_BYTES };
        let size = entry.size();
        if size > limit {
            return Err(wrong(too_large(size, limit)));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(damaged)?;
        if bytes.len() as u64 != size {
            return Err(wrong(format!(
                "is truncated: {} of {size} bytes; download or copy the file again",
                bytes.len()
            )));
        }
        let label = match kind {
            Kind::Image => {
                if parts.image.replace(bytes).is_some() {
                    let problem = "is the second image with this name; each sample needs a name of its own";
                    return Err(wrong(problem.to_owned()));
                }
                None
            }
            Kind::Class => Some(class_of(&bytes).map_err(wrong)?),
            Kind::Json => json_label(&bytes).map_err(wrong)?,
            Kind::Dotted => None,
        };
        if let Some(label) = label
            && let Some(other) = parts.label.replace(label)
            && other != label
        {
            return Err(wrong(format!("has label {label} and another member of its sample has {other}")));
        }
    }
    parts.finish(path, receive)?;
    if archive.into_inner().zeros < BLOCK_BYTES {
        let problem =
            "it is truncated: it ends without the mark at the end of a tar file; download or copy it again";
        return Err(source_error(path, problem));
    }
    Ok(())
}

impl Parts {
    fn finish(self, path: &Path, receive: Receive<'_>) -> Result<(), DatasetError> {
        let Self { key, image, label, dotted } = self;
        let lacks = |what: &str| {
            let problem = format!(
                "sample `{}` has no {what}; the members of a sample must follow one another (`tar --sort=name`)",
                shown(&key)
            );
            source_error(path, problem)
        };
        match (image, label) {
            (Some(image), Some(label)) => receive(&key, image, label),
            (Some(_), None) => {
                Err(lacks("label beside its image: add a member `.cls`, or `.json` with `label`"))
            }
            (None, Some(_)) => Err(lacks("image beside its label: add a member `.jpg`, `.jpeg` or `.png`")),
            (None, None) => match dotted {
                // Left out, it would be lost without a word.
                Some(member) => Err(source_error(
                    path,
                    format!(
                        "its member `{}` belongs to no sample: a sample's name ends at its first dot, and `.jpg`, `.jpeg`, `.png`, \
                         `.cls` or `.json` must follow; make the tar file again with other dots replaced",
                        shown(&member)
                    ),
                )),
                None => Ok(()),
            },
        }
    }
}

/// What a member holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Image,
    Class,
    Json,
    /// What would be an image or a label if its name had one dot.
    Dotted,
}

impl Kind {
    /// By what follows the key's dot; `None` for members that are of no use here.
    fn of(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "jpg" | "jpeg" | "png" => Some(Self::Image),
            "cls" => Some(Self::Class),
            "json" => Some(Self::Json),
            other => match other.rsplit_once('.').and_then(|(_, last)| Self::of(last)) {
                Some(Self::Image | Self::Class) => Some(Self::Dotted),
                _ => None,
            },
        }
    }
}

/// The key of a member, which ends at the first dot of its file name, and what follows that dot. A hidden file, such as
/// `._a.jpg`, has no key.
fn split_name(member: &str) -> Option<(&str, &str)> {
    let folder = member.rfind('/').map_or(0, |slash| slash + 1);
    let dot = folder + member[folder..].find('.')?;
    (dot > folder).then_some((&member[..dot], &member[dot + 1..]))
}

fn class_of(bytes: &[u8]) -> Result<u32, String> {
    let text = std::str::from_utf8(bytes).unwrap_or("").trim();
    match text.parse() {
        Ok(label) if label < MAX_CLASSES => Ok(label),
        _ => Err(not_a_label(text)),
    }
}

/// `label` of a sample's JSON; `None` if there is none.
fn json_label(bytes: &[u8]) -> Result<Option<u32>, String> {
    let json: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| format!("is not JSON ({e})"))?;
    let Some(value) = json.get("label") else { return Ok(None) };
    match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
        Some(label) if label < MAX_CLASSES => Ok(Some(label)),
        _ => Err(not_a_label(&value.to_string())),
    }
}

fn not_a_label(text: &str) -> String {
    let shown: String = text.chars().take(40).collect();
    format!("has label {shown:?}; a label is a whole number from 0 to {}", MAX_CLASSES - 1)
}

/// Knows how many zeros the bytes read so far end with.
struct Ending<R> {
    reader: R,
    zeros: u64,
}

impl<R: Read> Read for Ending<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        let zeros = buffer[..read].iter().rev().take_while(|b| **b == 0).count();
        self.zeros = if zeros == read { self.zeros + zeros as u64 } else { zeros as u64 };
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_members_key_ends_at_the_first_dot_of_its_file_name() {
        let split =
            |member| split_name(member).and_then(|(key, extension)| Some((key, Kind::of(extension)?)));
        assert_eq!(split("a/b.c/0001.jpg"), Some(("a/b.c/0001", Kind::Image)));
        assert_eq!(split("0001.PNG"), Some(("0001", Kind::Image)));
        assert_eq!(split("0001.cls"), Some(("0001", Kind::Class)));
        assert_eq!(split("x/0001.json"), Some(("x/0001", Kind::Json)));
        for dotted in ["a/0001.seg.png", "a/0001.v2.3.CLS"] {
            assert_eq!(split(dotted), Some(("a/0001", Kind::Dotted)), "{dotted}");
        }
        for unused in ["0001.v2.json", "0001.txt", "0001", "._0001.jpg", ".jpg", "a.b/c"] {
            assert_eq!(split(unused), None, "{unused}");
        }
    }

    #[test]
    fn labels_are_whole_numbers_within_bounds() {
        assert_eq!(class_of(b" 7\n"), Ok(7));
        assert_eq!(json_label(br#"{"label": 3, "x": []}"#), Ok(Some(3)));
        assert_eq!(json_label(br#"{"caption": "a cat"}"#), Ok(None));
        for bad in [&b"-1"[..], b"cat", b"", b"1048576", b"\xff", b"1.5"] {
            assert!(class_of(bad).unwrap_err().contains("whole number"), "{bad:?}");
        }
        for bad in [&br#"{"label": -1}"#[..], br#"{"label": "cat"}"#, br#"{"label": 1.5}"#, b"{"] {
            assert!(json_label(bad).is_err(), "{bad:?}");
        }
    }
}
