//! Every file under `jobs/` is a good job file, whose network takes the images that its data section makes.
#![allow(clippy::unwrap_used)]

use lockstep_common::dataset::Manifest;
use lockstep_common::ids::LogicalShard;
use lockstep_common::job::{JobSpec, Task};
use lockstep_nn::forward::{Forward, LocalOnly};
use lockstep_nn::models;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

fn job_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            job_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
    }
}

/// What the store would say of the datasets that the files name.
fn manifest(name: &str) -> Manifest {
    let (channels, side, smallest, classes) = match name.split('/').next().unwrap() {
        "fashion-mnist" => (1, 28, None, 10),
        "cifar-100" => (3, 32, None, 100),
        "imagenet" => (3, 9000, Some(json!({ "height": 20, "width": 20 })), 1000),
        other => panic!("no dataset `{other}` is known to this test"),
    };
    let shape = json!({ "channels": channels, "height": side, "width": side });
    let whitening = name.ends_with("-zca").then(|| json!({ "filter_bias": 0.1, "shards": [] }));
    serde_json::from_value(json!({
        "format": 1, "id": "", "name": name, "samples": 50_000, "shape": shape, "smallest": smallest, "dtype": "u8",
        "classes": classes, "class_names": null, "encoding": if channels == 1 { "raw-u8" } else { "image" },
        "mean": vec![0.5; channels], "std": vec![0.25; channels], "shards": [], "whitening": whitening,
    }))
    .unwrap()
}

fn check(path: &Path) {
    let file = path.to_string_lossy();
    let job =
        JobSpec::parse(&file, &std::fs::read_to_string(path).unwrap()).unwrap_or_else(|e| panic!("{e}"));
    for (section, model) in job.networks() {
        models::validate(model).unwrap_or_else(|e| panic!("{file}: [{section}]: {e}"));
    }
    let train = manifest(&job.data.train);
    let shape = job.data.training_shape(&train).unwrap_or_else(|(key, e)| panic!("{file}: {key}: {e}"));
    if let Some(test) = &job.data.test {
        let test = job.data.test_shape(&manifest(test), job.evaluation.crops);
        let test = test.unwrap_or_else(|(key, e)| panic!("{file}: {key}: {e}"));
        assert_eq!(test, shape, "{file}: training and test images differ");
    }
    if job.task != Task::Classify {
        return;
    }
    let model = job.model.as_ref().unwrap();
    // Variables without memory, all zero: what is looked at is shapes.
    let mut vars = models::outline(model).unwrap().frozen().unwrap();
    let network = models::build(model, &mut vars.root()).unwrap();
    let mut forward = Forward::training(1, 0, LogicalShard(0), vec![0], Arc::new(LocalOnly));
    let size = [1, shape.channels, shape.height, shape.width].map(i64::from);
    let images = Tensor::zeros(size, (Kind::Float, Device::Cpu));
    let output = network.forward(&images, &mut forward).unwrap_or_else(|e| panic!("{file}: {e}"));
    for logits in output.auxiliary.iter().map(|head| &head.output).chain([&output.main]) {
        assert_eq!(logits.size(), [1, i64::from(train.classes)], "{file}: not the classes of the dataset");
    }
}

#[test]
fn every_job_file_parses_and_its_network_takes_its_images() {
    let mut files = Vec::new();
    job_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../jobs"), &mut files);
    files.sort();
    let systems = ["nin", "googlenet", "bn-inception", "inception-v3", "inception-v4"]
        .into_iter()
        .chain(["inception-resnet-v1", "inception-resnet-v2"]);
    for system in systems {
        for dataset in ["imagenet", "fashion"] {
            let name = format!("{dataset}/{system}.toml");
            assert!(files.iter().any(|file| file.ends_with(&name)), "jobs/{name} is missing");
        }
    }
    tch::set_num_threads(1);
    files.iter().for_each(|file| check(file));
}
