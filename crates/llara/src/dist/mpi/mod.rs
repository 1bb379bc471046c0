//! A group of processes that `mpirun` or `srun` started, which communicate over MPI.

mod engine;
mod exchange;
mod launch;
mod library;
mod message;
mod placement;
mod rank;
mod world;

pub use launch::Launch;
pub use message::message_bytes;
pub use placement::Placement;
pub use rank::MpiRank;
pub use world::MpiWorld;
