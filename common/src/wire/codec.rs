//! The only module that knows bincode: framing, size caps, the protocol version.
//!
//! Every stream opens with eight bytes, `LKST` and a little-endian version, in both directions. They never
//! change their layout, so that programs of different versions can at least tell each other so. Frames follow: a
//! little-endian u32 length, then that many bytes of bincode.

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The version of all messages. Any change of a message's layout raises it.
pub const PROTOCOL: u32 = 1;

const MAGIC: [u8; 4] = *b"LKST";

/// The largest frame. Bulk data (dataset shards, checkpoints, gradients) travels outside frames, so that the
/// largest message is an assignment: a job file (capped at 1 MiB) and some addresses per rank.
pub const MAX_FRAME_BYTES: usize = 4 << 20;

/// Why a frame could not be read or written.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The stream ended or broke.
    #[error("the connection was lost: {0}")]
    Io(#[from] std::io::Error),
    /// The stream ended cleanly between two frames.
    #[error("the peer closed the stream")]
    Closed,
    /// The peer does not speak this protocol at all.
    #[error("the peer is not a Lockstep process: it opened with {0:02x?}")]
    NotLockstep([u8; 4]),
    /// The peer is of another release.
    #[error(
        "the peer speaks protocol {theirs}, this program speaks {PROTOCOL}; run the same release of Lockstep on both"
    )]
    Version {
        /// The peer's version.
        theirs: u32,
    },
    /// A frame announces more than is allowed.
    #[error("a message of {bytes} bytes exceeds the limit of {MAX_FRAME_BYTES}")]
    TooLarge {
        /// The announced length.
        bytes: usize,
    },
    /// The bytes are not a message.
    #[error("malformed message: {0}")]
    Malformed(String),
}

fn config() -> impl bincode::config::Config {
    // The limit also bounds what a length inside the message can make the decoder allocate.
    bincode::config::standard().with_limit::<MAX_FRAME_BYTES>()
}

/// The bytes of one message, without the length.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let bytes =
        bincode::serde::encode_to_vec(message, config()).map_err(|e| FrameError::Malformed(e.to_string()))?;
    if bytes.len() > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge { bytes: bytes.len() });
    }
    Ok(bytes)
}

/// The message in `bytes`, all of which must be used up.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FrameError> {
    if bytes.len() > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge { bytes: bytes.len() });
    }
    let (message, used) = bincode::serde::decode_from_slice(bytes, config())
        .map_err(|e| FrameError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(FrameError::Malformed(format!("{} bytes after the message", bytes.len() - used)));
    }
    Ok(message)
}

/// Opens a stream: says who we are.
pub async fn write_preamble(w: &mut (impl AsyncWrite + Unpin)) -> Result<(), FrameError> {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..].copy_from_slice(&PROTOCOL.to_le_bytes());
    w.write_all(&bytes).await?;
    Ok(())
}

/// Hears who the peer is; refuses another program or another version.
pub async fn read_preamble(r: &mut (impl AsyncRead + Unpin)) -> Result<(), FrameError> {
    let mut magic = [0; 4];
    r.read_exact(&mut magic).await?;
    if magic != MAGIC {
        return Err(FrameError::NotLockstep(magic));
    }
    let theirs = r.read_u32_le().await?;
    if theirs != PROTOCOL {
        return Err(FrameError::Version { theirs });
    }
    Ok(())
}

/// Writes one message.
pub async fn write_frame<T: Serialize>(
    w: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), FrameError> {
    let body = encode(message)?;
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    w.write_all(&frame).await?;
    Ok(())
}

/// Reads one message. Memory grows with what has arrived, not with what was announced.
pub async fn read_frame<T: DeserializeOwned>(r: &mut (impl AsyncRead + Unpin)) -> Result<T, FrameError> {
    let mut head = [0; 4];
    let mut filled = 0;
    while filled < 4 {
        match r.read(&mut head[filled..]).await? {
            0 if filled == 0 => return Err(FrameError::Closed),
            0 => return Err(FrameError::Io(std::io::ErrorKind::UnexpectedEof.into())),
            n => filled += n,
        }
    }
    let bytes = u32::from_le_bytes(head) as usize;
    if bytes > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge { bytes });
    }
    let mut body = Vec::with_capacity(bytes.min(64 << 10));
    let read = r.take(bytes as u64).read_to_end(&mut body).await?;
    if read < bytes {
        return Err(FrameError::Io(std::io::ErrorKind::UnexpectedEof.into()));
    }
    decode(&body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{FromWorker, Request, Response, ToWorker};
    use proptest::prelude::*;

    fn block_on<F: Future>(f: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(f)
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Response>(&bytes);
            let _ = decode::<ToWorker>(&bytes);
            let _ = decode::<FromWorker>(&bytes);
            let _ = block_on(read_frame::<Request>(&mut bytes.as_slice()));
            let _ = block_on(read_preamble(&mut bytes.as_slice()));
        }

        #[test]
        fn messages_survive_the_wire(name in ".*", seed in any::<u64>(), follow in any::<bool>()) {
            let message = Request::Logs { job: crate::ids::JobId(seed), follow, from: seed };
            let other = Request::Manifest { dataset: name };
            for m in [message, other] {
                let mut bytes = Vec::new();
                block_on(write_frame(&mut bytes, &m)).unwrap();
                prop_assert_eq!(&block_on(read_frame::<Request>(&mut bytes.as_slice())).unwrap(), &m);
                for cut in 0..bytes.len() {
                    prop_assert!(block_on(read_frame::<Request>(&mut &bytes[..cut])).is_err());
                }
                let mut longer = encode(&m).unwrap();
                longer.push(0);
                prop_assert!(decode::<Request>(&longer).is_err());
            }
        }
    }

    #[test]
    fn another_protocol_version_is_told_so() {
        let mut bytes = b"LKST".to_vec();
        bytes.extend_from_slice(&(PROTOCOL + 1).to_le_bytes());
        let e = block_on(read_preamble(&mut bytes.as_slice())).unwrap_err().to_string();
        assert!(e.contains(&format!("speaks protocol {}", PROTOCOL + 1)), "{e}");
        let e = block_on(read_preamble(&mut &b"GET / HTTP/1.1\r\n"[..])).unwrap_err();
        assert!(matches!(e, FrameError::NotLockstep(_)), "{e}");
    }

    #[test]
    fn announced_lengths_are_capped_before_anything_is_allocated() {
        let bytes = u32::MAX.to_le_bytes();
        let e = block_on(read_frame::<Request>(&mut bytes.as_slice())).unwrap_err();
        assert!(matches!(e, FrameError::TooLarge { .. }), "{e}");
    }
}
