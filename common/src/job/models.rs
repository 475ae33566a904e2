//! The names of the architectures and their options, so that a job file can be refused where libtorch is not.
//!
//! `worker/nn` builds them, and a test there holds its registry against this list.

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
    pub options: &'static [&'static str],
}

/// Every architecture.
pub fn catalogue() -> &'static [ModelEntry] {
    use ModelRole::{Classifier, Discriminator, Generator};
    &[
        ModelEntry {
            name: "nin",
            role: Classifier,
            options: &["widths", "classes", "in_channels", "final_relu", "dropout"],
        },
        ModelEntry { name: "small-cnn", role: Classifier, options: &["classes", "in_channels", "width"] },
        ModelEntry { name: "mlp", role: Classifier, options: &["classes", "inputs", "hidden", "dropout"] },
        ModelEntry { name: "gan-generator", role: Generator, options: &["latent", "hidden", "outputs"] },
        ModelEntry {
            name: "gan-discriminator",
            role: Discriminator,
            options: &["inputs", "hidden", "pieces", "dropout"],
        },
    ]
}
