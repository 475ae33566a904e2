//! NCCL where there is a GPU: two ranks share it, each in a process of its own, since a process has one
//! `NCCL_HOSTID`. Elsewhere these tests say that they skip.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cudarc::driver::result;
use lockstep_collectives::nccl::{
    Device, DeviceElement, Library, NcclComm, NcclError, Nodes, Stream, UniqueId,
};
use lockstep_collectives::{Element, Group, ReduceOp, Tag, TagKind};
use lockstep_common::ids::Rank;
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const RANK: &str = "LOCKSTEP_NCCL_TEST_RANK";
const IDS: &str = "LOCKSTEP_NCCL_TEST_IDS";

/// Aligned shares, and shares that leave the two ranks with different numbers of nodes.
const SHARDS: [u32; 4] = [2, 4, 3, 7];
const REDUCTIONS: [Reduction; 2] = [Reduction::Exact, Reduction::Fast];

/// Brings a libnccl into the process, as libtorch's CUDA half would: libtorch's, else the system's.
fn bring_nccl() -> bool {
    let libtorch = std::env::var("LIBTORCH").unwrap_or_default();
    let wheel = Path::new(&libtorch).join("../nvidia/nccl/lib/libnccl.so.2");
    let files = [wheel.as_path(), Path::new("libnccl.so.2")];
    // SAFETY: NCCL's initializers need nothing.
    let found = files.iter().find_map(|file| unsafe { libloading::Library::new(*file) }.ok());
    found.map(std::mem::forget).is_some()
}

#[test]
fn the_library_in_the_process_is_taken_or_its_absence_told() {
    if bring_nccl() {
        let library = Library::open().unwrap();
        assert!(library.version() > 20_000, "{}", library.version());
        assert!(library.path().to_string_lossy().contains("libnccl.so"), "{:?}", library.path());
    } else {
        eprintln!("no libnccl here: only its absence is tested");
        assert!(
            matches!(Library::open(), Err(NcclError::Unavailable(line)) if line.contains("no NCCL here"))
        );
    }
}

/// Whether this machine can run what follows.
fn gpu() -> Option<Arc<Device>> {
    match Device::open(0) {
        Ok(_) if !bring_nccl() => eprintln!("skipped: no libnccl here"),
        Ok(device) => return Some(device),
        Err(reason) => eprintln!("skipped: {reason}"),
    }
    None
}

fn start(rank: u32, ids: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["a_rank_in_a_process_of_its_own", "--exact", "--nocapture"])
        .env(RANK, rank.to_string())
        .env(IDS, ids)
        .env("NCCL_HOSTID", format!("lockstep-test-{rank}"))
        .env("NCCL_SOCKET_IFNAME", "lo")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn two_ranks_on_one_gpu_sum_as_the_tree_does() {
    if gpu().is_none() {
        return;
    }
    let mut first = start(0, "");
    let mut lines = BufReader::new(first.stderr.take().unwrap()).lines().map_while(Result::ok);
    let ids = lines.find_map(|line| line.strip_prefix("ids ").map(str::to_owned)).expect("rank 0 makes them");
    let mut second = start(1, &ids);
    let errors = BufReader::new(second.stderr.take().unwrap()).lines().map_while(Result::ok);
    let told: Vec<_> = lines.chain(errors).collect();
    assert!(first.wait().unwrap().success() && second.wait().unwrap().success(), "{}", told.join("\n"));
}

#[test]
fn a_rank_whose_peer_never_comes_gives_up_in_time() {
    let Some(device) = gpu() else { return };
    let library = Library::open().unwrap();
    let groups = Group::in_process(&Placement::even(2, 2), Reduction::Exact, Duration::from_secs(2)).unwrap();
    let (id, stream) = (UniqueId::new(&library).unwrap(), Stream::new(&device).unwrap());
    let Err(error) = NcclComm::form(&groups[0], library, stream, &id) else { panic!("rank 1 never came") };
    assert!(error.to_string().contains("NCCL made no progress for 2.0 s"), "{error}");
}

/// Does nothing by itself: `two_ranks_on_one_gpu_sum_as_the_tree_does` starts it.
#[test]
fn a_rank_in_a_process_of_its_own() {
    let Ok(rank) = std::env::var(RANK) else { return };
    let rank = Rank(rank.parse().unwrap());
    let device = gpu().expect("the starting test found a GPU");
    device.bind().unwrap();
    let library = Library::open().unwrap();
    let ids: Vec<Vec<u8>> = match rank {
        Rank(0) => {
            let new = |_| UniqueId::new(&library).unwrap().to_bytes();
            let ids = (0..SHARDS.len() * REDUCTIONS.len()).map(new).collect();
            eprintln!("ids {}", serde_json::to_string(&ids).unwrap());
            ids
        }
        _ => serde_json::from_str(&std::env::var(IDS).unwrap()).unwrap(),
    };
    let cases = REDUCTIONS.iter().flat_map(|reduction| SHARDS.map(|shards| (*reduction, shards)));
    for ((reduction, shards), id) in cases.zip(ids) {
        let groups =
            Group::in_process(&Placement::even(shards, 2), reduction, Duration::from_secs(30)).unwrap();
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        // SAFETY: the stream is never destroyed.
        let stream = unsafe { Stream::borrowed(&device, raw.cast()) };
        let id = UniqueId::from_bytes(&id).unwrap();
        let comm = NcclComm::form(&groups[rank.index()], library.clone(), stream, &id).unwrap();
        for (index, len) in (0..).zip([1, 1000, 300_001]) {
            let tag = Tag::new(u64::from(shards), 0, TagKind::Gradient).index(index);
            check::<f32>(&groups, rank, &comm, raw, tag, len, DeviceElement::F32, |v| v as f32);
            check::<f64>(&groups, rank, &comm, raw, tag.use_index(1), len, DeviceElement::F64, |v| v);
        }
    }
}

/// Compares NCCL's result with that of the group, whose ranks are all in this process.
#[allow(clippy::too_many_arguments)]
fn check<T: Element + PartialEq + std::fmt::Debug>(
    groups: &[Group],
    rank: Rank,
    comm: &Arc<NcclComm>,
    raw: cudarc::driver::sys::CUstream,
    tag: Tag,
    len: usize,
    element: DeviceElement,
    of: impl Fn(f64) -> T,
) {
    let leaf = |shard: u32| -> Vec<T> {
        (0..len).map(|i| of((f64::from(shard) + 1.7).powi((i % 23) as i32) * 1e-3)).collect()
    };
    let leaves_of = |rank: Rank| groups[0].placement().range(rank).map(leaf).collect::<Vec<_>>();
    let pending: Vec<_> = groups
        .iter()
        .map(|group| group.all_reduce(tag, leaves_of(group.rank()), ReduceOp::Sum).unwrap())
        .collect();
    let expected = pending[rank.index()].wait().unwrap();

    let (merges, kept) = groups[rank.index()].own_tree();
    let mut leaves = leaves_of(rank);
    for (into, from) in merges {
        let right = leaves[from].clone();
        add_to(&mut leaves[into], &right, element);
    }
    let pointers: Vec<u64> = kept.iter().map(|&node| upload(&leaves[node])).collect();
    // Little scratch memory, so that the longest vectors take several pieces.
    let scratch_elements = 100_000;
    let scratch = upload(&vec![of(f64::NAN); scratch_elements]);
    let nodes = Nodes { pointers, len, element, scratch, scratch_elements };
    let mut add = |into: usize, from: usize, count: usize| {
        let at = |place: usize| scratch + (place * size_of::<T>()) as u64;
        // SAFETY: the stream is live.
        unsafe { result::stream::synchronize(raw) }.map_err(|e| format!("{e:?}"))?;
        let (mut left, right) = (download::<T>(at(into), count), download::<T>(at(from), count));
        add_to(&mut left, &right, element);
        // SAFETY: within the scratch memory; `left` lives until the copy is done.
        unsafe {
            result::memcpy_htod_async(at(into), &left, raw).map_err(|e| format!("{e:?}"))?;
            result::stream::synchronize(raw).map_err(|e| format!("{e:?}"))
        }
    };
    // SAFETY: the memory was made above and is freed below, after the wait.
    let work = unsafe { comm.all_reduce(tag, &nodes, &mut add) }.unwrap();
    work.wait().unwrap();
    assert_eq!(download::<T>(nodes.pointers[0], len), expected.as_slice(), "{len} of {element:?}");
    for pointer in nodes.pointers.into_iter().chain([scratch]) {
        // SAFETY: made by `upload`, freed once.
        unsafe { result::free_sync(pointer) }.unwrap();
    }
}

fn add_to<T: Element>(left: &mut [T], right: &[T], element: DeviceElement) {
    match element {
        DeviceElement::F32 => add_as::<f32>(bytemuck::cast_slice_mut(left), bytemuck::cast_slice(right)),
        _ => add_as::<f64>(bytemuck::cast_slice_mut(left), bytemuck::cast_slice(right)),
    }
}

fn add_as<T: Copy + std::ops::Add<Output = T>>(left: &mut [T], right: &[T]) {
    for (l, r) in left.iter_mut().zip(right) {
        *l = *l + *r;
    }
}

fn upload<T: Element>(values: &[T]) -> u64 {
    // SAFETY: as much is copied as was allocated.
    unsafe {
        let pointer = result::malloc_sync(size_of_val(values)).unwrap();
        result::memcpy_htod_sync(pointer, values).unwrap();
        pointer
    }
}

fn download<T: Element>(pointer: u64, len: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); len];
    // SAFETY: the caller's memory holds as much.
    unsafe { result::memcpy_dtoh_sync(&mut values, pointer) }.unwrap();
    values
}
