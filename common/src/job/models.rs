//! The names of the architectures, their options and which images they take, so that a job can be refused where libtorch is
//! not.
//!
//! `worker/nn` builds them, and a test there holds its registry against this list.

use super::{BatchNorm, ModelSpec};
use serde_json::Value;

/// What a network is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelRole {
    /// Images in, one logit per class out.
    Classifier,
    /// Latent vectors in, images out.
    Generator,
    /// Images in, one logit out.
    Discriminator,
}

/// One architecture.
#[derive(Clone, Copy, Debug)]
pub struct ModelEntry {
    /// The name in job files and in `worker models`.
    pub name: &'static str,
    /// What it is for.
    pub role: ModelRole,
    /// The keys that it takes besides `name`, `batch_norm` and `optimizer`.
    pub options: &'static [ModelOption],
}

/// A key of an architecture's section in a job file.
#[derive(Clone, Copy, Debug)]
pub struct ModelOption {
    /// The key.
    pub name: &'static str,
    /// What it takes.
    pub kind: OptionKind,
}

/// What an option takes.
#[derive(Clone, Copy, Debug)]
pub enum OptionKind {
    /// A whole number from 1 to a million.
    Count,
    /// A probability to drop, in [0, 1).
    DropRate,
    /// A number from the first to the second.
    Number(f64, f64),
    /// True or false.
    Switch,
    /// One of these names.
    Choice(&'static [&'static str]),
}

impl OptionKind {
    /// What is wrong with `value`, as the end of a sentence; `None` if it fits.
    pub(super) fn problem(self, value: &Value) -> Option<String> {
        let (fits, problem) = match self {
            Self::Count => (
                value.as_i64().is_some_and(|n| (1..=1_000_000).contains(&n)),
                "it must be a whole number from 1 to 1000000".to_owned(),
            ),
            Self::DropRate => (
                value.as_f64().is_some_and(|p| (0.0..1.0).contains(&p)),
                "it must be a number from 0 to below 1".to_owned(),
            ),
            Self::Number(from, to) => (
                value.as_f64().is_some_and(|x| (from..=to).contains(&x)),
                format!("it must be a number from {from} to {to}"),
            ),
            Self::Switch => (value.is_boolean(), "it must be `true` or `false`".to_owned()),
            Self::Choice(names) => {
                let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
                let fits = value.as_str().is_some_and(|name| names.contains(&name));
                (fits, format!("it must be {}", quoted.join(" or ")))
            }
        };
        (!fits).then_some(problem)
    }
}

impl ModelSpec {
    /// The option that does not go with the others, and why: the end of a sentence.
    pub fn contradiction(&self) -> Option<(&'static str, &'static str)> {
        let is_paper = self.name == "googlenet" && self.option("variant") == Some("paper");
        let problem = "= \"paper\" has no batch normalization; set `batch_norm = \"none\"`";
        (is_paper && self.batch_norm != BatchNorm::None).then_some(("variant", problem))
    }

    /// How many channels its images have, as the option `in_channels` or the network says; `None` for one that takes pixels as
    /// plain numbers.
    pub fn channels(&self) -> Option<u32> {
        let own = match self.name.as_str() {
            "mlp" | "gan-generator" | "gan-discriminator" => return None,
            "small-cnn" => 1,
            "nin" if self.option("widths") == Some("mnist") => 1,
            _ => 3,
        };
        Some(self.count("in_channels").unwrap_or(own))
    }

    /// The option that says how many numbers an image has, and how many those are, for a network that takes or makes images as
    /// plain numbers.
    pub fn numbers(&self) -> Option<(&'static str, u32)> {
        let option = match self.name.as_str() {
            "mlp" | "gan-discriminator" => "inputs",
            "gan-generator" => "outputs",
            _ => return None,
        };
        Some((option, self.count(option).unwrap_or(784)))
    }

    /// A whole number that is given.
    fn count(&self, name: &str) -> Option<u32> {
        self.options.get(name).and_then(Value::as_u64).and_then(|count| count.try_into().ok())
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).and_then(Value::as_str)
    }

    /// The least height and width of the images from which something is left for the network's last layer; 1 where any will do.
    pub fn least_side(&self) -> u32 {
        match self.name.as_str() {
            // Its first convolution has no padding.
            "nin" if self.option("widths") == Some("imagenet") => 39,
            "nin" => 4,
            // Its last pooling has a window of 3, torchvision's of 2.
            "googlenet" if self.option("variant") == Some("paper") => 31,
            "googlenet" => 15,
            "bn-inception" => 7,
            "inception-v3" | "inception-v4" | "inception-resnet-v1" | "inception-resnet-v2" => 75,
            _ => 1,
        }
    }

    /// The same in training, where auxiliary heads look on: from 299 on a 5 x 5 convolution of Inception v3's has its 25 inputs.
    pub fn least_side_in_training(&self) -> u32 {
        let has_head = self.options.get("aux").and_then(Value::as_bool).unwrap_or(true);
        if self.name == "inception-v3" && has_head { 299 } else { self.least_side() }
    }
}

/// Every architecture.
pub fn catalogue() -> &'static [ModelEntry] {
    use ModelRole::{Classifier, Discriminator, Generator};
    const fn count(name: &'static str) -> ModelOption {
        ModelOption { name, kind: OptionKind::Count }
    }
    const DROPOUT: ModelOption = ModelOption { name: "dropout", kind: OptionKind::DropRate };
    const fn number(name: &'static str, from: f64, to: f64) -> ModelOption {
        ModelOption { name, kind: OptionKind::Number(from, to) }
    }
    const fn choice(name: &'static str, names: &'static [&'static str]) -> ModelOption {
        ModelOption { name, kind: OptionKind::Choice(names) }
    }
    const AUX: ModelOption = ModelOption { name: "aux", kind: OptionKind::Switch };
    const AUX_WEIGHT: ModelOption = number("aux_weight", 0.0, 10.0);
    const AUX_DROPOUT: ModelOption = ModelOption { name: "aux_dropout", kind: OptionKind::DropRate };
    const RESIDUAL_SCALE: ModelOption = number("residual_scale", 0.0, 1.0);
    const BN_EPS: ModelOption = number("bn_eps", 0.0, 1.0);
    const BN_MOMENTUM: ModelOption = number("bn_momentum", 0.0, 1.0);
    const GOOGLENET: &[ModelOption] = &[
        choice("variant", &["torchvision", "paper"]),
        count("classes"),
        count("in_channels"),
        AUX,
        AUX_WEIGHT,
        DROPOUT,
        AUX_DROPOUT,
        BN_EPS,
        BN_MOMENTUM,
    ];
    const INCEPTION: &[ModelOption] = &[count("classes"), count("in_channels"), DROPOUT, BN_EPS, BN_MOMENTUM];
    const INCEPTION_V3: &[ModelOption] =
        &[count("classes"), count("in_channels"), AUX, AUX_WEIGHT, DROPOUT, BN_EPS, BN_MOMENTUM];
    const RESNET_V1: &[ModelOption] =
        &[count("classes"), count("in_channels"), DROPOUT, RESIDUAL_SCALE, BN_EPS, BN_MOMENTUM];
    const RESNET_V2: &[ModelOption] = &[
        choice("variant", &["released", "paper"]),
        count("classes"),
        count("in_channels"),
        DROPOUT,
        RESIDUAL_SCALE,
        BN_EPS,
        BN_MOMENTUM,
    ];
    const NIN: &[ModelOption] = &[
        choice("widths", &["cifar", "mnist", "imagenet"]),
        count("classes"),
        count("in_channels"),
        ModelOption { name: "final_relu", kind: OptionKind::Switch },
        DROPOUT,
    ];
    const SMALL_CNN: &[ModelOption] = &[count("classes"), count("in_channels"), count("width")];
    const MLP: &[ModelOption] = &[count("classes"), count("inputs"), count("hidden"), DROPOUT];
    const GENERATOR: &[ModelOption] = &[count("latent"), count("hidden"), count("outputs")];
    const DISCRIMINATOR: &[ModelOption] = &[count("inputs"), count("hidden"), count("pieces"), DROPOUT];
    &[
        ModelEntry { name: "nin", role: Classifier, options: NIN },
        ModelEntry { name: "googlenet", role: Classifier, options: GOOGLENET },
        ModelEntry { name: "bn-inception", role: Classifier, options: INCEPTION },
        ModelEntry { name: "inception-v3", role: Classifier, options: INCEPTION_V3 },
        ModelEntry { name: "inception-v4", role: Classifier, options: INCEPTION },
        ModelEntry { name: "inception-resnet-v1", role: Classifier, options: RESNET_V1 },
        ModelEntry { name: "inception-resnet-v2", role: Classifier, options: RESNET_V2 },
        ModelEntry { name: "small-cnn", role: Classifier, options: SMALL_CNN },
        ModelEntry { name: "mlp", role: Classifier, options: MLP },
        ModelEntry { name: "gan-generator", role: Generator, options: GENERATOR },
        ModelEntry { name: "gan-discriminator", role: Discriminator, options: DISCRIMINATOR },
    ]
}
