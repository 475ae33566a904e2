//! The durable store of jobs, workers and tokens.
//!
//! It is redb: one file, pure Rust, transactions that survive a `kill -9` at any point and a power cut, an exclusive
//! lock against a second coordinator, no server and no C library to build. The load is a few writes a second, so its
//! single writer is no limit. The values are JSON, so that a later release can add fields.

use lockstep_common::wire::TokenPurpose;
use lockstep_core::{JobRecord, WorkerRecord};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
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

/// The store.
pub struct Store {
    database: Database,
    path: PathBuf,
}

impl Store {
    /// Opens or creates the store at `path`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|e| match e {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.to_owned()),
            other => StoreError::Failed { path: path.to_owned(), cause: other.to_string() },
        })?;
        let store = Self { database, path: path.to_owned() };
        store.create_tables().map_err(|e| store.failed(e))?;
        Ok(store)
    }

    fn create_tables(&self) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        transaction.open_table(JOBS)?;
        transaction.open_table(WORKERS)?;
        transaction.open_table(TOKENS)?;
        Ok(transaction.commit()?)
    }

    /// All jobs, in order of submission.
    pub fn jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        self.all(JOBS)
    }

    /// All workers, in order of enrolment.
    pub fn workers(&self) -> Result<Vec<WorkerRecord>, StoreError> {
        self.all(WORKERS)
    }

    /// Makes a job's record durable.
    pub fn put_job(&self, record: &JobRecord) -> Result<(), StoreError> {
        self.put(JOBS, record.id.0, record)
    }

    /// Makes a worker's record durable.
    pub fn put_worker(&self, record: &WorkerRecord) -> Result<(), StoreError> {
        self.put(WORKERS, record.id.0, record)
    }

    /// The token called `id`.
    pub fn token(&self, id: &str) -> Result<Option<TokenRecord>, StoreError> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let table = self.database.begin_read()?.open_table(TOKENS)?;
            Ok(table.get(id)?.map(|v| v.value().to_vec()))
        };
        read().map_err(|e| self.failed(e))?.map(|bytes| self.decode(&bytes)).transpose()
    }

    /// Makes a token durable; those that have expired for a day are forgotten.
    pub fn put_token(&self, id: &str, record: &TokenRecord, now_ms: u64) -> Result<(), StoreError> {
        const DAY_MS: u64 = 86_400_000;
        let value = self.encode(record)?;
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut table = transaction.open_table(TOKENS)?;
                table.insert(id, value.as_slice())?;
                table.retain(|_, value| {
                    serde_json::from_slice::<TokenRecord>(value).is_ok_and(|t| t.expires_ms + DAY_MS > now_ms)
                })?;
            }
            Ok(transaction.commit()?)
        };
        write().map_err(|e| self.failed(e))
    }

    fn put(
        &self,
        table: TableDefinition<'_, u64, &[u8]>,
        key: u64,
        record: &impl Serialize,
    ) -> Result<(), StoreError> {
        let value = self.encode(record)?;
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            transaction.open_table(table)?.insert(key, value.as_slice())?;
            Ok(transaction.commit()?)
        };
        write().map_err(|e| self.failed(e))
    }

    fn all<T: DeserializeOwned>(&self, table: TableDefinition<'_, u64, &[u8]>) -> Result<Vec<T>, StoreError> {
        let read = || -> Result<Vec<Vec<u8>>, redb::Error> {
            let table = self.database.begin_read()?.open_table(table)?;
            table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
        };
        let values = read().map_err(|e| self.failed(e))?;
        values.iter().map(|bytes| self.decode(bytes)).collect()
    }

    fn encode(&self, record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(record).map_err(|cause| StoreError::Entry { path: self.path.clone(), cause })
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, StoreError> {
        serde_json::from_slice(bytes).map_err(|cause| StoreError::Entry { path: self.path.clone(), cause })
    }

    fn failed(&self, e: impl std::fmt::Display) -> StoreError {
        StoreError::Failed { path: self.path.clone(), cause: e.to_string() }
    }
}
