//! What a file's first bytes say that it is.

use super::BLOCK_BYTES;
use ::tar::Header;

/// Programs that compress, by the first bytes of what they write: RFC 1952, section 2.3.1; RFC 8878, section 3.1.1; the formats of
/// bzip2 and xz (section 2.1.1.1).
const COMPRESSED: [(&[u8], &str); 4] =
    [(b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz")];

/// Refuses a file that begins with `bytes`, a block of it if it has so many, unless that is how a tar file begins: with the header
/// of a member, whose sum is in it, or with the mark at the end. One of no bytes is left to whoever looks for that mark.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    if let Some((_, program)) = COMPRESSED.iter().find(|(first, _)| bytes.starts_with(first)) {
        return Err(format!("it is compressed with {program}; unpack it first"));
    }
    match bytes.get(..BLOCK_BYTES as usize) {
        None if bytes.is_empty() => Ok(()),
        Some(block) if block.iter().all(|b| *b == 0) || is_header(block) => Ok(()),
        _ => Err("it is not a tar file".to_owned()),
    }
}

/// Whether `block`'s sum is the one that it says, of its bytes with spaces in place of those that say it (POSIX.1-2001, pax).
fn is_header(block: &[u8]) -> bool {
    let header = Header::from_byte_slice(block);
    let field = 148..156;
    let sum = |(at, byte): (usize, &u8)| u32::from(if field.contains(&at) { b' ' } else { *byte });
    header.cksum().is_ok_and(|told| told == block.iter().enumerate().map(sum).sum::<u32>())
}
