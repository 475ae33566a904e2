use super::*;
use crate::dataset::{CacheError, FetchError, ShardCache, ShardEntry, ShardFetch};
use parking_lot::Mutex;
use std::sync::{Arc, Barrier};

/// A coordinator that sends shards from a store and can be told to damage or refuse the next ones.
struct Source {
    store: Store,
    faults: Mutex<Vec<Fault>>,
    asked: Mutex<Vec<String>>,
}

enum Fault {
    FlipBit,
    Truncate,
    Refuse,
}

impl Source {
    fn new(store: &Store, faults: Vec<Fault>) -> Arc<Self> {
        Arc::new(Self { store: store.clone(), faults: Mutex::new(faults), asked: Mutex::default() })
    }

    fn times_asked(&self) -> usize {
        self.asked.lock().len()
    }
}

impl ShardFetch for Source {
    fn fetch(&self, dataset: &str, hash: &str) -> Result<Vec<u8>, FetchError> {
        assert_eq!(dataset, "d/train");
        self.asked.lock().push(hash.to_owned());
        let mut bytes = std::fs::read(self.store.shard_path(hash).unwrap()).unwrap();
        match self.faults.lock().pop() {
            None => {}
            Some(Fault::FlipBit) => bytes[100] ^= 4,
            Some(Fault::Truncate) => bytes.truncate(100),
            Some(Fault::Refuse) => return Err(FetchError("the coordinator is away".into())),
        }
        Ok(bytes)
    }
}

struct Worker {
    f: Fixture,
    shards: Vec<ShardEntry>,
    source: Arc<Source>,
}

impl Worker {
    fn new(samples: u32, faults: Vec<Fault>) -> Self {
        let (f, manifest) = Fixture::with_dataset(samples);
        let source = Source::new(&f.store, faults);
        Self { f, shards: manifest.shards, source }
    }

    /// A cache of `max_bytes` that keeps nothing in memory by itself; a new one is a new process.
    fn cache(&self, max_bytes: u64) -> ShardCache {
        let dir = self.f.dir.path().join("cache");
        ShardCache::new(&dir, max_bytes).unwrap().with_fetch(self.source.clone()).with_memory_bytes(0)
    }

    fn cached(&self, i: usize) -> std::path::PathBuf {
        self.f.dir.path().join("cache").join(&self.shards[i].hash)
    }

    /// Reads every record of shard `i`.
    fn get(&self, cache: &ShardCache, i: usize) -> Result<(), CacheError> {
        for index in 0..self.shards[i].samples {
            self.record(cache, i, index)?;
        }
        Ok(())
    }

    fn record(&self, cache: &ShardCache, i: usize, index: u64) -> Result<(), CacheError> {
        let record = cache.record("d/train", &self.shards[i], index as usize)?.unwrap();
        let sample = (self.shards[i].first_sample + index) as u32;
        assert_eq!(record.labels(), [sample % 10]);
        assert!(
            record.payload().iter().enumerate().all(|(at, &b)| b == pixel(sample, at)),
            "sample {sample}"
        );
        Ok(())
    }
}

#[test]
fn a_shard_is_fetched_once_and_then_found_on_disk_also_by_the_next_process() {
    let w = Worker::new(10, vec![]);
    for _ in 0..2 {
        let cache = w.cache(u64::MAX);
        w.get(&cache, 0).unwrap();
        w.get(&cache, 0).unwrap();
        assert_eq!(cache.hash_failures(), 0);
    }
    assert_eq!(w.source.times_asked(), 1);
}

#[test]
fn memory_spares_the_disk() {
    let w = Worker::new(10, vec![]);
    let cache = w.cache(u64::MAX).with_memory_bytes(u64::MAX);
    w.get(&cache, 0).unwrap();
    std::fs::remove_file(w.cached(0)).unwrap();
    w.get(&cache, 0).unwrap();
    assert_eq!(w.source.times_asked(), 1);
}

#[test]
fn damage_on_the_way_is_counted_and_fetched_again() {
    let w = Worker::new(10, vec![Fault::FlipBit, Fault::Truncate]);
    let cache = w.cache(u64::MAX);
    w.get(&cache, 0).unwrap();
    assert_eq!((cache.hash_failures(), cache.fetches()), (2, 3));
}

#[test]
fn a_source_that_stays_damaged_is_given_up_with_names() {
    let w = Worker::new(10, vec![Fault::Refuse, Fault::FlipBit, Fault::FlipBit, Fault::FlipBit]);
    let cache = w.cache(u64::MAX);
    let error = w.get(&cache, 0).unwrap_err().to_string();
    assert!(error.contains(&w.shards[0].hash) && error.contains("d/train"), "{error}");
    assert!(error.contains("do not match"), "{error}");
    assert!(!w.cached(0).exists());
    assert_eq!((cache.hash_failures(), cache.fetches()), (3, 3));
    // The failure does not stick: the next attempt meets one refusal and then the right bytes.
    w.get(&cache, 0).unwrap();
}

#[test]
fn a_flipped_byte_in_the_cache_is_refused_counted_and_replaced() {
    let w = Worker::new(10, vec![]);
    w.get(&w.cache(u64::MAX), 0).unwrap();
    flip(&w.cached(0));
    let cache = w.cache(u64::MAX);
    w.get(&cache, 0).unwrap();
    assert_eq!((cache.hash_failures(), cache.fetches()), (1, 1));
    let again = w.cache(u64::MAX);
    w.get(&again, 0).unwrap();
    assert_eq!((again.hash_failures(), again.fetches()), (0, 0));
}

#[test]
fn a_local_store_comes_first_and_its_flipped_shard_is_passed_over() {
    let w = Worker::new(100, vec![]);
    let local = w.f.dir.path().join("local");
    std::fs::create_dir(&local).unwrap();
    for s in &w.shards {
        std::fs::copy(w.f.store.shard_path(&s.hash).unwrap(), local.join(&s.hash)).unwrap();
    }
    flip(&local.join(&w.shards[1].hash));
    let cache = w.cache(u64::MAX).with_local([local]);
    w.get(&cache, 0).unwrap();
    assert_eq!((cache.hash_failures(), cache.fetches()), (0, 0));
    assert!(!w.cached(0).exists(), "what is local is not copied");
    w.get(&cache, 1).unwrap();
    assert_eq!((cache.hash_failures(), cache.fetches()), (1, 1));
}

#[test]
fn with_nowhere_to_fetch_from_the_error_names_shard_and_folders() {
    let w = Worker::new(10, vec![]);
    let dir = w.f.dir.path().join("empty");
    let cache = ShardCache::new(&dir, u64::MAX).unwrap();
    let error = w.get(&cache, 0).unwrap_err().to_string();
    assert!(error.contains(&w.shards[0].hash) && error.contains(&dir.display().to_string()), "{error}");
}

#[test]
fn the_least_recently_used_shard_leaves_a_full_disk_cache() {
    let w = Worker::new(64 * 3, vec![]);
    let cache = w.cache(2 * w.shards[0].bytes);
    for i in [0, 1, 0, 2] {
        w.get(&cache, i).unwrap();
    }
    assert_eq!([0, 1, 2].map(|i| w.cached(i).exists()), [true, false, true]);
    assert_eq!(w.source.times_asked(), 3);
}

#[test]
fn records_of_an_evicted_shard_are_fetched_again() {
    let w = Worker::new(64 * 3, vec![]);
    let cache = w.cache(2 * w.shards[0].bytes);
    for i in [0, 1, 2, 0] {
        w.get(&cache, i).unwrap();
    }
    assert_eq!([0, 1, 2].map(|i| w.cached(i).exists()), [true, false, true]);
    // Also where another process has removed it.
    std::fs::remove_file(w.cached(0)).unwrap();
    w.get(&cache, 0).unwrap();
    assert_eq!((w.source.times_asked(), cache.hash_failures()), (5, 0));
}

/// A shard was read and hashed again for every sample that was not in memory, 4 MiB for each.
#[test]
fn records_are_read_from_a_file_that_was_hashed_once_and_not_its_other_bytes() {
    let w = Worker::new(10, vec![]);
    let cache = w.cache(u64::MAX);
    w.record(&cache, 0, 0).unwrap();
    // Damage that only who reads the whole file would meet.
    damage_record(&w.cached(0), 9);
    for index in 0..9 {
        w.record(&cache, 0, index).unwrap();
    }
    assert_eq!((cache.hash_failures(), cache.fetches()), (0, 1));
}

#[test]
fn a_record_damaged_after_its_shard_was_hashed_is_never_seen_and_the_shard_replaced() {
    let w = Worker::new(10, vec![]);
    let cache = w.cache(u64::MAX);
    w.get(&cache, 0).unwrap();
    damage_record(&w.cached(0), 9);
    w.get(&cache, 0).unwrap();
    assert_eq!((cache.hash_failures(), cache.fetches()), (1, 2));
    truncate(&w.cached(0), 1);
    w.get(&cache, 0).unwrap();
    assert_eq!((cache.hash_failures(), cache.fetches()), (2, 3));
}

/// Flips a bit in the middle of record `index` of a shard of 10.
fn damage_record(path: &Path, index: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let from_end = (10 - index) * PIXELS - PIXELS / 2;
    let at = bytes.len() - from_end;
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_record_that_is_not_there_is_none_from_memory_and_from_the_file() {
    let w = Worker::new(10, vec![]);
    for cache in [w.cache(u64::MAX), w.cache(u64::MAX).with_memory_bytes(u64::MAX)] {
        for _ in 0..2 {
            assert!(cache.record("d/train", &w.shards[0], 10).unwrap().is_none());
        }
        let other = ShardEntry { samples: 9, ..w.shards[0].clone() };
        assert!(cache.record("d/train", &other, 0).unwrap().is_none());
    }
}

#[test]
fn a_smaller_limit_is_kept_from_the_start() {
    let w = Worker::new(64 * 3, vec![]);
    let large = w.cache(u64::MAX);
    (0..3).for_each(|i| w.get(&large, i).unwrap());
    let _small = w.cache(w.shards[0].bytes);
    assert_eq!((0..3).filter(|&i| w.cached(i).exists()).count(), 1);
}

#[test]
fn a_shard_larger_than_the_cache_is_served_without_it() {
    let w = Worker::new(10, vec![]);
    let cache = w.cache(10);
    w.record(&cache, 0, 3).unwrap();
    assert!(!w.cached(0).exists());
}

#[test]
fn threads_that_ask_together_fetch_once() {
    let w = Worker::new(10, vec![]);
    let cache = w.cache(u64::MAX).with_memory_bytes(u64::MAX);
    let together = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                together.wait();
                w.get(&cache, 0).unwrap();
            });
        }
    });
    assert_eq!(w.source.times_asked(), 1);
}

#[test]
fn a_fetch_that_panics_leaves_no_one_waiting() {
    struct Panics;
    impl ShardFetch for Panics {
        fn fetch(&self, _: &str, _: &str) -> Result<Vec<u8>, FetchError> {
            panic!("a bug in the fetcher")
        }
    }
    let w = Worker::new(10, vec![]);
    let cache = ShardCache::new(&w.f.dir.path().join("c"), 0).unwrap().with_fetch(Arc::new(Panics));
    for _ in 0..2 {
        let attempt = std::panic::AssertUnwindSafe(|| cache.record("d/train", &w.shards[0], 0));
        assert!(std::panic::catch_unwind(attempt).is_err());
    }
}

#[test]
fn a_hash_that_is_a_path_is_refused() {
    let w = Worker::new(10, vec![]);
    let entry = ShardEntry { hash: "../store/manifests/d@train.json".into(), ..w.shards[0].clone() };
    let error = w.cache(u64::MAX).record("d/train", &entry, 0).unwrap_err();
    assert!(matches!(error, CacheError::NotAHash(_)), "{error}");
    assert_eq!(w.source.times_asked(), 0);
}
