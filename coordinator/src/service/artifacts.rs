//! Files for people to look at, such as sample grids.

use super::checkpoints::{must_be_current, read_exactly};
use super::refuse;
use super::requests::{Call, Stop};
use super::shards::blocking;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{FileHead, Response};

/// A picture or a table, not a dataset.
const MAX_ARTIFACT_BYTES: u64 = 64 << 20;

/// Takes a file from a worker of the job's present generation.
pub(super) async fn put(
    call: &mut Call,
    worker: WorkerId,
    job: JobId,
    generation: Generation,
    file: FileHead,
) -> Result<(), Stop> {
    must_be_current(&call.shared, worker, job, generation).await?;
    if !is_plain(&file.name) {
        let message = "the name of an artifact may have letters, digits, `.`, `_` and `-`, 100 at most";
        return Err(refuse("file_name", message).into());
    }
    if file.bytes > MAX_ARTIFACT_BYTES {
        let message =
            format!("artifact `{}` has {} bytes, the limit is {MAX_ARTIFACT_BYTES}", file.name, file.bytes);
        return Err(refuse("too_large", message).into());
    }
    let bytes = read_exactly(call, file.bytes).await?;
    let dir = call.shared.dir.job(job);
    let path =
        blocking(move || dir.write_artifact(&file.name, &bytes)).await?.map_err(|e| refuse("artifact", e))?;
    call.shared.hub.post(move |hub| hub.log(job, &format!("wrote {}", path.display())));
    call.answer(&Response::Done).await?;
    Ok(())
}

fn is_plain(name: &str) -> bool {
    (1..=100).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::is_plain;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        assert!(is_plain("samples-0001.png"));
        for name in ["", "..", ".hidden", "a/b", "../x", "/etc/passwd", "a\0b", "a b", &"x".repeat(101)] {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}
