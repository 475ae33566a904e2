//! Evaluation of classifiers: what a network says of an image, and what that adds up to over a test set.
//!
//! A job's evaluation (`crate::train::evaluate`) and `worker eval` judge the same samples in the same batches and add up in
//! the same order, so they report the same bits.

pub(crate) mod candidate;
pub(crate) mod contest;
pub(crate) mod judge;
pub(crate) mod report;
pub(crate) mod stores;
pub(crate) mod tally;
pub(crate) mod views;
