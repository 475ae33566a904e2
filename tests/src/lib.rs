//! What the end-to-end tests share: real `coordinator` and `worker` processes, small datasets, and the waiting.
//!
//! Nothing here sleeps to let things settle: [`wait::until`] polls for the event itself, with a deadline that is
//! generous because the test machine may be busy. Whatever is started dies with the value that stands for it, also
//! when a test panics.

pub mod chaos;
pub mod cluster;
pub mod data;
pub mod hosts;
pub mod images;
pub mod job;
pub mod place;
pub mod process;
pub mod scrape;
pub mod wait;
