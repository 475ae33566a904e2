//! Lockstep's side of `make parity`: reads what `parity/compare.py` has written, writes what a network makes of it.
//!
//! In the folder of the argument: `model.json` (a job file's `[model]`), `weights.safetensors` and `batch.safetensors`
//! (`images` in f64, `labels`). Out come `lockstep.safetensors` (for f64 and f32, evaluation and training: logits,
//! auxiliary logits, loss; in f64 the gradients) and `export.safetensors`, the weights as a checkpoint's export has them.

use lockstep_common::checkpoint::{decode_tensors, encode_for_others, encode_tensors};
use lockstep_common::digest::TensorBytes;
use lockstep_common::ids::LogicalShard;
use lockstep_common::job::ModelSpec;
use lockstep_nn::bytes::RawTensor;
use lockstep_nn::forward::{Forward, LocalOnly};
use lockstep_nn::vars::Vars;
use lockstep_nn::{loss, models, shim, weights};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

type Tensors = BTreeMap<String, Tensor>;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: parity FOLDER")?;
    let folder = Path::new(&folder);
    let spec: ModelSpec = serde_json::from_slice(&std::fs::read(folder.join("model.json"))?)?;
    let file = std::fs::read(folder.join("weights.safetensors"))?;
    let stored = decode_tensors(&file)?;
    let batch = std::fs::read(folder.join("batch.safetensors"))?;
    let batch = decode_tensors(&batch)?
        .iter()
        .map(|t| Ok((t.name.to_string(), RawTensor::tensor_of(&t.dtype, &t.shape, &t.bytes)?)))
        .collect::<Result<Tensors, Box<dyn Error>>>()?;
    let mut out = Tensors::new();
    for (kind, label) in [(Kind::Double, "f64"), (Kind::Float, "f32")] {
        let vars = weights::load("model", &spec, &stored, kind, Device::Cpu)?;
        for train in [false, true] {
            run(&spec, &vars, &batch, train, label, &mut out)?;
        }
        if kind == Kind::Float {
            let tensors =
                vars.iter().map(|(name, var)| (name.to_owned(), var.tensor.shallow_clone())).collect();
            let export = packed(&tensors, |tensors| encode_for_others(tensors, 7))?;
            std::fs::write(folder.join("export.safetensors"), export)?;
        }
    }
    std::fs::write(folder.join("lockstep.safetensors"), packed(&out, |tensors| encode_tensors(tensors))?)?;
    Ok(())
}

fn run(
    spec: &ModelSpec,
    vars: &Vars,
    batch: &Tensors,
    train: bool,
    label: &str,
    out: &mut Tensors,
) -> Result<(), Box<dyn Error>> {
    let (images, labels) = (batch["images"].to_kind(vars.kind()), &batch["labels"]);
    let count = images.size()[0];
    let mut replica = vars.replica()?;
    let model = models::build(spec, &mut replica.root())?;
    let samples = (0..count as u64).collect();
    let mut fwd = Forward::training(1, 0, LogicalShard(0), samples, Arc::new(LocalOnly));
    (fwd.train, fwd.update_stats) = (train, train);
    let output = model.forward(&images, &mut fwd)?;
    let loss_of = |logits: &Tensor| loss::cross_entropy(logits, labels, 0.0, count as f64);
    let mode = format!("{label}.{}", if train { "train" } else { "eval" });
    let mut loss = loss_of(&output.main)?;
    for head in &output.auxiliary {
        loss += loss_of(&head.output)? * head.weight;
        out.insert(format!("{mode}.aux.{}", head.name), head.output.detach());
    }
    out.insert(format!("{mode}.logits"), output.main.detach());
    out.insert(format!("{mode}.loss"), loss.detach().reshape([1]));
    if vars.kind() == Kind::Double {
        shim::backward(&loss)?;
        for (name, var) in replica.parameters().filter(|(_, var)| var.tensor.grad().defined()) {
            out.insert(format!("{mode}.gradient.{name}"), var.tensor.grad());
        }
    }
    Ok(())
}

fn packed<E: Error + 'static>(
    tensors: &Tensors,
    encode: impl Fn(Vec<TensorBytes<'_>>) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, Box<dyn Error>> {
    let raw = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, RawTensor::copy_from(tensor)?)))
        .collect::<Result<Vec<_>, Box<dyn Error>>>()?;
    let bytes = raw.iter().map(|(name, raw)| TensorBytes {
        name: name.as_str().into(),
        dtype: raw.dtype.into(),
        shape: raw.shape.as_slice().into(),
        bytes: raw.bytes.as_slice().into(),
    });
    Ok(encode(bytes.collect())?)
}
