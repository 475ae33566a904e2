//! Scenarios of one worker's membership.

use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::placement::Placement;
use lockstep_common::wire::{
    Assignment, Following, FromWorker, Held, LEASE_GRACE_MS, Outcome, Peer, Position, Resumption, Running,
    StopMode, ToWorker,
};
use lockstep_member::{AWAY_PATIENCE_MS, Action, BOUNDARY_PATIENCE_MS, Leave, Member, Refused, Start};

const JOB: JobId = JobId(1);
const OTHER: JobId = JobId(2);

fn job_file(workers: &str) -> String {
    format!(
        "name = \"tiny\"\ntask = \"classify\"\nseed = 1\nsteps = 10\nglobal_batch = 8\nlogical_shards = 4\n\
         [model]\nname = \"nin\"\n[data]\ntrain = \"tiny/train\"\n[optimizer]\nname = \"sgd\"\nlr = 0.1\n\
         [workers]\n{workers}\n"
    )
}

fn peers(count: u32) -> Vec<Peer> {
    let peer = |rank| Peer {
        rank: Rank(rank),
        worker: WorkerId(u64::from(rank) + 1),
        host: "host".to_owned(),
        host_key: None,
        device: "cpu".to_owned(),
        addresses: Vec::new(),
    };
    (0..count).map(peer).collect()
}

fn assignment(job: JobId, generation: u64, world: u32, resume: Resumption) -> Box<Assignment> {
    Box::new(Assignment {
        job,
        generation: Generation(generation),
        rank: Rank(0),
        placement: Placement::even(4, world),
        peers: peers(world),
        file: "tiny.toml".to_owned(),
        toml: job_file("orphan_timeout_s = 60"),
        datasets: Vec::new(),
        resume,
    })
}

fn following(generation: u64) -> Box<Following> {
    Box::new(Following {
        job: JOB,
        generation: Generation(generation),
        file: "tiny.toml".to_owned(),
        toml: job_file(""),
        datasets: Vec::new(),
        sources: peers(2),
    })
}

fn from_peers(step: u64, sources: &[u32]) -> Resumption {
    Resumption::Peers { position: Position::at(step), sources: sources.iter().copied().map(Rank).collect() }
}

fn held(generation: u64, step: u64) -> Held {
    Held { job: JOB, generation: Generation(generation), position: Position::at(step) }
}

fn lost() -> Outcome {
    Outcome::Lost { error: "lost rank 1".to_owned(), culprit: Some(Rank(1)) }
}

fn ended(generation: u64, outcome: Outcome, held: Option<Position>) -> Action {
    Action::Tell(FromWorker::Ended { job: JOB, generation: Generation(generation), outcome, held })
}

/// What comes out, but for questions to the coordinator.
fn actions(member: &mut Member) -> Vec<Action> {
    all_actions(member).into_iter().filter(|action| !matches!(action, Action::Ping { .. })).collect()
}

fn all_actions(member: &mut Member) -> Vec<Action> {
    std::iter::from_fn(|| member.poll_action()).collect()
}

/// Answers the question that the member asks at `now_ms`, where it asks one.
fn answer_at(member: &mut Member, now_ms: u64) {
    member.handle_tick(now_ms);
    assert_eq!(all_actions(member), [Action::Ping { sent_ms: now_ms }]);
    member.handle_word(now_ms, now_ms + 7);
}

/// Starts a generation of two ranks and says what that came to.
fn start(member: &mut Member, generation: u64, resume: Resumption) -> Vec<Action> {
    assert_eq!(member.handle_order(ToWorker::Start(assignment(JOB, generation, 2, resume)), 0), Ok(()));
    actions(member)
}

fn begins(actions: &[Action]) -> Option<(Generation, Start)> {
    actions.iter().find_map(|action| match action {
        Action::Begin { assignment, start } => Some((assignment.generation, *start)),
        _ => None,
    })
}

/// A member whose generation 1 has ended with the state of step 5 kept.
fn with_kept_state() -> Member {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    member.handle_session_ended(JOB, Generation(1), lost(), Some(Position::at(5)), 0);
    assert_eq!(actions(&mut member), [ended(1, lost(), Some(Position::at(5)))]);
    member
}

#[test]
fn what_a_session_leaves_is_where_the_next_generation_goes_on() {
    let mut member = with_kept_state();
    assert_eq!(member.register(), (None, Some(held(1, 5))));
    let actions = start(&mut member, 2, from_peers(5, &[0]));
    assert_eq!(begins(&actions), Some((Generation(2), Start::Kept)));
    assert_eq!(actions.len(), 1, "nothing is dropped: {actions:?}");
    let running = Running { job: JOB, generation: Generation(2), rank: Rank(0), step: 5 };
    assert_eq!(member.register(), (Some(running), None));
    member.handle_committed(JOB, Generation(2), 7);
    assert_eq!(member.register().0, Some(Running { step: 7, ..running }));
}

#[test]
fn a_rank_that_is_no_source_drops_what_it_kept_before_it_fetches() {
    // Its label would be the new generation's, and the state another one's.
    for resume in [from_peers(6, &[1]), Resumption::Fresh, Resumption::Checkpoint { step: 4 }] {
        let mut member = with_kept_state();
        let actions = start(&mut member, 2, resume);
        assert_eq!(actions[0], Action::Drop);
        assert_eq!(begins(&actions), Some((Generation(2), Start::Elsewhere)));
        assert_eq!(member.register().1, None);
    }
}

#[test]
fn a_source_that_keeps_another_position_says_so_and_begins_nothing() {
    let mut member = with_kept_state();
    let actions = start(&mut member, 2, from_peers(6, &[0, 1]));
    let [
        Action::Drop,
        Action::Tell(FromWorker::Ended { outcome: Outcome::Lost { error, culprit }, held, .. }),
    ] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!(
        error,
        "rank 0 was told to go on from its state of step 6 of j1, and keeps the state of step 5"
    );
    assert_eq!((*culprit, *held), (Some(Rank(0)), None));
    assert_eq!(member.register(), (None, None));
}

#[test]
fn orders_of_an_older_generation_are_refused() {
    let mut member = Member::default();
    start(&mut member, 3, Resumption::Fresh);
    let stale =
        |generation| Refused::Stale { job: JOB, generation: Generation(generation), newest: Generation(3) };
    let old = ToWorker::Start(assignment(JOB, 2, 2, Resumption::Fresh));
    assert_eq!(member.handle_order(old, 0), Err(stale(2)));
    let again = ToWorker::Start(assignment(JOB, 3, 2, Resumption::Fresh));
    assert_eq!(member.handle_order(again, 0), Err(Refused::Repeated));
    assert_eq!(member.handle_order(ToWorker::Follow(following(1)), 0), Err(stale(1)));
    let stop = ToWorker::Stop { job: JOB, generation: Generation(2), mode: StopMode::Abort };
    let not_running = Refused::NotRunning { job: JOB, generation: Generation(2) };
    assert_eq!(member.handle_order(stop, 0), Err(not_running));
    assert_eq!(actions(&mut member), []);
    // Also when that generation has ended here, and whatever another job's generations are.
    member.handle_session_ended(JOB, Generation(3), lost(), None, 0);
    actions(&mut member);
    let old = ToWorker::Start(assignment(JOB, 2, 2, Resumption::Fresh));
    assert_eq!(member.handle_order(old, 0), Err(stale(2)));
    let other = ToWorker::Start(assignment(OTHER, 1, 2, Resumption::Fresh));
    assert_eq!(member.handle_order(other, 0), Ok(()));
    assert_eq!(begins(&actions(&mut member)), Some((Generation(1), Start::Elsewhere)));
}

#[test]
fn a_newer_generation_begins_when_the_old_session_has_ended() {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    let told = start(&mut member, 2, from_peers(5, &[0]));
    assert!(matches!(&told[..], [Action::Abort { .. }]), "{told:?}");
    // A third one takes the second one's place, which is told to have ended.
    let told = start(&mut member, 3, from_peers(5, &[0]));
    assert_eq!(told, [ended(2, Outcome::Stopped { step: 0 }, None)], "one abort is enough");
    member.handle_session_ended(JOB, Generation(1), lost(), Some(Position::at(5)), 0);
    let told = actions(&mut member);
    assert_eq!(told[0], ended(1, lost(), Some(Position::at(5))));
    assert_eq!(begins(&told), Some((Generation(3), Start::Kept)));
}

#[test]
fn a_newer_generation_aborts_a_session_that_was_to_end_in_good_order() {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    let stop = ToWorker::Stop { job: JOB, generation: Generation(1), mode: StopMode::Boundary };
    member.handle_order(stop, 0).unwrap();
    actions(&mut member);
    let told = start(&mut member, 2, from_peers(5, &[0]));
    assert!(matches!(&told[..], [Action::Abort { .. }]), "its peers may be gone: {told:?}");
}

#[test]
fn a_generation_that_is_stopped_before_it_began_never_begins() {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    start(&mut member, 2, Resumption::Fresh);
    let stop = ToWorker::Stop { job: JOB, generation: Generation(2), mode: StopMode::Abort };
    member.handle_order(stop, 0).unwrap();
    assert_eq!(actions(&mut member), [ended(2, Outcome::Stopped { step: 0 }, None)]);
    member.handle_session_ended(JOB, Generation(1), lost(), None, 0);
    assert_eq!(actions(&mut member), [ended(1, lost(), None)]);
}

#[test]
fn nothing_is_kept_of_a_job_that_is_over() {
    let finished = Outcome::Finished {
        weights_digest: "d".to_owned(),
        step: 10,
        epoch: 1,
        metrics: std::collections::BTreeMap::new(),
    };
    for outcome in [finished, Outcome::Failed { error: "the loss became NaN".to_owned() }] {
        let mut member = Member::default();
        start(&mut member, 1, Resumption::Fresh);
        member.handle_session_ended(JOB, Generation(1), outcome.clone(), Some(Position::at(10)), 0);
        assert_eq!(actions(&mut member), [Action::Drop, ended(1, outcome, None)]);
    }
    let release = || ToWorker::Release { job: JOB };
    let mut member = with_kept_state();
    member.handle_order(ToWorker::Release { job: OTHER }, 0).unwrap();
    assert_eq!(actions(&mut member), []);
    member.handle_order(release(), 0).unwrap();
    assert_eq!(actions(&mut member), [Action::Drop]);
    // Released in mid-session: what it leaves is dropped at its end.
    start(&mut member, 2, Resumption::Fresh);
    member.handle_order(release(), 0).unwrap();
    member.handle_session_ended(JOB, Generation(2), lost(), Some(Position::at(6)), 0);
    assert_eq!(actions(&mut member), [Action::Drop, ended(2, lost(), None)]);
}

#[test]
fn another_job_takes_the_place_of_what_is_kept() {
    let mut member = with_kept_state();
    member.handle_order(ToWorker::Start(assignment(OTHER, 1, 2, Resumption::Fresh)), 0).unwrap();
    let told = actions(&mut member);
    assert_eq!((&told[0], begins(&told)), (&Action::Drop, Some((Generation(1), Start::Elsewhere))));
}

#[test]
fn a_follower_joins_with_its_copy() {
    let mut member = Member::default();
    member.handle_order(ToWorker::Follow(following(4)), 0).unwrap();
    assert_eq!(actions(&mut member), [Action::Follow(following(4))]);
    assert_eq!(member.handle_order(ToWorker::Follow(following(4)), 0), Err(Refused::Repeated));
    member.handle_followed(JOB, Generation(3), Position::at(1));
    assert_eq!(actions(&mut member), [], "of another generation");
    member.handle_followed(JOB, Generation(4), Position::at(9));
    let ready = Action::Tell(FromWorker::Following {
        job: JOB,
        generation: Generation(4),
        position: Position::at(9),
    });
    assert_eq!(actions(&mut member), std::slice::from_ref(&ready));
    // The coordinator has been away and asks again.
    member.handle_order(ToWorker::Follow(following(4)), 0).unwrap();
    assert_eq!(actions(&mut member), [ready]);
    let told = start(&mut member, 5, from_peers(11, &[1]));
    assert_eq!((told.len(), begins(&told)), (1, Some((Generation(5), Start::Followed))));
}

/// Two generations may come to the same position on two ways, and only one of them goes on.
#[test]
fn a_copy_of_an_older_generation_than_the_last_is_not_joined_with() {
    let mut member = Member::default();
    member.handle_order(ToWorker::Follow(following(4)), 0).unwrap();
    member.handle_followed(JOB, Generation(4), Position::at(9));
    actions(&mut member);
    let told = start(&mut member, 6, from_peers(9, &[1]));
    assert_eq!((&told[0], begins(&told)), (&Action::Unfollow, Some((Generation(6), Start::Elsewhere))));
}

#[test]
fn a_follower_of_a_newer_generation_begins_again_and_of_another_job_stops() {
    let mut member = with_kept_state();
    member.handle_order(ToWorker::Follow(following(4)), 0).unwrap();
    assert_eq!(actions(&mut member), [Action::Drop, Action::Follow(following(4))]);
    member.handle_order(ToWorker::Follow(following(5)), 0).unwrap();
    assert_eq!(actions(&mut member), [Action::Unfollow, Action::Follow(following(5))]);
    member.handle_order(ToWorker::Start(assignment(OTHER, 1, 2, Resumption::Fresh)), 0).unwrap();
    assert_eq!(actions(&mut member)[0], Action::Unfollow);
    assert_eq!(member.handle_order(ToWorker::Follow(following(6)), 0), Err(Refused::Busy));
    // A checkpoint beyond what was followed makes the copy useless.
    let mut member = Member::default();
    member.handle_order(ToWorker::Follow(following(4)), 0).unwrap();
    actions(&mut member);
    let told = start(&mut member, 5, Resumption::Checkpoint { step: 20 });
    assert_eq!((&told[0], begins(&told)), (&Action::Unfollow, Some((Generation(5), Start::Elsewhere))));
}

#[test]
fn a_leaving_worker_waits_for_the_boundary_that_the_coordinator_sets() {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    member.handle_departure(1_000);
    assert_eq!(actions(&mut member), [Action::Tell(FromWorker::Leaving)]);
    let stop = ToWorker::Stop { job: JOB, generation: Generation(1), mode: StopMode::Boundary };
    member.handle_order(stop, 0).unwrap();
    assert_eq!(actions(&mut member), [Action::Stop { mode: StopMode::Boundary }]);
    assert_eq!(member.poll_timeout(), None, "a step may take its time");
    let outcome = Outcome::Stopped { step: 7 };
    member.handle_session_ended(JOB, Generation(1), outcome.clone(), Some(Position::at(7)), 2_000);
    // Its copy leaves with it.
    assert_eq!(actions(&mut member), [Action::Drop, ended(1, outcome, None), Action::Leave(Leave::Done)]);
    assert!(member.has_left());
}

#[test]
fn a_leaving_worker_decides_by_itself_when_nobody_can_be_asked() {
    for (world, mode) in [(2, StopMode::Boundary), (1, StopMode::Checkpoint)] {
        let mut member = Member::default();
        member.handle_order(ToWorker::Start(assignment(JOB, 1, world, Resumption::Fresh)), 0).unwrap();
        actions(&mut member);
        // The coordinator is there, and says nothing.
        member.handle_departure(1_000);
        actions(&mut member);
        assert_eq!(member.poll_timeout(), Some(1_000 + BOUNDARY_PATIENCE_MS));
        member.handle_tick(999 + BOUNDARY_PATIENCE_MS);
        assert_eq!(actions(&mut member), []);
        member.handle_tick(1_000 + BOUNDARY_PATIENCE_MS);
        assert_eq!(actions(&mut member), [Action::Stop { mode }]);
        // The coordinator goes away before, or after, this worker is asked to leave.
        for away_first in [true, false] {
            let mut member = Member::default();
            member.handle_order(ToWorker::Start(assignment(JOB, 1, world, Resumption::Fresh)), 0).unwrap();
            if away_first {
                member.handle_disconnected(500);
                member.handle_departure(1_000);
            } else {
                member.handle_departure(500);
                member.handle_disconnected(1_000);
            }
            let told = actions(&mut member);
            assert_eq!(told.last(), Some(&Action::Stop { mode }), "{told:?}");
            assert_eq!(member.poll_timeout(), Some(1_000 + AWAY_PATIENCE_MS));
            member.handle_tick(1_000 + AWAY_PATIENCE_MS);
            let told = actions(&mut member);
            assert!(
                matches!(told[..], [Action::Abort { .. }, Action::Leave(Leave::CoordinatorAway)]),
                "{told:?}"
            );
            assert_eq!(member.poll_timeout(), None);
        }
    }
}

#[test]
fn an_idle_worker_leaves_at_once_and_takes_nothing_on() {
    let mut member = with_kept_state();
    member.handle_departure(0);
    let leaves = [Action::Tell(FromWorker::Leaving), Action::Drop, Action::Leave(Leave::Done)];
    assert_eq!(actions(&mut member), leaves);
    let order = ToWorker::Start(assignment(JOB, 2, 2, Resumption::Fresh));
    assert_eq!(member.handle_order(order, 0), Err(Refused::Leaving));
    // Not that it has stopped: its peers would wait for it, without having begun a step at whose end they could stop too.
    let told = actions(&mut member);
    let [Action::Tell(FromWorker::Ended { outcome: Outcome::Lost { culprit, .. }, held: None, .. })] =
        &told[..]
    else {
        panic!("{told:?}");
    };
    assert!(culprit.is_some());
    assert_eq!(member.handle_order(ToWorker::Follow(following(3)), 0), Err(Refused::Leaving));
}

#[test]
fn a_dismissed_worker_leaves_at_once() {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    member.handle_order(ToWorker::Dismiss { reason: "its certificate was revoked".to_owned() }, 0).unwrap();
    let leave = Leave::Dismissed { reason: "its certificate was revoked".to_owned() };
    let told = actions(&mut member);
    assert!(matches!(&told[..], [Action::Abort { .. }, Action::Leave(how)] if *how == leave), "{told:?}");
}

#[test]
fn a_session_that_nobody_hears_of_pauses_when_its_lease_has_run_out() {
    let mut member = Member::default();
    member.handle_order(ToWorker::Start(assignment(JOB, 1, 2, Resumption::Fresh)), 500).unwrap();
    let first = all_actions(&mut member);
    assert_eq!(first.last(), Some(&Action::Ping { sent_ms: 500 }));
    assert_eq!(member.lease_until_ms(), None, "no step is committed before the first word");
    member.handle_word(500, 900);
    // From the question on, not from the answer, which may have lain in a socket for hours.
    assert_eq!(member.lease_until_ms(), Some(60_500 + LEASE_GRACE_MS));
    assert_eq!(member.poll_timeout(), Some(3_500), "asked again when a twentieth has passed");
    answer_at(&mut member, 3_500);
    member.handle_disconnected(4_000);
    member.handle_disconnected(5_000);
    assert_eq!(member.poll_timeout(), Some(63_500));
    member.handle_tick(63_499);
    assert_eq!(all_actions(&mut member), []);
    // To come back is a word too.
    member.handle_connected(63_499, 63_600);
    assert_eq!(member.poll_timeout(), Some(66_499));
    member.handle_disconnected(64_000);
    member.handle_tick(123_498);
    assert_eq!(all_actions(&mut member), []);
    member.handle_tick(123_499);
    assert_eq!(all_actions(&mut member), [Action::Stop { mode: StopMode::Boundary }]);
    member.handle_tick(140_000);
    assert_eq!(all_actions(&mut member), [], "once");
    member.handle_session_ended(
        JOB,
        Generation(1),
        Outcome::Stopped { step: 9 },
        Some(Position::at(9)),
        141_000,
    );
    assert_eq!(member.register(), (None, Some(held(1, 9))), "kept until the coordinator is back");
}

#[test]
fn one_that_was_stopped_for_longer_than_its_lease_has_none_when_it_wakes() {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    member.handle_word(0, 1);
    member.handle_tick(3_000);
    all_actions(&mut member);
    // Stopped here, with the answer in its socket; its connection still looks open.
    member.handle_word(3_000, 7_200_000);
    let told = all_actions(&mut member);
    assert_eq!(told, [Action::Ping { sent_ms: 7_200_000 }, Action::Stop { mode: StopMode::Boundary }]);
    // Others may have been given the job meanwhile, whatever is heard now.
    member.handle_word(7_200_000, 7_200_001);
    assert_eq!(member.lease_until_ms(), Some(63_000 + LEASE_GRACE_MS));
}

#[test]
fn answers_to_questions_of_an_earlier_session_are_none() {
    let mut member = Member::default();
    start(&mut member, 1, Resumption::Fresh);
    member.handle_session_ended(JOB, Generation(1), lost(), Some(Position::at(5)), 4_000);
    let again = assignment(JOB, 2, 2, from_peers(5, &[0]));
    member.handle_order(ToWorker::Start(again), 5_000).unwrap();
    member.handle_word(0, 5_001);
    assert_eq!(member.lease_until_ms(), None);
    // An unanswered question is not asked twice, unless its connection has ended.
    all_actions(&mut member);
    member.handle_tick(30_000);
    assert_eq!(all_actions(&mut member), []);
    member.handle_disconnected(31_000);
    member.handle_connected(4_999, 31_500);
    assert_eq!(all_actions(&mut member), [Action::Ping { sent_ms: 31_500 }]);
}
