use super::super::doorbell::{Doorbell, Sleeper};
use super::super::segment::Segment;
use super::{Random, sleep_until};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

#[test]
fn no_wake_up_is_lost_in_100_000_rounds() {
    const ROUNDS: u64 = 100_000;
    let bells = [Doorbell::create().unwrap(), Doorbell::create().unwrap()];
    let turn = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for me in 0..2 {
            let (bells, turn) = (&bells, &turn);
            scope.spawn(move || {
                let mut random = Random(me);
                for round in 0..ROUNDS {
                    let mine = 2 * round + me;
                    // The partner's ring meets every point between polling and deep sleep.
                    for _ in 0..random.below(200) {
                        std::hint::spin_loop();
                    }
                    sleep_until(&bells[me as usize], || turn.load(Ordering::Acquire) == mine);
                    turn.store(mine + 1, Ordering::Release);
                    bells[1 - me as usize].ring();
                }
            });
        }
    });
    assert_eq!(turn.into_inner(), 2 * ROUNDS);
}

#[test]
fn two_ringers_at_once_lose_no_wake_up() {
    const EACH: u64 = 50_000;
    let bell = Doorbell::create().unwrap();
    let published = [AtomicU64::new(0), AtomicU64::new(0)];
    let taken = [AtomicU64::new(0), AtomicU64::new(0)];
    let backs = [Doorbell::create().unwrap(), Doorbell::create().unwrap()];
    std::thread::scope(|scope| {
        for me in 0..2 {
            let (bell, published, taken, backs) = (&bell, &published, &taken, &backs);
            scope.spawn(move || {
                for count in 1..=EACH {
                    published[me].store(count, Ordering::Release);
                    bell.ring();
                    sleep_until(&backs[me], || taken[me].load(Ordering::Acquire) == count);
                }
            });
        }
        let mut seen = [0; 2];
        while seen != [EACH; 2] {
            let news = |seen: &[u64; 2]| (0..2).find(|&i| published[i].load(Ordering::Acquire) != seen[i]);
            sleep_until(&bell, || news(&seen).is_some());
            while let Some(i) = news(&seen) {
                seen[i] += 1;
                taken[i].store(seen[i], Ordering::Release);
                backs[i].ring();
            }
        }
    });
}

/// Waits until a thread of this process sleeps in the kernel.
fn wait_until_asleep(thread: i32) {
    let path = format!("/proc/self/task/{thread}/stat");
    let asleep = || std::fs::read_to_string(&path).unwrap().rsplit(')').next().unwrap().starts_with(" S");
    let start = Instant::now();
    while !asleep() {
        std::thread::yield_now();
        assert!(start.elapsed() < super::PATIENCE, "the thread does not sleep");
    }
}

#[test]
fn a_ring_wakes_whom_the_word_names() {
    let bell = Doorbell::create().unwrap();
    let woken = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let sleeper = |who| {
            let (send, receive) = channel();
            let (bell, woken) = (&bell, &woken);
            let thread = scope.spawn(move || {
                bell.arm(who);
                send.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
                bell.sleep(who, None);
                woken.fetch_add(1, Ordering::Relaxed)
            });
            wait_until_asleep(receive.recv().unwrap());
            thread
        };
        let background = sleeper(Sleeper::Background);
        let waiter = sleeper(Sleeper::Waiter);
        bell.ring();
        // The kernel wakes in the order of sleeping: without bits the background thread would be first.
        assert_eq!(waiter.join().unwrap(), 0);
        bell.ring();
        assert_eq!(woken.load(Ordering::Relaxed), 1, "nobody is named after the first ring");
        bell.arm(Sleeper::Background);
        bell.ring();
        assert_eq!(background.join().unwrap(), 1);
    });
}

#[test]
fn a_sleep_ends_after_its_timeout_and_at_once_when_the_bell_has_rung() {
    let bell = Doorbell::create().unwrap();
    let span = Duration::from_millis(20);
    bell.arm(Sleeper::Waiter);
    let start = Instant::now();
    bell.sleep(Sleeper::Waiter, Some(span));
    assert!(start.elapsed() >= span);

    bell.ring();
    // Without the kernel's comparison these would not end.
    bell.sleep(Sleeper::Waiter, None);
    bell.arm(Sleeper::Background);
    bell.sleep(Sleeper::Waiter, None);
}

#[test]
fn nonsense_in_the_word_disturbs_neither_ring_nor_sleep() {
    let bell = Doorbell::create().unwrap();
    let page = Segment::open(bell.fd().try_clone_to_owned().unwrap(), 4096).unwrap();
    // SAFETY: the beginning of a page that stays mapped to the end of the test.
    let word = unsafe { std::sync::atomic::AtomicU32::from_ptr(page.as_ptr().cast()) };
    for nonsense in [3, 4, 0x8000_0000, u32::MAX] {
        word.store(nonsense, Ordering::Relaxed);
        bell.sleep(Sleeper::Waiter, None);
        bell.ring();
        assert_eq!(word.load(Ordering::Relaxed), 0);
    }
}
