//! The durable store of jobs, workers and tokens.
//!
//! It is redb: one file, pure Rust, transactions that survive a `kill -9` at any point and a power cut, an exclusive
//! lock against a second coordinator, no server and no C library to build. The load is a few writes a second, so its
//! single writer is no limit. The values are JSON, so that a later release can add fields.

use lockstep_common::wire::TokenPurpose;
use lockstep_core::{JobRecord, WorkerRecord};
use redb::{
    AccessGuard, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::path::{Path, PathBuf};
use thiserror::Error;

const JOBS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("jobs");
const WORKERS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("workers");
const TOKENS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("tokens");

/// Why the store could not be opened, read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("the store `{}` is in use by another coordinator", .0.display())]
    InUse(PathBuf),
    /// The file system or the file's content is to blame.
    #[error("the store `{}` failed: {cause}; see that its disk has space and its files are yours", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// What redb said.
        cause: String,
    },
    /// An entry is of another release, or damaged.
    #[error("the store `{}` has an entry that this release cannot read: {cause}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// What is wrong with the entry.
        cause: serde_json::Error,
    },
}

/// A join token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// What it is good for.
    pub purpose: TokenPurpose,
    /// [`lockstep_common::token::Token::secret_hash`].
    pub secret_hash: [u8; 32],
    /// When it ends to be good, in milliseconds since 1970.
    pub expires_ms: u64,
    /// How many enrolments it is still good for.
    pub uses_left: u32,
}

/// The records of one kind.
#[derive(Debug)]
pub struct Kept<T> {
    /// Those that can be read, in the order of their numbers.
    pub records: Vec<T>,
    /// The highest number of all, unreadable ones included; 0 if there are none. A new record must not take their place.
    pub last: u64,
}

/// The store.
pub struct Store {
    /// `None` after a failure: redb refuses all further work after an I/O error, so the next operation opens it anew.
    database: Option<Database>,
    path: PathBuf,
}

impl Store {
    /// Opens or creates the store at `path`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut store = Self { database: None, path: path.to_owned() };
        store.attempt(|database| {
            let transaction = database.begin_write()?;
            transaction.open_table(JOBS)?;
            transaction.open_table(WORKERS)?;
            transaction.open_table(TOKENS)?;
            Ok(transaction.commit()?)
        })?;
        Ok(store)
    }

    /// The jobs, in order of submission. Those that this release cannot read stay in the store and are left out.
    pub fn jobs(&mut self) -> Result<Kept<JobRecord>, StoreError> {
        self.all(JOBS, "job j")
    }

    /// The workers, in order of enrolment. Those that this release cannot read stay in the store and are left out.
    pub fn workers(&mut self) -> Result<Kept<WorkerRecord>, StoreError> {
        self.all(WORKERS, "worker w")
    }

    /// Makes a job's record durable.
    pub fn put_job(&mut self, record: &JobRecord) -> Result<(), StoreError> {
        self.put(JOBS, record.id.0, record)
    }

    /// Makes a worker's record durable.
    pub fn put_worker(&mut self, record: &WorkerRecord) -> Result<(), StoreError> {
        self.put(WORKERS, record.id.0, record)
    }

    /// The token called `id`.
    pub fn token(&mut self, id: &str) -> Result<Option<TokenRecord>, StoreError> {
        let value = self.attempt(|database| {
            let table = database.begin_read()?.open_table(TOKENS)?;
            Ok(table.get(id)?.map(|v| v.value().to_vec()))
        })?;
        value.map(|bytes| serde_json::from_slice(&bytes).map_err(|e| self.entry(e))).transpose()
    }

    /// Makes a token durable; those that have expired for a day are forgotten.
    pub fn put_token(&mut self, id: &str, record: &TokenRecord, now_ms: u64) -> Result<(), StoreError> {
        const DAY_MS: u64 = 86_400_000;
        let value = self.encode(record)?;
        self.attempt(|database| {
            let transaction = database.begin_write()?;
            {
                let mut table = transaction.open_table(TOKENS)?;
                table.insert(id, value.as_slice())?;
                table.retain(|_, value| {
                    serde_json::from_slice::<TokenRecord>(value).is_ok_and(|t| t.expires_ms + DAY_MS > now_ms)
                })?;
            }
            Ok(transaction.commit()?)
        })
    }

    fn put(
        &mut self,
        table: TableDefinition<'_, u64, &[u8]>,
        key: u64,
        record: &impl Serialize,
    ) -> Result<(), StoreError> {
        let value = self.encode(record)?;
        self.attempt(|database| {
            let transaction = database.begin_write()?;
            transaction.open_table(table)?.insert(key, value.as_slice())?;
            Ok(transaction.commit()?)
        })
    }

    fn all<T: DeserializeOwned>(
        &mut self,
        table: TableDefinition<'_, u64, &[u8]>,
        kind: &str,
    ) -> Result<Kept<T>, StoreError> {
        let entries = self.attempt(|database| {
            let table = database.begin_read()?.open_table(table)?;
            let entry = |entry: Result<(AccessGuard<'_, u64>, AccessGuard<'_, &[u8]>), StorageError>| {
                let (number, value) = entry?;
                Ok((number.value(), value.value().to_vec()))
            };
            table.iter()?.map(entry).collect::<Result<Vec<_>, redb::Error>>()
        })?;
        let last = entries.last().map_or(0, |(number, _)| *number);
        let mut records = Vec::with_capacity(entries.len());
        for (number, value) in &entries {
            match serde_json::from_slice(value) {
                Ok(record) => records.push(record),
                Err(e) => tracing::error!("{kind}{number} is left as it is: {}", self.entry(e)),
            }
        }
        Ok(Kept { records, last })
    }

    /// Runs `work` on the database. One that has failed is closed, and opened again for the next attempt.
    fn attempt<R>(
        &mut self,
        work: impl FnOnce(&Database) -> Result<R, redb::Error>,
    ) -> Result<R, StoreError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => Database::create(&self.path).map_err(|e| match e {
                DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(self.path.clone()),
                other => self.failed(other),
            })?,
        };
        let result = work(&database).map_err(|e| self.failed(e))?;
        self.database = Some(database);
        Ok(result)
    }

    fn encode(&self, record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(record).map_err(|e| self.entry(e))
    }

    fn entry(&self, cause: serde_json::Error) -> StoreError {
        StoreError::Entry { path: self.path.clone(), cause }
    }

    fn failed(&self, e: impl std::fmt::Display) -> StoreError {
        StoreError::Failed { path: self.path.clone(), cause: e.to_string() }
    }
}
