//! Whether the gradients of a group travel over NCCL. All ranks decide by themselves, from the same list.

use crate::error::CollectiveError;
use lockstep_common::ids::Rank;
use lockstep_common::job::Backend;
use std::collections::BTreeMap;

/// Where a rank computes.
#[derive(Clone, Copy, Debug)]
pub struct RankDevice<'a> {
    /// Its host's name.
    pub host: &'a str,
    /// `cpu` or `cuda:0`, as its `--device` says.
    pub device: &'a str,
}

/// How the gradients travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// From GPU to GPU.
    Nccl,
    /// Through host memory and the group's own transport, for this reason.
    Host(String),
}

/// Chooses for `ranks`, in order of rank, what the job asks for.
///
/// By itself (`auto`) NCCL is chosen where each rank has a GPU of its own. Two ranks that name the same GPU of the
/// same host share it as far as can be told, and share it over NCCL only when the job says so, which works
/// when their processes have different `NCCL_HOSTID`. Fails with one line where the job wants NCCL and a rank has
/// no GPU.
pub fn choose(backend: Backend, ranks: &[RankDevice<'_>]) -> Result<Choice, CollectiveError> {
    let without = ranks.iter().zip(0..).find(|(rank, _)| !rank.device.starts_with("cuda:"));
    let named = |(rank, number): (&RankDevice<'_>, u32)| format!("{} ({})", Rank(number), rank.host);
    let host = |reason: String| Ok(Choice::Host(reason));
    match (backend, without) {
        (Backend::Nccl, Some(rank)) => Err(CollectiveError::Config(format!(
            "{} has no GPU: backend \"nccl\" needs --device cuda:N on every worker, or use \"auto\"",
            named(rank)
        ))),
        _ if ranks.len() < 2 => host("there is one rank".to_owned()),
        (Backend::Nccl, None) => Ok(Choice::Nccl),
        (Backend::Quic | Backend::Shm, _) => host("the job's `backend` says so".to_owned()),
        (Backend::Auto, Some(rank)) => host(format!("{} has no GPU", named(rank))),
        (Backend::Auto, None) => match shared(ranks) {
            Some((first, second)) => host(format!(
                "{} and {} share {} of {}; backend \"nccl\" uses NCCL all the same",
                Rank(first),
                Rank(second),
                ranks[first as usize].device,
                ranks[first as usize].host
            )),
            None => Ok(Choice::Nccl),
        },
    }
}

/// The first two ranks that name the same GPU.
fn shared(ranks: &[RankDevice<'_>]) -> Option<(u32, u32)> {
    let mut owners = BTreeMap::new();
    ranks.iter().zip(0..).find_map(|(rank, number)| {
        owners.insert((rank.host, rank.device), number).map(|earlier| (earlier, number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The choice for `host/device` of each rank, in words.
    fn chosen(backend: Backend, ranks: &[&str]) -> String {
        let ranks: Vec<_> = ranks
            .iter()
            .map(|rank| rank.split_once('/').unwrap())
            .map(|(host, device)| RankDevice { host, device })
            .collect();
        match choose(backend, &ranks) {
            Ok(Choice::Nccl) => "nccl".to_owned(),
            Ok(Choice::Host(reason)) => format!("host: {reason}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn auto_takes_nccl_where_each_rank_has_a_gpu_of_its_own() {
        let auto = |ranks: &[&str]| chosen(Backend::Auto, ranks);
        assert_eq!(auto(&["a/cuda:0", "a/cuda:1"]), "nccl");
        assert_eq!(auto(&["a/cuda:0", "b/cuda:0"]), "nccl");
        assert_eq!(auto(&["a/cuda:0"]), "host: there is one rank");
        assert_eq!(auto(&["a/cpu", "a/cpu"]), "host: rank 0 (a) has no GPU");
        assert_eq!(auto(&["a/cuda:0", "b/cpu", "c/cuda:0"]), "host: rank 1 (b) has no GPU");
        assert_eq!(
            auto(&["a/cuda:0", "b/cuda:0", "a/cuda:0"]),
            "host: rank 0 and rank 2 share cuda:0 of a; backend \"nccl\" uses NCCL all the same"
        );
        assert_eq!(auto(&["a/cuda:0", "a/"]), "host: rank 1 (a) has no GPU");
    }

    #[test]
    fn the_job_file_decides_where_it_names_a_backend() {
        let gpus = ["a/cuda:0", "a/cuda:0"];
        assert_eq!(chosen(Backend::Nccl, &gpus), "nccl");
        assert_eq!(chosen(Backend::Quic, &gpus), "host: the job's `backend` says so");
        assert_eq!(chosen(Backend::Shm, &gpus), "host: the job's `backend` says so");
    }

    #[test]
    fn nccl_without_a_gpu_is_refused_with_rank_and_host() {
        let refusal = chosen(Backend::Nccl, &["a/cuda:0", "b/cpu"]);
        let expected = "rank 1 (b) has no GPU: backend \"nccl\" needs --device cuda:N";
        assert!(refusal.contains(expected), "{refusal}");
        assert_eq!(refusal.lines().count(), 1);
        assert!(chosen(Backend::Nccl, &["a/cpu"]).contains("rank 0 (a) has no GPU"), "even alone");
    }
}
