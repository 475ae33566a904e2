//! Invariant 3: `coordinator audit` proves of a real run that every sample counted once per epoch, and names the step and
//! the shard of anything else.

use lockstep_tests::job::{Job, gan};
use lockstep_tests::place::{Place, SIDE, TEST, TRAIN};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// Two epochs of 19 steps and a bit.
fn job() -> Job {
    Job { steps: 40, ..Job::default() }
}

fn lines(path: &PathBuf) -> Vec<String> {
    fs::read_to_string(path).expect("an audit").lines().map(str::to_owned).collect()
}

/// All numbers of samples in what `--samples` says of a step.
fn numbers(step: &Value) -> Vec<u64> {
    fn collect(value: &Value, into: &mut Vec<u64>) {
        match value.as_array() {
            Some(values) => values.iter().for_each(|value| collect(value, into)),
            None => into.extend(value.as_u64()),
        }
    }
    let mut numbers = Vec::new();
    collect(&step["samples"], &mut numbers);
    numbers
}

#[test]
fn a_run_is_proven_and_every_fault_in_its_audit_is_named_with_step_and_shard() {
    let place = Place::new();
    place.run(job(), 2);
    let proof = place.prove("j1");
    assert_eq!((&proof["steps"], &proof["epochs"], &proof["samples"]), (&40.into(), &2.into(), &1264.into()));
    let said = place.coordinator(["audit", "j1"]).ok();
    assert!(said.stdout.contains("steps 1 to 40 of 40 counted exactly once"), "{}", said.stdout);

    let said = place.coordinator(["audit", "j1", "--samples"]).ok();
    let steps: Vec<Value> = said.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(steps.len(), 40);
    let mut epoch: Vec<u64> = steps.iter().filter(|step| step["epoch"] == 1).flat_map(numbers).collect();
    epoch.sort_unstable();
    assert!(epoch.iter().copied().eq(0..TRAIN.into()), "an epoch's steps have each sample once");

    let path = place.job_dir("j1").join("audit.jsonl");
    let whole = lines(&path);
    let check = |change: &dyn Fn(&mut Vec<String>), parts: &[&str]| {
        let mut changed = whole.clone();
        change(&mut changed);
        fs::write(&path, changed.join("\n") + "\n").expect("the audit");
        place.coordinator(["audit", "j1"]).refused(1, parts);
        let ended = place.coordinator(["audit", "j1", "--json"]).refused(1, parts);
        let told: Value = serde_json::from_str(ended.stdout.trim()).expect("JSON");
        assert_eq!(told["ok"], false);
    };
    // The first line is the generation's start, so line n is step n - 1.
    check(&|lines| drop(lines.remove(7)), &["error: j1: step 7 is missing"]);
    check(&|lines| lines.insert(9, lines[8].clone()), &["step 8 counted twice"]);
    let edit = |lines: &mut Vec<String>, line: usize, change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_str(&lines[line]).expect("a line");
        change(&mut value);
        lines[line] = value.to_string();
    };
    let lost = |value: &mut Value| value["shards"][2] = serde_json::json!([0, 0]);
    check(&|lines| edit(lines, 5, &lost), &["step 5, shard 2: 0 samples counted instead of 8"]);
    let swapped = |value: &mut Value| {
        let shards = value["shards"].as_array_mut().expect("shards");
        shards.swap(0, 1);
    };
    check(&|lines| edit(lines, 5, &swapped), &["step 5, shard 0: other samples counted"]);
    check(&|lines| lines[3].truncate(30), &["line 4 is damaged"]);

    // What is being written does not count, and is no fault.
    fs::write(&path, &whole.join("\n")[..whole.join("\n").len() - 9]).expect("the audit");
    let proof = place.json(&["audit", "j1"]);
    assert_eq!(
        (&proof["ok"], &proof["complete"], &proof["steps"]),
        (&true.into(), &false.into(), &39.into())
    );
}

#[test]
fn a_gan_whose_phases_see_several_minibatches_is_proven() {
    let place = Place::new();
    let job = gan(12, SIDE).replace("grid = 16", "grid = 16\ndiscriminator_steps = 2");
    place.run(&job, 3);
    // Ten steps of two minibatches an epoch: the last has 24 samples and no second minibatch.
    let proof = place.prove("j1");
    assert_eq!((&proof["epochs"], &proof["samples"]), (&1.into(), &(600 + 2 * 64).into()));
}

#[test]
fn an_audit_that_cannot_be_checked_says_why() {
    let place = Place::new();
    place.coordinator(["audit", "j7"]).refused(1, &["there is no job j7"]);
    place.run(Job { steps: 2, ..Job::default() }, 1);
    // There is no replacing a dataset; its store can be made anew.
    fs::remove_dir_all(place.dir().join("datasets")).expect("the datasets");
    let source = place.file("other");
    lockstep_tests::data::write_idx(&source, TRAIN - 1, TEST, SIDE);
    place.add_dataset("tiny", &source);
    place.coordinator(["audit", "j1"]).refused(1, &["another `tiny/train`", "replaced since"]);
}
