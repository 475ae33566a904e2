//! The worker's view of shards: local stores first, then a cache on disk, then a fetch from the coordinator.
//!
//! Wherever a shard comes from, its hash is checked before anyone sees it.

use super::manifest::ShardEntry;
use super::shard::{ShardFile, ShardProblem};
use crate::digest::{blake3_hex, is_blake3_hex};
use crate::durable::{self, FileError};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// How often a shard is fetched before giving up: a flipped bit on the way is gone the second time, a damaged
/// source never is.
const FETCH_ATTEMPTS: u32 = 3;

/// The memory that shards may take unless [`ShardCache::with_memory_bytes`] says otherwise.
const DEFAULT_MEMORY_BYTES: u64 = 1 << 30;

/// Gets shards from somewhere else, such as the coordinator.
pub trait ShardFetch: Send + Sync {
    /// The bytes of the shard `hash` of `dataset`. May block. The bytes need not be trusted.
    fn fetch(&self, dataset: &str, hash: &str) -> Result<Vec<u8>, FetchError>;
}

/// Why a fetch failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct FetchError(pub String);

/// Why a shard could not be had.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It is not on this machine and there is nobody to ask.
    #[error(
        "shard {hash} of dataset `{dataset}` is not good in any of {} and there is nowhere to fetch it from; \
         run `coordinator dataset verify {dataset}` and add the dataset again",
        list(searched)
    )]
    Nowhere {
        /// The dataset.
        dataset: String,
        /// The shard.
        hash: String,
        /// The folders in which it was looked for.
        searched: Vec<PathBuf>,
    },
    /// Every fetch failed or brought the wrong bytes.
    #[error(
        "shard {hash} of dataset `{dataset}` could not be fetched in {FETCH_ATTEMPTS} attempts: {last}; run \
         `coordinator dataset verify {dataset}` on the coordinator"
    )]
    Fetch {
        /// The dataset.
        dataset: String,
        /// The shard.
        hash: String,
        /// What went wrong the last time.
        last: String,
    },
    /// The bytes are those that were imported and not a shard that this release reads.
    #[error("shard {hash} of dataset `{dataset}` cannot be read: {problem}; add the dataset again")]
    Format {
        /// The dataset.
        dataset: String,
        /// The shard.
        hash: String,
        /// What is wrong with it.
        problem: ShardProblem,
    },
    /// The name is not a hash.
    #[error("`{0}` is not the hash of a shard; the manifest that names it is damaged")]
    NotAHash(String),
}

/// Shards by hash, bounded on disk and in memory; the least recently used go first.
pub struct ShardCache {
    /// Where fetched shards are kept; there are none without.
    dir: Option<PathBuf>,
    max_bytes: u64,
    memory_bytes: u64,
    local: Vec<PathBuf>,
    fetch: Option<Arc<dyn ShardFetch>>,
    state: Mutex<State>,
    loaded: Condvar,
    hash_failures: AtomicU64,
    fetches: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Grows by one with every use; the order of uses.
    clock: u64,
    /// Shards in memory, and those that only a sample still holds.
    shards: HashMap<String, InMemory>,
    /// Shards that a thread is loading right now.
    loading: HashSet<String>,
    /// Files in the cache's folder.
    files: HashMap<String, OnDisk>,
}

struct InMemory {
    shard: Weak<ShardFile>,
    kept: Option<Arc<ShardFile>>,
    used: u64,
}

struct OnDisk {
    bytes: u64,
    used: u64,
}

impl ShardCache {
    /// A cache in `dir` of at most `max_bytes`, over what an earlier process left there.
    pub fn new(dir: &Path, max_bytes: u64) -> Result<Self, FileError> {
        durable::create_dir_all(dir)?;
        durable::sweep_temporary(dir)?;
        let files = files_by_age(dir)?;
        let state = State { clock: files.len() as u64, files, ..State::default() };
        let cache =
            Self { dir: Some(dir.to_path_buf()), max_bytes, state: Mutex::new(state), ..Self::in_place() };
        cache.evict_files(&mut cache.state.lock());
        Ok(cache)
    }

    /// One that has no folder of its own and reads only where [`ShardCache::with_local`] says.
    pub fn in_place() -> Self {
        Self {
            dir: None,
            max_bytes: 0,
            memory_bytes: DEFAULT_MEMORY_BYTES,
            local: Vec::new(),
            fetch: None,
            state: Mutex::default(),
            loaded: Condvar::new(),
            hash_failures: AtomicU64::new(0),
            fetches: AtomicU64::new(0),
        }
    }

    /// Looks first in `dirs`, folders of shards that are never written here, such as a store on this machine.
    pub fn with_local(mut self, dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        self.local.extend(dirs);
        self
    }

    /// Fetches what is not on this machine with `fetch`.
    pub fn with_fetch(mut self, fetch: Arc<dyn ShardFetch>) -> Self {
        self.fetch = Some(fetch);
        self
    }

    /// Keeps at most `bytes` of shards in memory, beyond those that samples hold.
    pub fn with_memory_bytes(mut self, bytes: u64) -> Self {
        self.memory_bytes = bytes;
        self
    }

    /// Shards refused because their bytes did not match their hash, wherever they came from: the value of
    /// `lockstep_shard_hash_failures_total`.
    pub fn hash_failures(&self) -> u64 {
        self.hash_failures.load(Ordering::Relaxed)
    }

    /// Fetches tried so far.
    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::Relaxed)
    }

    /// The shard `entry` of `dataset`. Blocks while it is read or fetched; threads that ask for the same shard
    /// wait for one load.
    pub fn get(&self, dataset: &str, entry: &ShardEntry) -> Result<Arc<ShardFile>, CacheError> {
        if !is_blake3_hex(&entry.hash) {
            return Err(CacheError::NotAHash(entry.hash.chars().take(100).collect()));
        }
        let mut state = self.state.lock();
        loop {
            if let Some(shard) = state.in_memory(&entry.hash) {
                return Ok(shard);
            }
            if state.loading.insert(entry.hash.clone()) {
                break;
            }
            self.loaded.wait(&mut state);
        }
        drop(state);
        let loading = Loading { cache: self, hash: &entry.hash };
        let shard = Arc::new(self.load(dataset, entry)?);
        self.keep_in_memory(&entry.hash, &shard);
        drop(loading);
        Ok(shard)
    }

    fn load(&self, dataset: &str, entry: &ShardEntry) -> Result<ShardFile, CacheError> {
        let bytes = match self.find_here(entry) {
            Some(bytes) => bytes,
            None => {
                let bytes = self.fetch_checked(dataset, entry)?;
                self.keep_on_disk(&entry.hash, &bytes);
                bytes
            }
        };
        ShardFile::parse(bytes).map_err(|problem| CacheError::Format {
            dataset: dataset.to_owned(),
            hash: entry.hash.clone(),
            problem,
        })
    }

    /// The shard from a local store or from the cache's folder, whichever has it intact.
    fn find_here(&self, entry: &ShardEntry) -> Option<Vec<u8>> {
        if let Some(bytes) = self.local.iter().find_map(|dir| self.read_checked(dir, entry)) {
            return Some(bytes);
        }
        let dir = self.dir.as_ref()?;
        let bytes = self.read_checked(dir, entry);
        let mut state = self.state.lock();
        if bytes.is_some() {
            let used = state.tick();
            state.files.insert(entry.hash.clone(), OnDisk { bytes: entry.bytes, used });
        } else if state.files.remove(&entry.hash).is_some() {
            let _damaged = std::fs::remove_file(dir.join(&entry.hash));
        }
        bytes
    }

    fn read_checked(&self, dir: &Path, entry: &ShardEntry) -> Option<Vec<u8>> {
        let path = dir.join(&entry.hash);
        match durable::read(&path) {
            Ok(bytes) if self.is_intact(&bytes, entry) => Some(bytes),
            Ok(_) => {
                tracing::warn!(path = %path.display(), "shard does not match its hash; looking elsewhere");
                None
            }
            Err(e) if e.is_not_found() => None,
            Err(e) => {
                tracing::warn!(error = %e, "shard cannot be read; looking elsewhere");
                None
            }
        }
    }

    fn is_intact(&self, bytes: &[u8], entry: &ShardEntry) -> bool {
        let intact = bytes.len() as u64 == entry.bytes && blake3_hex(bytes) == entry.hash;
        if !intact {
            self.hash_failures.fetch_add(1, Ordering::Relaxed);
        }
        intact
    }

    fn fetch_checked(&self, dataset: &str, entry: &ShardEntry) -> Result<Vec<u8>, CacheError> {
        let (dataset_owned, hash) = (dataset.to_owned(), entry.hash.clone());
        let Some(fetch) = &self.fetch else {
            let searched = self.local.iter().chain(&self.dir).cloned().collect();
            return Err(CacheError::Nowhere { dataset: dataset_owned, hash, searched });
        };
        let mut last = String::new();
        for attempt in 1..=FETCH_ATTEMPTS {
            self.fetches.fetch_add(1, Ordering::Relaxed);
            match fetch.fetch(dataset, &entry.hash) {
                Ok(bytes) if self.is_intact(&bytes, entry) => return Ok(bytes),
                Ok(_) => last = "the bytes do not match the hash".to_owned(),
                Err(e) => last = e.to_string(),
            }
            tracing::warn!(dataset, hash = entry.hash, attempt, problem = last, "fetch of a shard failed");
        }
        Err(CacheError::Fetch { dataset: dataset_owned, hash, last })
    }

    /// Writes a fetched shard into the cache's folder. A full disk costs later fetches, not the job.
    fn keep_on_disk(&self, hash: &str, bytes: &[u8]) {
        let Some(dir) = self.dir.as_ref().filter(|_| bytes.len() as u64 <= self.max_bytes) else { return };
        if let Err(e) = durable::write_atomic(&dir.join(hash), bytes) {
            tracing::warn!(error = %e, "shard not cached; it will be fetched again when it is needed again");
            return;
        }
        let mut state = self.state.lock();
        let used = state.tick();
        state.files.insert(hash.to_owned(), OnDisk { bytes: bytes.len() as u64, used });
        self.evict_files(&mut state);
    }

    /// Removes the least recently used files until the rest fit. A shard that is in use stays.
    fn evict_files(&self, state: &mut State) {
        let Some(dir) = &self.dir else { return };
        let mut total: u64 = state.files.values().map(|f| f.bytes).sum();
        if total <= self.max_bytes {
            return;
        }
        let mut by_age: Vec<_> = state
            .files
            .iter()
            .filter(|(hash, _)| !state.is_in_use(hash))
            .map(|(hash, file)| (file.used, file.bytes, hash.clone()))
            .collect();
        by_age.sort_unstable();
        for (_, bytes, hash) in by_age {
            if total <= self.max_bytes {
                return;
            }
            match std::fs::remove_file(dir.join(&hash)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(error = %e, hash, "cached shard cannot be removed");
                }
                _ => {
                    state.files.remove(&hash);
                    total -= bytes;
                }
            }
        }
    }

    fn keep_in_memory(&self, hash: &str, shard: &Arc<ShardFile>) {
        let mut state = self.state.lock();
        let used = state.tick();
        let entry = InMemory { shard: Arc::downgrade(shard), kept: Some(shard.clone()), used };
        state.shards.insert(hash.to_owned(), entry);
        state.trim_memory(self.memory_bytes);
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn in_memory(&mut self, hash: &str) -> Option<Arc<ShardFile>> {
        let used = self.tick();
        let entry = self.shards.get_mut(hash)?;
        entry.used = used;
        let shard = entry.shard.upgrade();
        if shard.is_none() {
            self.shards.remove(hash);
        }
        shard
    }

    /// Whether a thread is loading the shard or holds it (or a sample of it) beyond what the cache keeps.
    fn is_in_use(&self, hash: &str) -> bool {
        self.loading.contains(hash)
            || self.shards.get(hash).is_some_and(|e| e.shard.strong_count() > usize::from(e.kept.is_some()))
    }

    fn trim_memory(&mut self, limit: u64) {
        self.shards.retain(|_, e| e.shard.strong_count() > 0);
        let size = |e: &InMemory| e.kept.as_ref().map_or(0, |s| s.bytes().len() as u64);
        let mut total: u64 = self.shards.values().map(size).sum();
        while total > limit {
            let oldest = self.shards.values_mut().filter(|e| e.kept.is_some()).min_by_key(|e| e.used);
            let Some(oldest) = oldest else { return };
            total -= size(oldest);
            oldest.kept = None;
        }
    }
}

/// Says when dropped, also by a panic, that a load is over.
struct Loading<'a> {
    cache: &'a ShardCache,
    hash: &'a str,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.cache.state.lock().loading.remove(self.hash);
        self.cache.loaded.notify_all();
    }
}

impl std::fmt::Debug for ShardCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardCache").field("dir", &self.dir).field("max_bytes", &self.max_bytes).finish()
    }
}

/// The shards in `dir`, the oldest first in order of use.
fn files_by_age(dir: &Path) -> Result<HashMap<String, OnDisk>, FileError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(FileError::on("list", dir))? {
        let entry = entry.map_err(FileError::on("list", dir))?;
        let metadata = entry.metadata().map_err(FileError::on("read", &entry.path()))?;
        if let Some(hash) = entry.file_name().to_str().filter(|name| is_blake3_hex(name)) {
            let modified = metadata.modified().map_err(FileError::on("read", &entry.path()))?;
            found.push((modified, hash.to_owned(), metadata.len()));
        }
    }
    found.sort_unstable();
    Ok((1..).zip(found).map(|(used, (_, hash, bytes))| (hash, OnDisk { bytes, used })).collect())
}

fn list(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|d| format!("`{}`", d.display())).collect::<Vec<_>>().join(", ")
}
