//! A rank that is behind gets the state from those that hold it, before the group connects.

use super::fetch::{FetchError, chunks, states};
use super::pack::unpack;
use crate::fault::{self, Point};
use crate::kept::State;
use crate::ledger::Ledger;
use crate::mesh::Mesh;
use crate::tasks::TaskPlan;
use crate::train::error::TrainError;
use crate::train::replica::Replica;
use lockstep_common::ids::Rank;
use lockstep_common::wire::{Assignment, Peer, Position};
use std::sync::Arc;

/// Makes `replica`, which has the job's networks in whatever state, that of `position`, which the ranks in `sources` hold.
/// Returns it, and what was wrong with sources that could be done without.
pub(crate) async fn heal(
    mesh: &Mesh,
    assignment: &Assignment,
    position: Position,
    sources: &[Rank],
    plan: &TaskPlan,
    mut replica: Replica,
) -> Result<(State, Vec<String>), TrainError> {
    let about = (assignment.job, assignment.generation);
    let visit = Arc::new(mesh.visit(about, assignment.rank));
    let peers: Vec<Peer> = assignment.peers.iter().filter(|p| sources.contains(&p.rank)).cloned().collect();
    let found = states(visit, peers).await?;
    let Some((first, manifest, _)) = found.first() else {
        return Err(TrainError::Unavailable { what: "nobody holds the state".to_owned(), culprit: None });
    };
    let problem = match manifest.problem(assignment.job, &replica, plan)? {
        None if manifest.position != position => {
            Some(format!("is at {} instead of {position}", manifest.position))
        }
        problem => problem,
    };
    if let Some(problem) = problem {
        let what = format!("the state of {} {problem}", first.name);
        return Err(TrainError::Unavailable { what, culprit: Some(first.rank) });
    }
    let (manifest, id) = (Arc::new(manifest.clone()), manifest.id()?);
    let ledger = found.iter().find_map(|(_, _, ledger)| Ledger::from_bytes(ledger)).unwrap_or_default();
    let sources: Vec<_> = found.into_iter().map(|(source, ..)| source).collect();
    fault::point(Point::Heal, position.step);
    let fetched = chunks(&sources, &manifest, id).await?;
    unpack(&manifest, &fetched.bytes, &mut replica, plan)?;
    for source in sources {
        source.connection.close(0u32.into(), b"done");
    }
    Ok((State { replica, ledger: ledger.of_a_newcomer() }, fetched.complaints))
}

impl From<FetchError> for TrainError {
    fn from(FetchError { what, culprit, differ }: FetchError) -> Self {
        match differ {
            true => Self::Differ { what, culprit },
            false => Self::Unavailable { what, culprit },
        }
    }
}
