//! What only a GPU can show. CUDA is optional: its absence is a reason to print, not a crash.
#![allow(clippy::unwrap_used)]

use lockstep_common::ids::LogicalShard;
use lockstep_common::job::{BatchNorm as Mode, OptimizerSpec};
use lockstep_nn::NnError;
use lockstep_nn::forward::{BatchNormSync, BnCall, Forward, LocalOnly};
use lockstep_nn::init::Init;
use lockstep_nn::layers::BatchNorm;
use lockstep_nn::optim::Optimizer;
use lockstep_nn::shim::{
    SideStream, backward, channels_last, copy_async, load_cuda, on_gradient, pinned, values_mut,
};
use lockstep_nn::vars::Vars;
use std::sync::{Arc, Barrier};
use tch::{Device, Kind, Tensor};

const GPU: Device = Device::Cuda(0);

/// Whether this machine can run what follows.
fn has_gpu() -> bool {
    let has = load_cuda().is_ok() && tch::Cuda::device_count() > 0;
    if !has {
        eprintln!("skipped: no GPU here");
    }
    has
}

#[test]
fn cuda_loads_or_the_loader_says_which_library_is_missing() {
    match load_cuda() {
        Ok(()) => assert!(load_cuda().is_ok(), "loading twice is harmless"),
        Err(e) => assert!(e.to_string().contains(".so"), "{e}"),
    }
}

#[test]
fn streams_and_pinned_memory_work_or_say_why_not() {
    let from = Tensor::from_slice(&[1.0f32, 2.0, 3.0]);
    let mut to = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    copy_async(&mut to, &from).unwrap();
    assert_eq!(to, from, "on a CPU a copy is done at once");
    assert!(copy_async(&mut Tensor::zeros([2], (Kind::Float, Device::Cpu)), &from).is_err());
    if !has_gpu() {
        assert!(SideStream::new(0).is_err() && pinned(&from, 3).is_err());
        return;
    }
    let mut gpu = Tensor::zeros([3], (Kind::Float, GPU));
    let side = SideStream::new(0).unwrap();
    assert!(!side.handle().is_null());
    let sum = side.run(|| {
        copy_async(&mut gpu, &from)?;
        Ok((&gpu + &gpu).to_device(Device::Cpu))
    });
    assert_eq!(sum.unwrap(), Tensor::from_slice(&[2.0f32, 4.0, 6.0]));
    let mut host = pinned(&gpu, 3).unwrap();
    copy_async(&mut host, &gpu).unwrap();
    tch::Cuda::synchronize(0);
    assert_eq!(host, from);
}

#[test]
fn an_upload_arrives_while_the_gpu_computes_and_its_memory_is_not_given_away() {
    if !has_gpu() {
        return;
    }
    let side = SideStream::new(0).unwrap();
    let work = Tensor::randn([4096, 4096], (Kind::Float, GPU));
    for round in 0..20 {
        let mut host = pinned(&Tensor::zeros([0], (Kind::Int64, Device::Cpu)), 1 << 20).unwrap();
        values_mut::<i64>(&mut host).iter_mut().zip(0..).for_each(|(value, i)| *value = i * round);
        let busy = work.matmul(&work).matmul(&work);
        let there = side.upload(&host).unwrap();
        let sum = there.sum(Kind::Int64);
        drop(there);
        values_mut::<i64>(&mut host).fill(-1);
        let other = side.upload(&host).unwrap();
        let n = 1i64 << 20;
        assert_eq!(sum.int64_value(&[]), round * n * (n - 1) / 2);
        assert_eq!(other.sum(Kind::Int64).int64_value(&[]), -n);
        drop(busy);
    }
}

/// Merges what two threads bring; as long as one has not come the other waits, as shards do in a job.
struct Pair {
    barrier: Barrier,
    values: [parking_lot::Mutex<Vec<f64>>; 2],
}

impl Pair {
    fn meet(&self, shard: LogicalShard, local: Vec<f64>, merge: fn(&[f64], &[f64]) -> Vec<f64>) -> Vec<f64> {
        *self.values[shard.0 as usize].lock() = local;
        self.barrier.wait();
        let merged = merge(&self.values[0].lock().clone(), &self.values[1].lock());
        self.barrier.wait();
        merged
    }
}

impl BatchNormSync for Pair {
    fn merge_moments(&self, _: BnCall, shard: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError> {
        Ok(self.meet(shard, local, |a, b| {
            let channels = a.len() / 2;
            let (n, m) = (a[0], b[0]);
            let mut merged = vec![n + m];
            for c in 1..=channels {
                merged.push((n * a[c] + m * b[c]) / (n + m));
            }
            for c in 1..=channels {
                let between = (a[c] - b[c]).powi(2) * n * m / (n + m);
                merged.push(a[channels + c] + b[channels + c] + between);
            }
            merged
        }))
    }

    fn sum(&self, _: BnCall, shard: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError> {
        Ok(self.meet(shard, local, |a, b| a.iter().zip(b).map(|(a, b)| a + b).collect()))
    }

    fn is_alone(&self) -> bool {
        false
    }
}

/// Outputs, input gradients, parameter gradients and running moments.
type Seen = Vec<Tensor>;

/// A layer with some parameters, and the replica that they belong to.
fn layer(kind: Kind, device: Device, channels: i64) -> (BatchNorm, Vars) {
    let build = |vars: &mut Vars| {
        BatchNorm::new(&mut vars.root().sub("bn"), channels, Mode::Sync, true).unwrap().unwrap()
    };
    let mut master = Vars::new("model", 1, kind, device);
    build(&mut master);
    let mut vars = master.replica().unwrap();
    let layer = build(&mut vars);
    for (name, from, to) in [("bn.weight", -1.0, 2.0), ("bn.bias", 0.3, -0.2)] {
        let values = Tensor::linspace(from, to, channels, (Kind::Double, Device::Cpu));
        tch::no_grad(|| vars.var(name).unwrap().tensor.detach().copy_(&values));
    }
    (layer, vars)
}

fn normalize(x: &Tensor, kind: Kind, device: Device, shard: u32, sync: Arc<dyn BatchNormSync>) -> Seen {
    let channels = x.size()[1];
    let (layer, vars) = layer(kind, device, channels);
    let leaf = x.set_requires_grad(true);
    let mut fwd = Forward::training(1, 0, LogicalShard(shard), (0..x.size()[0] as u64).collect(), sync);
    let y = layer.forward(&leaf, &mut fwd).unwrap();
    let weights = Tensor::linspace(-1.0, 1.0, y.numel() as i64, (Kind::Double, Device::Cpu))
        .reshape(y.size())
        .to_device(device)
        .to_kind(y.kind());
    backward(&(&y * weights).sum(Kind::Double)).unwrap();
    let records = fwd.take_records().unwrap();
    let gradient = |name: &str| vars.var(name).unwrap().tensor.grad();
    [
        y.detach(),
        leaf.grad(),
        gradient("bn.weight"),
        gradient("bn.bias"),
        Tensor::from_slice(&records[0].mean),
        Tensor::from_slice(&records[0].var_unbiased),
    ]
    .into_iter()
    .map(|tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double))
    .collect()
}

fn check(what: &str, got: &Seen, expected: &Seen, tolerance: f64) {
    for (part, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs().max().double_value(&[]) / expected.abs().max().double_value(&[]);
        assert!(error < tolerance, "{what}, part {part}: {error:e}");
    }
}

#[test]
fn a_gpus_batch_norm_is_the_cpus_alone_and_over_two_shards_of_one_gpu() {
    if !has_gpu() {
        return;
    }
    tch::manual_seed(3);
    for shape in [[8, 5, 7, 9], [16, 64, 4, 4], [4, 3, 1, 1]] {
        let x = Tensor::randn(shape, (Kind::Double, Device::Cpu)) * 3.0 + 10.0;
        let alone = normalize(&x.copy(), Kind::Double, Device::Cpu, 0, Arc::new(LocalOnly));
        for (kind, tolerance) in [(Kind::Double, 1e-11), (Kind::Float, 5e-5)] {
            for last in [false, true] {
                let there = if last { channels_last(&x).unwrap() } else { x.copy() };
                let there = there.to_device(GPU).to_kind(kind);
                let seen = normalize(&there.copy(), kind, GPU, 0, Arc::new(LocalOnly));
                check(&format!("{shape:?} {kind:?} channels last {last}"), &seen, &alone, tolerance);
                let again = normalize(&there.copy(), kind, GPU, 0, Arc::new(LocalOnly));
                assert!(seen == again, "{shape:?} {kind:?}: the same bits each time");
            }
        }
        // The shards wait for each other in forward and within backward.
        let on = |device: Device| {
            let sync = Arc::new(Pair { barrier: Barrier::new(2), values: Default::default() });
            let half = shape[0] / 2;
            std::thread::scope(|scope| {
                let shards = [0, 1].map(|shard| {
                    let part = x.narrow(0, half * shard, half).copy().to_device(device);
                    let sync = sync.clone();
                    scope.spawn(move || normalize(&part, Kind::Double, device, shard as u32, sync))
                });
                shards.map(|shard| shard.join().unwrap())
            })
        };
        let (gpu, cpu) = (on(GPU), on(Device::Cpu));
        for (gpu, cpu) in gpu.iter().zip(&cpu) {
            check(&format!("{shape:?} over two shards"), gpu, cpu, 1e-11);
        }
    }
}

#[test]
fn half_precision_and_empty_shards_pass_through_a_gpus_batch_norm() {
    if !has_gpu() {
        return;
    }
    let x = Tensor::randn([8, 6, 5, 5], (Kind::Float, GPU)).to_kind(Kind::BFloat16);
    let halves = normalize(&x.copy(), Kind::Float, GPU, 0, Arc::new(LocalOnly));
    let whole = normalize(&x.to_kind(Kind::Float), Kind::Float, GPU, 0, Arc::new(LocalOnly));
    // bfloat16 has 8 bits: results are rounded to 2^-9 of their size.
    check("bfloat16", &halves, &whole, 1e-2);
    let empty = normalize(&x.narrow(0, 0, 0).to_kind(Kind::Float), Kind::Float, GPU, 0, Arc::new(LocalOnly));
    assert_eq!(empty[0].size(), [0, 6, 5, 5]);
    assert_eq!(empty[2], Tensor::zeros([6], (Kind::Double, Device::Cpu)));
}

#[test]
fn an_error_within_a_gpus_backward_comes_out_with_its_type() {
    if !has_gpu() {
        return;
    }
    let leaf = Tensor::ones([3], (Kind::Float, GPU)).set_requires_grad(true);
    let fail = |_: &Tensor| Err(NnError::Exchange(Box::new(std::io::Error::other("link cut"))));
    let hook = on_gradient(&leaf, fail).unwrap();
    let error = backward(&leaf.exp().sum(Kind::Float)).unwrap_err();
    assert!(matches!(error, NnError::Exchange(_)), "{error}");
    drop(hook);
}

#[test]
fn one_kernel_updates_as_libtorchs_operations_do() {
    if !has_gpu() {
        return;
    }
    for (momentum, nesterov) in [(0.9, false), (0.9, true), (0.0, false)] {
        let spec: OptimizerSpec = serde_json::from_value(serde_json::json!({
            "name": "sgd", "lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.01
        }))
        .unwrap();
        let updated = |device: Device| {
            let mut vars = Vars::new("model", 1, Kind::Double, device);
            let mut root = vars.root();
            for (name, shape) in [("a", &[3i64, 4][..]), ("b", &[1000])] {
                let _ = root.parameter(name, shape, Init::Constant(0.5)).unwrap();
            }
            let mut optimizer = Optimizer::new(&spec, &vars).unwrap();
            for step in 0..3 {
                let gradients: Vec<_> = vars
                    .parameters()
                    .map(|(name, var)| {
                        let size = var.tensor.size();
                        let values = Tensor::linspace(
                            -1.0,
                            1.0 + step as f64,
                            size.iter().product::<i64>(),
                            (Kind::Double, Device::Cpu),
                        );
                        (name.to_owned(), values.reshape(size).to_device(device))
                    })
                    .collect();
                optimizer.step(&vars, &gradients, 0.1, step).unwrap();
            }
            let after = vars.parameters().map(|(_, var)| var.tensor.detach().to_device(Device::Cpu));
            after.collect::<Vec<_>>()
        };
        check(
            &format!("momentum {momentum}, nesterov {nesterov}"),
            &updated(GPU),
            &updated(Device::Cpu),
            1e-14,
        );
    }
}
