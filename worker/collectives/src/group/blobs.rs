//! Collectives that move plain bytes.

use super::{BROADCAST, GATHER, GATHER_TO, Group, fail_slot};
use crate::error::CollectiveError;
use crate::gather::{Expect, Gather};
use crate::pending::{Pending, Slot};
use crate::tag::Tag;
use bytes::Bytes;
use lockstep_common::ids::Rank;
use std::sync::Arc;

impl Group {
    /// Brings every rank's bytes to every rank, in order of rank. They may differ in length, up to 64 MiB; for
    /// [`TagKind::State`](crate::TagKind::State) up to 64 GiB.
    pub fn all_gather(&self, tag: Tag, bytes: Vec<u8>) -> Result<Pending<Vec<Bytes>>, CollectiveError> {
        let expect = vec![Expect::Any; self.world_size() as usize];
        self.gather(tag, GATHER, Some(bytes.into()), expect, |blobs| blobs)
    }

    /// Brings every rank's bytes to `root`, in order of rank, within the limits of [`all_gather`](Self::all_gather). The
    /// other ranks get nothing, and need not wait.
    pub fn gather_to(
        &self,
        tag: Tag,
        root: Rank,
        bytes: Vec<u8>,
    ) -> Result<Pending<Vec<Bytes>>, CollectiveError> {
        self.check_root(tag, root)?;
        let mine = self.check_blob(tag, Some(bytes.into()))?;
        let expect = if self.rank() == root { Expect::Any } else { Expect::Nothing };
        let expect = vec![expect; self.world_size() as usize];
        let (slot, me) = (Slot::new(), self.rank());
        let result = slot.clone();
        let finish = Box::new(move |blobs| result.set(Ok(if me == root { blobs } else { vec![] })));
        let gather = Gather::new(tag, GATHER_TO, me, mine, expect, finish, fail_slot(&slot)).only_to(root);
        self.engine.start(tag, Arc::new(gather))?;
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }

    fn check_root(&self, tag: Tag, root: Rank) -> Result<(), CollectiveError> {
        if root.0 < self.world_size() {
            return Ok(());
        }
        let detail = format!("the root is {root} in a group of {}", self.world_size());
        Err(CollectiveError::Misuse { tag, detail })
    }

    fn check_blob(&self, tag: Tag, mine: Option<Bytes>) -> Result<Option<Bytes>, CollectiveError> {
        let (bytes, most) = (mine.as_ref().map_or(0, Bytes::len), tag.kind.most_blob_bytes());
        if bytes as u64 <= most {
            return Ok(mine);
        }
        let detail = format!("{bytes} bytes, more than the {most} that others take for it");
        Err(CollectiveError::Misuse { tag, detail })
    }

    /// Brings the bytes of `root` to every rank. Only the root gives `bytes`.
    pub fn broadcast(
        &self,
        tag: Tag,
        root: Rank,
        bytes: Option<Vec<u8>>,
    ) -> Result<Pending<Bytes>, CollectiveError> {
        self.check_root(tag, root)?;
        if bytes.is_some() != (root == self.rank()) {
            let detail = format!("the root, {root}, gives the bytes and no other rank does");
            return Err(CollectiveError::Misuse { tag, detail });
        }
        let mut expect = vec![Expect::Nothing; self.world_size() as usize];
        expect[root.index()] = Expect::Any;
        let pick = move |mut blobs: Vec<Bytes>| blobs.swap_remove(root.index());
        self.gather(tag, BROADCAST, bytes.map(Bytes::from), expect, pick)
    }

    fn gather<R: Send + Sync + 'static>(
        &self,
        tag: Tag,
        signature: u8,
        mine: Option<Bytes>,
        expect: Vec<Expect>,
        finish: impl FnOnce(Vec<Bytes>) -> R + Send + 'static,
    ) -> Result<Pending<R>, CollectiveError> {
        let mine = self.check_blob(tag, mine)?;
        let slot = Slot::new();
        let result = slot.clone();
        let finish = Box::new(move |blobs| result.set(Ok(finish(blobs))));
        let gather = Gather::new(tag, signature, self.rank(), mine, expect, finish, fail_slot(&slot));
        self.engine.start(tag, Arc::new(gather))?;
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }
}
