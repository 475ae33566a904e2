//! How an exact reduction is cut, so that its scratch memory stays bounded.
//!
//! A vector is reduced in pieces. Of each piece every rank adds one part: it receives all ranks' nodes for it, one
//! after the other in the scratch memory, and sends the sums to the others.

use std::ops::Range;

/// Parts begin at multiples of this many elements where they are long enough: NCCL moves aligned data faster.
const ALIGNMENT: usize = 128;

/// The cut of one vector.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    len: usize,
    ranks: usize,
    /// The most elements that one rank adds of one piece.
    part: usize,
}

impl Pieces {
    /// The cut of `len` elements among `ranks` ranks that have `nodes` nodes together, with `scratch` elements of
    /// scratch memory on each; `None` if that is too little for one element.
    pub(super) fn new(len: usize, ranks: usize, nodes: usize, scratch: usize) -> Option<Self> {
        let most = scratch / nodes.max(1);
        let wanted = len.div_ceil(ranks.max(1)).next_multiple_of(ALIGNMENT);
        let part = match wanted.min(most) {
            part if part >= ALIGNMENT => part / ALIGNMENT * ALIGNMENT,
            part => part,
        };
        (part > 0).then_some(Self { len, ranks, part })
    }

    /// The pieces in order. Each is cut into one part per rank, in order of rank; the last ones may be empty.
    pub(super) fn parts(self) -> impl Iterator<Item = Vec<Range<usize>>> {
        (0..self.len).step_by(self.part * self.ranks).map(move |start| {
            let at = |rank: usize| (start + rank * self.part).min(self.len);
            (0..self.ranks).map(|rank| at(rank)..at(rank + 1)).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every element is added by just one rank, in order, within the scratch memory.
        #[test]
        fn parts_cover_the_vector_once_within_the_scratch_memory(
            len in 0usize..20_000,
            ranks in 1usize..9,
            more in 0usize..9,
            scratch in 1usize..30_000,
        ) {
            let nodes = ranks + more;
            let Some(pieces) = Pieces::new(len, ranks, nodes, scratch) else {
                prop_assert!(scratch < nodes || len == 0);
                return Ok(());
            };
            let mut next = 0;
            for piece in pieces.parts() {
                prop_assert_eq!(piece.len(), ranks);
                for part in piece {
                    prop_assert_eq!(part.start, next);
                    prop_assert!(part.len() * nodes <= scratch);
                    next = part.end;
                }
            }
            prop_assert_eq!(next, len);
        }
    }

    #[test]
    fn parts_are_even_and_aligned() {
        let pieces: Vec<_> = Pieces::new(1000, 2, 3, 3 * 300).unwrap().parts().collect();
        assert_eq!(pieces, [[0..256, 256..512], [512..768, 768..1000]]);
        let pieces: Vec<_> = Pieces::new(5, 4, 4, 4).unwrap().parts().collect();
        assert_eq!(pieces, [[0..1, 1..2, 2..3, 3..4], [4..5, 5..5, 5..5, 5..5]]);
    }
}
