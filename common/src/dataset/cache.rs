//! The worker's view of shards: local stores first, then a cache on disk, then a fetch from the coordinator.
//!
//! Wherever a shard comes from, its hash is checked before anyone sees it, once per process. From then on single records
//! are read from its file, each checked by a hash of its own, so that samples in random order cost what they weigh
//! and not a shard each.

use super::manifest::ShardEntry;
use super::shard::{Record, RecordTable, ShardFile, ShardProblem};
use crate::digest::{blake3_hex, is_blake3_hex};
use crate::durable::{self, FileError};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often a shard is fetched before giving up: a flipped bit on the way is gone the second time, a damaged
/// source never is.
const FETCH_ATTEMPTS: u32 = 3;

/// The memory that shards may take unless [`ShardCache::with_memory_bytes`] says otherwise. CIFAR (184 MB) and MNIST (47 MB)
/// fit, whose samples are so small that a system call each would count. Of larger ones the system keeps the files in what
/// memory there is, for all workers of a host together.
const DEFAULT_MEMORY_BYTES: u64 = 256 << 20;

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

/// Records of shards by hash. Shards are bounded on disk and in memory; the least recently used go first.
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
    /// Shards in memory.
    memory: HashMap<String, InMemory>,
    /// Shards whose file had the right hash in this process.
    verified: HashMap<String, Verified>,
    /// Shards that a thread is loading right now.
    loading: HashSet<String>,
    /// Files in the cache's folder.
    files: HashMap<String, OnDisk>,
}

struct InMemory {
    shard: Arc<ShardFile>,
    used: u64,
}

#[derive(Clone)]
struct Verified {
    table: Arc<RecordTable>,
    path: PathBuf,
}

struct OnDisk {
    bytes: u64,
    used: u64,
}

/// One record of a shard.
#[derive(Clone, Debug)]
pub struct RecordBytes {
    labels: Vec<u32>,
    memory: Memory,
    payload: Range<usize>,
}

/// Where a record's bytes are.
#[derive(Clone, Debug)]
enum Memory {
    /// In a shard that stays in memory as long as the record.
    Shard(Arc<ShardFile>),
    /// Read by themselves.
    Own(Vec<u8>),
}

impl RecordBytes {
    /// The labels: one for classification.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// What the record holds besides its labels.
    pub fn payload(&self) -> &[u8] {
        let bytes = match &self.memory {
            Memory::Shard(shard) => shard.bytes(),
            Memory::Own(bytes) => bytes,
        };
        &bytes[self.payload.clone()]
    }

    fn new(Record { labels, payload }: Record, memory: Memory) -> Self {
        Self { labels, memory, payload }
    }
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

    /// Keeps at most `bytes` of shards in memory, beyond those that records hold.
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

    /// Record `index` of the shard `entry` of `dataset`; `None` if the shard has no such record or another number of them
    /// than the entry says. Blocks while the shard is read or fetched; threads that ask for the same one wait for one load.
    pub fn record(
        &self,
        dataset: &str,
        entry: &ShardEntry,
        index: usize,
    ) -> Result<Option<RecordBytes>, CacheError> {
        if !is_blake3_hex(&entry.hash) {
            return Err(CacheError::NotAHash(entry.hash.chars().take(100).collect()));
        }
        let mut state = self.state.lock();
        loop {
            if let Some(shard) = state.in_memory(&entry.hash) {
                drop(state);
                return Ok(of_shard(shard, entry, index));
            }
            if let Some(verified) = state.verified(&entry.hash) {
                drop(state);
                if verified.table.len() as u64 != entry.samples || index >= verified.table.len() {
                    return Ok(None);
                }
                match verified.read(index) {
                    Ok(record) => return Ok(Some(record)),
                    // Evicted by another thread or process.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => {
                        let path = verified.path.display();
                        tracing::warn!(%path, error = %e, index, "record cannot be read; loading its shard again");
                    }
                }
                state = self.state.lock();
                state.forget(&entry.hash, &verified);
                continue;
            }
            if state.loading.insert(entry.hash.clone()) {
                break;
            }
            self.loaded.wait(&mut state);
        }
        drop(state);
        let loading = Loading { cache: self, hash: &entry.hash };
        let shard = self.load(dataset, entry)?;
        drop(loading);
        Ok(of_shard(shard, entry, index))
    }

    fn load(&self, dataset: &str, entry: &ShardEntry) -> Result<Arc<ShardFile>, CacheError> {
        let (bytes, path) = match self.find_here(entry) {
            Some((bytes, path)) => (bytes, Some(path)),
            None => {
                let bytes = self.fetch_checked(dataset, entry)?;
                let path = self.keep_on_disk(&entry.hash, &bytes);
                (bytes, path)
            }
        };
        let shard = ShardFile::parse(bytes).map_err(|problem| CacheError::Format {
            dataset: dataset.to_owned(),
            hash: entry.hash.clone(),
            problem,
        })?;
        let shard = Arc::new(shard);
        let verified = path.map(|path| Verified { table: Arc::new(shard.table()), path });
        let mut state = self.state.lock();
        state.verified.extend(verified.map(|verified| (entry.hash.clone(), verified)));
        let used = state.tick();
        state.memory.insert(entry.hash.clone(), InMemory { shard: shard.clone(), used });
        state.trim_memory(self.memory_bytes);
        Ok(shard)
    }

    /// The shard and its file from a local store or from the cache's folder, whichever has it intact.
    fn find_here(&self, entry: &ShardEntry) -> Option<(Vec<u8>, PathBuf)> {
        if let Some(found) = self.local.iter().find_map(|dir| self.read_checked(dir, entry)) {
            return Some(found);
        }
        let dir = self.dir.as_ref()?;
        let found = self.read_checked(dir, entry);
        let mut state = self.state.lock();
        if found.is_some() {
            let used = state.tick();
            state.files.insert(entry.hash.clone(), OnDisk { bytes: entry.bytes, used });
        } else if state.files.remove(&entry.hash).is_some() {
            let _damaged = std::fs::remove_file(dir.join(&entry.hash));
        }
        found
    }

    fn read_checked(&self, dir: &Path, entry: &ShardEntry) -> Option<(Vec<u8>, PathBuf)> {
        let path = dir.join(&entry.hash);
        match durable::read(&path) {
            Ok(bytes) if self.is_intact(&bytes, entry) => Some((bytes, path)),
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

    /// Writes a fetched shard into the cache's folder and returns its file. A full disk costs later fetches, not the job.
    fn keep_on_disk(&self, hash: &str, bytes: &[u8]) -> Option<PathBuf> {
        let path = self.dir.as_ref().filter(|_| bytes.len() as u64 <= self.max_bytes)?.join(hash);
        if let Err(e) = durable::write_atomic(&path, bytes) {
            tracing::warn!(error = %e, "shard not cached; it will be fetched again when it is needed again");
            return None;
        }
        let mut state = self.state.lock();
        let used = state.tick();
        state.files.insert(hash.to_owned(), OnDisk { bytes: bytes.len() as u64, used });
        self.evict_files(&mut state);
        Some(path)
    }

    /// Removes the least recently used files until the rest fit. A shard that is being loaded stays.
    fn evict_files(&self, state: &mut State) {
        let Some(dir) = &self.dir else { return };
        let mut total: u64 = state.files.values().map(|f| f.bytes).sum();
        if total <= self.max_bytes {
            return;
        }
        let mut by_age: Vec<_> = state
            .files
            .iter()
            .filter(|(hash, _)| !state.loading.contains(*hash))
            .map(|(hash, file)| (file.used, file.bytes, hash.clone()))
            .collect();
        by_age.sort_unstable();
        for (_, bytes, hash) in by_age {
            if total <= self.max_bytes {
                return;
            }
            match std::fs::remove_file(dir.join(&hash)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(error = %e, hash, "cached shard cannot be removed");
                }
                _ => {
                    state.files.remove(&hash);
                    if state.verified.get(&hash).is_some_and(|v| v.path.starts_with(dir)) {
                        state.verified.remove(&hash);
                    }
                    total -= bytes;
                }
            }
        }
    }
}

impl Verified {
    /// Record `index` from the file. Fails where that cannot be read or has other bytes than it had.
    fn read(&self, index: usize) -> io::Result<RecordBytes> {
        let changed = || io::Error::new(io::ErrorKind::InvalidData, "its bytes have changed");
        let (start, bytes) = self.table.place(index).ok_or_else(changed)?;
        let mut buffer = vec![0; bytes];
        File::open(&self.path)?.read_exact_at(&mut buffer, start)?;
        let record = self.table.parse(index, &buffer).ok_or_else(changed)?;
        Ok(RecordBytes::new(record, Memory::Own(buffer)))
    }
}

/// Record `index` of a whole shard.
fn of_shard(shard: Arc<ShardFile>, entry: &ShardEntry, index: usize) -> Option<RecordBytes> {
    let record = if shard.len() as u64 == entry.samples { shard.record(index)? } else { return None };
    Some(RecordBytes::new(record, Memory::Shard(shard)))
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn in_memory(&mut self, hash: &str) -> Option<Arc<ShardFile>> {
        let used = self.tick();
        let entry = self.memory.get_mut(hash)?;
        entry.used = used;
        Some(entry.shard.clone())
    }

    /// How to read records of the shard from its file.
    fn verified(&mut self, hash: &str) -> Option<Verified> {
        let used = self.tick();
        let verified = self.verified.get(hash)?.clone();
        if let Some(file) = self.files.get_mut(hash) {
            file.used = used;
        }
        Some(verified)
    }

    /// Lets the shard be loaded again, unless another thread has done so meanwhile.
    fn forget(&mut self, hash: &str, verified: &Verified) {
        if self.verified.get(hash).is_some_and(|now| Arc::ptr_eq(&now.table, &verified.table)) {
            self.verified.remove(hash);
        }
    }

    fn trim_memory(&mut self, limit: u64) {
        let size = |e: &InMemory| e.shard.bytes().len() as u64;
        let mut total: u64 = self.memory.values().map(size).sum();
        while total > limit {
            let oldest = self.memory.iter().min_by_key(|(_, e)| e.used).map(|(hash, _)| hash.clone());
            let Some(oldest) = oldest.and_then(|hash| self.memory.remove(&hash)) else { return };
            total -= size(&oldest);
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
