//! What a worker does with trained networks when somebody asks it to.

mod args;
mod candidates;
mod eval;
mod predict;
mod progress;

pub(crate) use args::{EvalArgs, PredictArgs};
pub(crate) use eval::eval;
pub(crate) use predict::predict;
