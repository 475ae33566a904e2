use super::super::arena::{Arena, Block, PeerArena};
use super::super::segment::Segment;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use std::io::ErrorKind;

const MIB: usize = 1 << 20;

fn arena(bytes: usize, kept: usize) -> Arena {
    Arena::with_bytes(bytes, kept).unwrap()
}

/// Bytes of memory that an arena takes.
fn resident(arena: &Arena) -> usize {
    rustix::fs::fstat(arena.fd()).unwrap().st_blocks as usize * 512
}

fn peer(arena: &Arena) -> PeerArena {
    PeerArena::open(arena.fd().try_clone_to_owned().unwrap(), arena.bytes()).unwrap()
}

#[derive(Clone, Debug)]
enum Act {
    Allocate(usize),
    Free(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let bytes = prop_oneof![0..300usize, 0..200_000usize, Just(100_000), Just(4096)];
    prop_oneof![3 => bytes.prop_map(Act::Allocate), 2 => any::<usize>().prop_map(Act::Free)]
}

/// A block and the byte it is filled with.
type Stamped = (Block, u8);

fn free(blocks: &mut Vec<Stamped>, which: usize) -> Result<(), TestCaseError> {
    if !blocks.is_empty() {
        let (block, stamp) = blocks.swap_remove(which % blocks.len());
        prop_assert!(block.bytes().iter().all(|&byte| byte == stamp), "a block was overwritten");
    }
    Ok(())
}

proptest! {
    #[test]
    fn blocks_are_aligned_apart_and_all_come_back(
        acts in prop::collection::vec(act(), 1..120), kept in prop_oneof![Just(0), Just(300_000), Just(2 * MIB)],
    ) {
        let arena = arena(2 * MIB, kept);
        let mut blocks: Vec<Stamped> = Vec::new();
        for (number, act) in acts.into_iter().enumerate() {
            match act {
                Act::Allocate(bytes) => {
                    let taken: usize = blocks.iter().map(|(block, _)| block.len() + 4096).sum();
                    let Some(mut block) = arena.allocate(bytes) else {
                        prop_assert!(taken + blocks.len() * bytes + 2 * bytes > MIB, "refused with half free");
                        continue;
                    };
                    let (start, end) = (block.offset(), block.offset() + bytes as u64);
                    let align = if bytes > 65_536 { 4096 } else { 64 };
                    prop_assert!(start.is_multiple_of(align));
                    prop_assert!(end <= arena.bytes());
                    prop_assert_eq!(block.len(), bytes);
                    for (other, _) in &blocks {
                        let other = other.offset()..other.offset() + other.len() as u64;
                        prop_assert!(end <= other.start || other.end <= start, "two blocks overlap");
                    }
                    block.bytes_mut().fill(number as u8);
                    blocks.push((block, number as u8));
                }
                Act::Free(which) => free(&mut blocks, which)?,
            }
        }
        while !blocks.is_empty() {
            free(&mut blocks, 0)?;
        }
        prop_assert!(arena.allocate(2 * MIB).is_some(), "the space did not come together again");
    }
}

#[test]
fn the_same_size_gets_the_same_warm_block_again() {
    let arena = arena(64 * MIB, 16 * MIB);
    let blocks: Vec<Block> = [MIB, 3 * MIB, MIB].map(|bytes| arena.allocate(bytes).unwrap()).into();
    let offsets: Vec<u64> = blocks.iter().map(Block::offset).collect();
    drop(blocks);
    let mut again = [MIB, 3 * MIB, MIB].map(|bytes| arena.allocate(bytes).unwrap().offset());
    assert_eq!(again, [offsets[2], offsets[1], offsets[2]]);
    let held = [(); 3].map(|()| arena.allocate(MIB).unwrap());
    again = [0, 1, 2].map(|i| held[i].offset());
    assert_eq!(again[..2], [offsets[2], offsets[0]]);
    assert!(!offsets.contains(&again[2]));
}

#[test]
fn freed_memory_above_the_bound_goes_back_to_the_kernel() {
    let arena = arena(64 * MIB, 4 * MIB);
    let mut blocks: Vec<Block> = (0..8).map(|_| arena.allocate(MIB).unwrap()).collect();
    blocks.iter_mut().for_each(|block| block.bytes_mut().fill(1));
    assert_eq!(resident(&arena), 8 * MIB);
    drop(blocks);
    assert_eq!(resident(&arena), 4 * MIB);
}

#[test]
fn memory_ends_with_its_last_user() {
    let arena = arena(MIB, 0);
    let mut block = arena.allocate(100).unwrap();
    drop(arena);
    block.bytes_mut().fill(1);
}

#[test]
fn peers_read_and_write_blocks_in_place() {
    let arena = arena(MIB, 0);
    let _first = arena.allocate(100).unwrap();
    let mut block = arena.allocate(1000).unwrap();
    block.bytes_mut().fill(7);
    let peer = peer(&arena);
    // SAFETY: nobody writes while these are read or the other way round: it is one thread.
    unsafe {
        assert_eq!(peer.read(block.offset(), 1000), Some(&[7; 1000][..]));
        peer.write(block.offset() + 10, 10).unwrap().write_bytes(8, 10);
    }
    assert_eq!(block.bytes()[9..21], [7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7]);
}

#[test]
fn offsets_outside_a_peers_arena_are_refused() {
    let arena = arena(MIB, 0);
    let peer = peer(&arena);
    let end = MIB as u64;
    for (offset, len, within) in [
        (0, MIB, true),
        (end, 0, true),
        (end - 1, 1, true),
        (0, MIB + 1, false),
        (end - 1, 2, false),
        (end + 1, 0, false),
        (u64::MAX, 1, false),
        (u64::MAX, usize::MAX, false),
        (1, usize::MAX, false),
    ] {
        // SAFETY: nobody writes at all.
        assert_eq!(unsafe { peer.read(offset, len) }.is_some(), within, "{offset} {len}");
        assert_eq!(peer.write(offset, len).is_some(), within, "{offset} {len}");
    }
}

#[test]
fn an_arena_is_large_and_takes_no_memory_before_it_is_used() {
    let arena = Arena::create().unwrap();
    assert_eq!(arena.bytes(), 64 << 30);
    assert_eq!(resident(&arena), 0);
    let _peer = peer(&arena);
    assert!(arena.allocate((64 << 30) + 1).is_none());
    assert!(arena.allocate(usize::MAX).is_none());
}

#[test]
fn what_could_crash_this_process_is_not_mapped() {
    let sealed = |seals| {
        let fd = rustix::fs::memfd_create("lockstep-test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    };
    let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    assert!(Segment::open(sealed(all), 4096).is_ok());
    let cases = [
        (sealed(SealFlags::GROW | SealFlags::SEAL), 4096, "can still change its size"),
        (sealed(SealFlags::SHRINK), 4096, "can still change its size"),
        (sealed(all), 8192, "has 4096 bytes instead of 8192"),
        (sealed(all), 0, "has 4096 bytes instead of 0"),
        (tempfile::tempfile().unwrap().into(), 4096, "is not a memory file"),
        (std::fs::File::open("/dev/null").unwrap().into(), 4096, "is not a memory file"),
    ];
    for (fd, bytes, what) in cases {
        let refusal = Segment::open(fd, bytes).unwrap_err();
        assert_eq!(refusal.kind(), ErrorKind::InvalidData);
        assert!(refusal.to_string().contains(what), "{refusal}");
    }
}
