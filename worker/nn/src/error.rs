//! What can go wrong in building or running a network.

use tch::TchError;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum NnError {
    /// libtorch refused an operation; the text is libtorch's, without its stack trace.
    #[error("libtorch: {0}")]
    Torch(String),
    /// The exchange of batch-norm sums or of gradients failed. It keeps its type for the caller to look at.
    #[error(transparent)]
    Exchange(Box<dyn std::error::Error + Send + Sync>),
    /// A callback panicked inside a forward or backward pass.
    #[error("a callback of the backward pass panicked: {0}")]
    Panic(String),
    /// A merged vector has not the length of the local one.
    #[error("batch norm `{layer}`: the exchange returned {got} values for {expected}")]
    MergedLength {
        /// The layer's full name.
        layer: String,
        /// Values handed in.
        expected: usize,
        /// Values that came back.
        got: usize,
    },
    /// A name in a job file that no architecture has.
    #[error("unknown model `{name}`{hint}")]
    UnknownModel {
        /// The name as written.
        name: String,
        /// The nearest known name, if any.
        hint: String,
    },
    /// An option of an architecture that is unknown or has a bad value.
    #[error("model `{model}`: option `{option}` {problem}")]
    Option {
        /// The architecture.
        model: String,
        /// The option.
        option: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A variable asked for twice, or one that the master variables lack.
    #[error("variable `{name}` {problem}")]
    Variable {
        /// The variable's full name.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// One of an optimizer's groups is of no parameter.
    #[error("`{pattern}` in the optimizer's `groups` fits no parameter of the network{hint}")]
    Group {
        /// What the group's parameters are called.
        pattern: String,
        /// The nearest name, if one is near.
        hint: String,
    },
    /// Saved tensors do not fit the network or optimizer they are loaded into. Nothing was loaded.
    #[error("the saved {what} does not fit: {}", .problems.join("; "))]
    Load {
        /// What was being loaded.
        what: &'static str,
        /// Every key that is missing, unknown, or of another shape or type.
        problems: Vec<String>,
    },
    /// Weights from a file are not those of the network. Nothing was loaded.
    #[error("{0}")]
    Weights(String),
    /// An input whose shape does not fit what it is for.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// The layer or loss.
        what: String,
        /// The shape or count that it needs.
        expected: String,
        /// The shape or count that it was given.
        got: String,
    },
}

impl NnError {
    /// A libtorch message without the C++ stack trace that follows it.
    pub(crate) fn torch(message: &str) -> Self {
        let end = message.find("\nException raised from").unwrap_or(message.len());
        Self::Torch(message[..end].trim().to_owned())
    }
}

impl From<TchError> for NnError {
    fn from(e: TchError) -> Self {
        match e {
            TchError::Torch(message) => Self::torch(&message),
            other => Self::torch(&other.to_string()),
        }
    }
}
