//! Folders of images: a sub-folder per class, in folders per split if there are any.

use super::images::{ImageWriter, Origin};
use super::{Classes, ImageImport, Progress, SPLITS, Staged, same_name, sorted_entries, source_error};
use crate::dataset::{DatasetError, DatasetName, Store};
use std::path::{Path, PathBuf};

/// Deeper than any dataset; a link to a folder above itself ends here.
const MAX_DEPTH: usize = 16;

/// Imports the splits in the folder `source`, or the folder itself if its sub-folders are classes.
pub(super) fn import(
    store: &Store,
    name: &DatasetName,
    source: &Path,
    images: ImageImport<'_>,
    mut classes: Option<Classes>,
    progress: Progress<'_>,
) -> Result<Vec<Staged>, DatasetError> {
    let splits = splits(name, source)?;
    // Every folder is listed before the first image is decoded: that takes long, and a mistake shows at once.
    let mut listed = Vec::new();
    for (name, folder) in splits {
        let (names, files) = list(&folder, classes.as_ref())?;
        classes
            .get_or_insert_with(|| Classes { names: names.clone(), origin: "the training set".to_owned() });
        listed.push((name, folder, names, files));
    }
    let mut staged = Vec::new();
    for (name, folder, names, files) in listed {
        let mut writer = ImageWriter::new(store, name, images, Some(files.len() as u64))?;
        for (label, path) in files {
            writer.push(label, Origin::File(path), progress)?;
        }
        staged.push(writer.finish(store, names.len() as u32, Some(names), &folder, progress)?);
    }
    Ok(staged)
}

/// The folder of each split, the training set first: its classes are those of all.
fn splits(name: &DatasetName, source: &Path) -> Result<Vec<(DatasetName, PathBuf)>, DatasetError> {
    let mut splits: Vec<(DatasetName, PathBuf)> = Vec::new();
    for (folder, segment) in SPLITS {
        let path = source.join(folder);
        if !path.is_dir() {
            continue;
        }
        if !has_folders(&path)? {
            let problem = format!(
                "`{folder}` is a split, and it has no folders of classes; give it one per class with the images in it, \
                 remove it, or rename it if it is itself a class"
            );
            return Err(source_error(&path, problem));
        }
        let split = name.join(segment)?;
        if let Some((_, other)) = splits.iter().find(|(n, _)| *n == split) {
            return Err(same_name(&path, other, name, &split));
        }
        splits.push((split, path));
    }
    if splits.is_empty() {
        splits.push((name.clone(), source.to_path_buf()));
    }
    Ok(splits)
}

fn has_folders(folder: &Path) -> Result<bool, DatasetError> {
    Ok(sorted_entries(folder)?.iter().any(|path| path.is_dir() && !is_hidden(path)))
}

/// Class names in order, and labels and files in order.
type Listed = (Vec<String>, Vec<(u32, PathBuf)>);

/// The classes of a folder and its images. `known` are the classes that it may have, if that is settled.
fn list(folder: &Path, known: Option<&Classes>) -> Result<Listed, DatasetError> {
    let mut folders = Vec::new();
    for path in sorted_entries(folder)? {
        if is_hidden(&path) {
            continue;
        }
        if path.is_dir() {
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
                return Err(source_error(&path, "its name is not Unicode, and it names a class; rename it"));
            };
            folders.push((name.to_owned(), path));
        } else if is_image(&path) {
            return Err(source_error(
                &path,
                "it lies beside the classes' folders, so it has no class; move it into one",
            ));
        }
    }
    if folders.is_empty() {
        let problem = "it has no sub-folders; expected one per class with JPEG or PNG files, or `train` and `val` with such";
        return Err(source_error(folder, problem));
    }
    let names: Vec<String> = match known {
        Some(known) => known.names.clone(),
        None => folders.iter().map(|(name, _)| name.clone()).collect(),
    };
    let mut files = Vec::new();
    for (name, path) in folders {
        let Some(label) = names.iter().position(|n| *n == name) else {
            let origin = known.map_or("", |known| &known.origin);
            let problem =
                format!("class `{name}` is not one of the {} of {origin}; remove or rename it", names.len());
            return Err(source_error(&path, problem));
        };
        let before = files.len();
        collect(&path, label as u32, MAX_DEPTH, &mut files)?;
        if files.len() == before {
            return Err(source_error(&path, "the folder of this class has no images; fill or remove it"));
        }
    }
    Ok((names, files))
}

/// Every image in `folder` and below.
fn collect(
    folder: &Path,
    label: u32,
    depth: usize,
    files: &mut Vec<(u32, PathBuf)>,
) -> Result<(), DatasetError> {
    if depth == 0 {
        return Err(source_error(
            folder,
            format!("it lies more than {MAX_DEPTH} folders deep; is it a link to itself?"),
        ));
    }
    for path in sorted_entries(folder)? {
        if is_hidden(&path) {
            continue;
        }
        if path.is_dir() {
            collect(&path, label, depth - 1, files)?;
        } else if is_image(&path) {
            files.push((label, path));
        } else {
            let problem =
                "it is neither `.jpg`, `.jpeg` nor `.png`; convert it, or remove it if it is no image";
            return Err(source_error(&path, problem));
        }
    }
    Ok(())
}

/// Files that systems leave: `.DS_Store`, `.thumbnails`, `._a.jpg`.
fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    matches!(extension.as_deref(), Some("jpg" | "jpeg" | "png"))
}
