//! A checkpoint in parts: every rank sends some of the tensors, and they become the files that one rank would have sent.
//!
//! So nothing about a checkpoint on a disk tells how many ranks wrote it.

use super::tensors::{TensorsError, decode_tensors, encode_tensors};

/// Which of so many `ranks` sends each tensor, given the tensors' sizes in name order: the largest first, each to the rank
/// that has the least to send.
///
/// Every rank works it out by itself, and all come to the same.
pub fn senders(sizes: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&tensor| std::cmp::Reverse(sizes[tensor]));
    let mut loads = vec![0; ranks.max(1)];
    let mut senders = vec![0; sizes.len()];
    for tensor in order {
        let rank = (0..loads.len()).min_by_key(|&rank| loads[rank]).unwrap_or_default();
        loads[rank] += sizes[tensor];
        senders[tensor] = rank;
    }
    senders
}

/// The file whose tensors are spread over these `parts`, each a safetensors file.
pub fn join(parts: &[&[u8]]) -> Result<Vec<u8>, TensorsError> {
    let decoded = parts.iter().map(|part| decode_tensors(part)).collect::<Result<Vec<_>, _>>()?;
    if let [whole] = parts {
        return Ok(whole.to_vec());
    }
    encode_tensors(decoded.into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::TensorBytes;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_tensor_has_one_sender_and_none_sends_much_more_than_its_share(
            sizes in proptest::collection::vec(0usize..1000, 0..40), ranks in 1usize..9,
        ) {
            let senders = senders(&sizes, ranks);
            prop_assert_eq!(senders.len(), sizes.len());
            let load = |rank| senders.iter().zip(&sizes).filter(|(s, _)| **s == rank).map(|(_, b)| b).sum::<usize>();
            let largest = sizes.iter().max().copied().unwrap_or(0);
            let share = sizes.iter().sum::<usize>() / ranks;
            prop_assert!((0..ranks).all(|rank| load(rank) <= share + largest), "{:?}", sizes);
        }
    }

    fn tensors(count: usize) -> Vec<TensorBytes<'static>> {
        let tensor = |i: usize| TensorBytes {
            name: format!("layer{i}.weight").into(),
            // Files lay tensors out by type first.
            dtype: if i.is_multiple_of(3) { "I64" } else { "F32" }.into(),
            shape: vec![i + 1, if i.is_multiple_of(3) { 1 } else { 2 }].into(),
            bytes: vec![i as u8; (i + 1) * 8].into(),
        };
        (0..count).map(tensor).collect()
    }

    #[test]
    fn parts_of_any_number_of_ranks_become_the_file_that_one_would_have_sent() {
        let all = tensors(12);
        let whole = encode_tensors(all.clone()).unwrap();
        let sizes: Vec<_> = all.iter().map(|t| t.bytes.len()).collect();
        for ranks in 1..15 {
            let senders = senders(&sizes, ranks);
            let part = |rank| {
                let own = all.iter().zip(&senders).filter(|(_, s)| **s == rank).map(|(t, _)| t.clone());
                encode_tensors(own).unwrap()
            };
            let parts: Vec<_> = (0..ranks).map(part).collect();
            let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
            assert_eq!(join(&parts).unwrap(), whole, "{ranks} ranks");
        }
    }

    #[test]
    fn a_tensor_that_two_ranks_send_and_bytes_that_are_no_tensors_are_refused() {
        let part = encode_tensors(tensors(2)).unwrap();
        assert!(matches!(join(&[&part, &part]), Err(TensorsError::Duplicate(_))));
        assert!(join(&[&part, &part[1..]]).is_err());
    }
}
