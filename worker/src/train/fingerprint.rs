//! A short digest of a replica's state, for comparing replicas with each other.

use lockstep_nn::optim::Checksums;

/// The first bytes of the BLAKE3 of the checksums of all tensors.
pub(crate) type Fingerprint = [u8; 16];

/// Takes a fingerprint.
pub(crate) struct Fingerprinter(blake3::Hasher);

impl Fingerprinter {
    pub(crate) fn new() -> Self {
        Self(blake3::Hasher::new())
    }

    /// Adds tensors, in name order.
    pub(crate) fn add(&mut self, checksums: &Checksums) {
        let bytes: Vec<u8> = checksums.values().flat_map(|checksum| checksum.to_bytes()).collect();
        self.0.update(&bytes);
    }

    /// Adds a counter.
    pub(crate) fn add_number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    pub(crate) fn finish(self) -> Fingerprint {
        let mut fingerprint = Fingerprint::default();
        self.0.finalize_xof().fill(&mut fingerprint);
        fingerprint
    }
}
