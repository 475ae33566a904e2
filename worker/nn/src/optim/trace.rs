//! What an update has found and what it has left, as checksums.

use super::pass::Changes;
use crate::checksum::Checksum;
use crate::error::NnError;
use std::borrow::Borrow;
use std::collections::BTreeMap;
use tch::Tensor;

/// Checksums by name.
pub type Checksums = BTreeMap<String, Checksum>;

/// The checksums that come with an update of one network, of all that it has touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The optimizer's state as the update found it, by the names of [`Optimizer::state`](super::Optimizer::state).
    pub state_before: Checksums,
    /// That state as the update left it.
    pub state_after: Checksums,
    /// The parameters as the update found them.
    pub parameters_before: Checksums,
    /// The parameters as the update left them.
    pub parameters_after: Checksums,
}

impl Trace {
    /// That of an update of the parameters `names`, whose state has the parts `state`. Empty if there are no changes, because
    /// nobody traced them.
    pub(super) fn of<const N: usize>(names: &[&str], state: [&str; N], changes: &[Changes<N>]) -> Self {
        let mut trace = Self::default();
        for (name, changes) in names.iter().zip(changes) {
            trace.parameters_before.insert((*name).to_owned(), changes.changed.before);
            trace.parameters_after.insert((*name).to_owned(), changes.changed.after);
            for (part, change) in state.iter().zip(&changes.state) {
                trace.state_before.insert(format!("{part}.{name}"), change.before);
                trace.state_after.insert(format!("{part}.{name}"), change.after);
            }
        }
        trace
    }
}

/// The checksums of `tensors`.
///
/// # Errors
///
/// Those of [`Checksum::of_tensor`].
pub fn checksums<N: Into<String>, T: Borrow<Tensor>>(
    tensors: impl IntoIterator<Item = (N, T)>,
) -> Result<Checksums, NnError> {
    let checksum = |(name, tensor): (N, T)| Ok((name.into(), Checksum::of_tensor(tensor.borrow())?));
    tensors.into_iter().map(checksum).collect()
}
