use super::*;

const GOOD: &str = r#"name = "tiny"
task = "classify"
seed = 1
epochs = 2
global_batch = 128
logical_shards = 8

[model]
name = "nin"
classes = 10

[data]
train = "fashion-mnist/train"
augment = [{ name = "pad-crop", pixels = 2 }, { name = "flip" }]

[optimizer]
name = "sgd"
lr = 0.1
momentum = 0.9
"#;

/// The error for GOOD with `from` replaced by `to`.
fn check(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    JobSpec::parse("tiny.toml", &GOOD.replace(from, to)).unwrap_err().to_string()
}

#[test]
fn a_good_file_parses_with_its_defaults() {
    let job = JobSpec::parse("tiny.toml", GOOD).unwrap();
    assert_eq!(job.reduction, Reduction::Exact);
    assert_eq!(job.memory_format, MemoryFormat::Contiguous);
    let channels_last = GOOD.replace("seed = 1", "seed = 1\nmemory_format = \"channels-last\"");
    assert_eq!(JobSpec::parse("x", &channels_last).unwrap().memory_format, MemoryFormat::ChannelsLast);
    assert_eq!(job.model.as_ref().unwrap().batch_norm, BatchNorm::Sync);
    assert_eq!(job.max_workers(), 8);
    assert_eq!(job.workers.orphan_timeout_s, 3600);
    assert_eq!(job.total_steps(469), 938);
    assert_eq!(job.data.augment.len(), 2);
}

#[test]
fn errors_name_file_line_and_nearest_name() {
    let cases = [
        ("seed = 1", "sede = 1", "tiny.toml:3: unknown field `sede`", "did you mean `seed`?"),
        (
            "momentum = 0.9",
            "momentm = 0.9",
            "tiny.toml:19: unknown field `momentm`",
            "did you mean `momentum`?",
        ),
        (
            "seed = 1",
            "seed = 1\nmemory_format = \"channel-last\"",
            "tiny.toml:4",
            "did you mean `channels-last`?",
        ),
        (
            "pixels = 2",
            "pixel = 2",
            "tiny.toml:14: step 1 of `augment`, `pad-crop`: unknown field `pixel`",
            "did you mean `pixels`?",
        ),
        (
            "{ name = \"flip\" }]",
            "{ name = \"flip\" },\n    { name = \"resize\" },\n]",
            "tiny.toml:15: step 3 of `augment`, `resize`: missing field `size`",
            "",
        ),
        (
            "{ name = \"flip\" }]",
            "{ name = \"flipp\" }]",
            "tiny.toml:14: step 2 of `augment`, `flipp`: unknown variant `flipp`",
            "did you mean `flip`?",
        ),
        (
            "[optimizer]",
            "[[data.evaluate]]\nname = \"center-crop\"\nsize = \"big\"\n[optimizer]",
            "tiny.toml:16: step 1 of `evaluate`, `center-crop`: invalid type",
            "expected u32",
        ),
        ("\"sgd\"", "\"sdg\"", "tiny.toml:17", "did you mean `sgd`?"),
        ("\"nin\"", "\"nim\"", "tiny.toml:9: unknown model `nim`", "did you mean `nin`?"),
        ("classes = 10", "clases = 10", "tiny.toml:10: unknown option `clases`", "did you mean `classes`?"),
        ("seed = 1", "seed = \"x\"", "tiny.toml:3: invalid type", "expected u64"),
        ("= 128", "= 100", "tiny.toml:5: `global_batch` is 100", "96 or 104 is"),
        (
            "classes = 10",
            "weights = \"w.safetensors\"",
            "tiny.toml:10: `weights` needs `weights_blake3`",
            "`worker weights w.safetensors` prints it",
        ),
        ("classes = 10", "weights_blake3 = \"\"", "tiny.toml:10: `weights_blake3` needs `weights`", ""),
        (
            "classes = 10",
            "weights = \"w\"\nweights_blake3 = \"12\"",
            "tiny.toml:11: `weights_blake3` is \"12\"",
            "64 hexadecimal digits",
        ),
        ("\"nin\"", "\"googlenet\"\naux_weight = -1", "tiny.toml:10: `aux_weight` is -1", "from 0 to 10"),
        ("lr = 0.1", "lr = -1", "tiny.toml:18: `lr` is -1", "above 0"),
        ("epochs = 2", "", "tiny.toml: neither `epochs` nor `steps`", ""),
        ("epochs = 2", "epochs = 2\nsteps = 3", "tiny.toml:5: `epochs` and `steps`", ""),
        ("\"classify\"", "\"gan\"", "tiny.toml:8: a `gan` job has no section `[model]`", ""),
        ("epochs = 2", "epochs = ", "tiny.toml:4: ", ""),
        ("epochs = 2", "steps = 0", "tiny.toml:4: `steps` is 0", "needs a `test` set in `[data]`"),
        (
            "[optimizer]",
            "[evaluation]\ncrops = 7\n[optimizer]",
            "tiny.toml:17: `crops` is 7",
            "1, 10, 12 or 144",
        ),
        (
            "[optimizer]",
            "[collective]\nbackend = \"ncll\"\n[optimizer]",
            "tiny.toml:17: ",
            "did you mean `nccl`?",
        ),
        (
            "[optimizer]",
            "[workers]\norphan_timeout_s = 0\n[optimizer]",
            "tiny.toml:17: `orphan_timeout_s` is 0",
            "1 to 604800 seconds",
        ),
    ];
    for (from, to, start, part) in cases {
        let message = check(from, to);
        assert!(message.starts_with(start), "{message:?} should start with {start:?}");
        assert!(message.contains(part), "{message:?} should contain {part:?}");
        assert_eq!(message.lines().count(), 1, "{message:?}");
    }
}

#[test]
fn a_job_of_no_steps_evaluates_given_weights_on_a_test_set() {
    let job = |model: &str, data: &str| {
        let text = GOOD.replace("epochs = 2", "steps = 0").replace("classes = 10", model);
        let text = text.replace("augment = ", &format!("{data}\naugment = "));
        JobSpec::parse("tiny.toml", &text)
    };
    let weights = format!("weights = \"w\"\nweights_blake3 = \"{}\"", "a".repeat(64));
    let test = "test = \"fashion-mnist/test\"";
    let good = job(&weights, test).unwrap();
    assert!(good.only_evaluates() && good.total_steps(469) == 0);
    assert_eq!(good.evaluation, EvaluationSpec { crops: Crops::One });
    for (model, data, lack) in
        [(weights.as_str(), "", "`test` set"), ("classes = 10", test, "`weights` in `[model]`")]
    {
        let message = job(model, data).unwrap_err().to_string();
        assert!(message.starts_with("tiny.toml:4: `steps` is 0") && message.contains(lack), "{message}");
    }
}

#[test]
fn several_crops_are_squares() {
    let crops = |lines: &str| JobSpec::parse("tiny.toml", &format!("{GOOD}[evaluation]\n{lines}\n"));
    for (count, expected) in
        [(1, Crops::One), (10, Crops::Ten), (12, Crops::Twelve), (144, Crops::HundredFortyFour)]
    {
        assert_eq!(crops(&format!("crops = {count}")).unwrap().evaluation.crops, expected);
        assert_eq!(expected.count(), count);
    }
    let error = crops("corps = 10").unwrap_err().to_string();
    assert!(error.contains("did you mean `crops`?"), "{error}");
}

#[test]
fn wire_formats_are_checked_against_precision_and_rank() {
    let good = format!("{GOOD}[collective]\nwire = \"powersgd\"\n");
    let job = JobSpec::parse("tiny.toml", &good).unwrap();
    assert_eq!((job.collective.wire, job.collective.approximation_rank()), (WireFormat::PowerSgd, 4));
    let cases = [
        ("wire = \"int9\"", "tiny.toml:21", "did you mean `int8`?"),
        ("wire = \"int8\"\nwire_rank = 2", "tiny.toml:22: `wire_rank` is for `wire = \"powersgd\"`", ""),
        ("wire = \"powersgd\"\nwire_rank = 0", "tiny.toml:22: `wire_rank` must be 1 to 64", ""),
        ("wire = \"powersgd\"\nwire_rank = 65", "tiny.toml:22: `wire_rank` must be 1 to 64", ""),
    ];
    for (lines, start, part) in cases {
        let text = format!("{GOOD}[collective]\n{lines}\n");
        let message = JobSpec::parse("tiny.toml", &text).unwrap_err().to_string();
        assert!(message.starts_with(start) && message.contains(part), "{message:?}");
        assert_eq!(message.lines().count(), 1, "{message:?}");
    }
    for (wire, accepted) in [("f32", true), ("bf16", false), ("int8", false), ("powersgd", false)] {
        let text = GOOD.replace("seed = 1", "seed = 1\nprecision = \"f64\"");
        let parsed = JobSpec::parse("tiny.toml", &format!("{text}[collective]\nwire = \"{wire}\"\n"));
        assert_eq!(parsed.is_ok(), accepted, "{wire}");
        if let Err(error) = parsed {
            assert!(error.to_string().starts_with("tiny.toml:22: a compressed `wire`"), "{error}");
        }
    }
}

#[test]
fn checks_have_defaults_and_refuse_what_they_do_not_know() {
    let checks = |lines: &str| JobSpec::parse("tiny.toml", &format!("{GOOD}[checks]\n{lines}\n"));
    let spec = |digest_every_steps, on_mismatch| CheckSpec { digest_every_steps, on_mismatch };
    assert_eq!(JobSpec::parse("tiny.toml", GOOD).unwrap().checks, spec(None, OnMismatch::Heal));
    let stop = "digest_every_steps = 0\non_mismatch = \"stop\"";
    assert_eq!(checks(stop).unwrap().checks, spec(Some(0), OnMismatch::Stop));
    let every =
        |lines: &str, devices: &[&str]| checks(lines).unwrap().checks.every_steps(devices.iter().copied());
    assert_eq!(every("", &["cpu", "cpu"]), 1);
    assert_eq!(every("", &["cpu", "cuda:0"]), 50);
    assert_eq!(every("digest_every_steps = 7", &["cuda:0"]), 7);
    for (lines, start, part) in [
        ("digest_every_step = 5", "tiny.toml:21: unknown field", "did you mean `digest_every_steps`?"),
        ("digest_every_steps = -1", "tiny.toml:21: ", ""),
        ("on_mismatch = \"heel\"", "tiny.toml:21: unknown variant `heel`", "did you mean `heal`?"),
    ] {
        let message = checks(lines).unwrap_err().to_string();
        assert!(message.starts_with(start) && message.contains(part), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
}

#[test]
fn contrast_normalization_takes_no_mean_and_std() {
    let with = |lines: &str| {
        let text = GOOD.replace("[data]", &format!("[data]\n{lines}"));
        JobSpec::parse("tiny.toml", &text)
    };
    assert_eq!(with("scale = \"gcn\"").unwrap().data.scale, PixelScale::Gcn);
    let error = with("scale = \"gcn\"\nmean = [0.5]\nstd = [0.5]").unwrap_err().to_string();
    let told = "tiny.toml:14: `mean` and `std` go together, with `scale = \"standardize\"`";
    assert!(error.contains(told), "{error}");
}

#[test]
fn whitening_takes_whole_images_of_normalized_contrast() {
    let with = |lines: &str, augment: &str| {
        let text = GOOD.replace("[data]", &format!("[data]\n{lines}"));
        let own = "[{ name = \"pad-crop\", pixels = 2 }, { name = \"flip\" }]";
        JobSpec::parse("tiny.toml", &text.replace(own, augment))
    };
    let zca = "scale = \"gcn\"\nwhiten = \"zca\"";
    let moves = "[{ name = \"flip\" }, { name = \"pad-crop\", pixels = 4 }]";
    assert_eq!(with(zca, moves).unwrap().data.whiten, Some(Whiten::Zca));
    assert_eq!(with("scale = \"gcn\"", "[]").unwrap().data.whiten, None);
    let channels = format!("{zca}\nchannels = 3");
    let order = format!("{zca}\nchannel_order = \"bgr\"");
    let evaluate = format!("{zca}\nevaluate = [{{ name = \"center-crop\", size = 8 }}]");
    let resized = "[{ name = \"random-resized-crop\", size = 24 }]";
    for (lines, augment, start, part) in [
        ("whiten = \"zca\"", "[]", "tiny.toml:13: ", "add `scale = \"gcn\"`"),
        ("scale = \"gcn\"\nwhiten = \"pca\"", "[]", "tiny.toml:14: unknown variant `pca`", "`zca`"),
        (&channels, "[]", "tiny.toml:15: ", "remove `channels`"),
        (&order, "[]", "tiny.toml:15: ", "remove `channel_order`"),
        (&evaluate, "[]", "tiny.toml:15: ", "remove `evaluate`"),
        (
            zca,
            resized,
            "tiny.toml:16: `random-resized-crop` changes",
            "`augment` takes `flip` and `pad-crop`",
        ),
        (zca, "[{ name = \"color-jitter\", hue = 0.1 }]", "tiny.toml:16: `color-jitter` changes", "`whiten`"),
    ] {
        let message = with(lines, augment).unwrap_err().to_string();
        assert!(message.starts_with(start) && message.contains(part), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

#[test]
fn caller_faults_point_at_the_value() {
    let e = JobSpec::fault("tiny.toml", GOOD, &["data", "train"], "unknown dataset".into());
    assert_eq!(e.to_string(), "tiny.toml:13: unknown dataset");
}
