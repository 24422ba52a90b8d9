//! What each route does: parse, ask the engine, write down what it says.

pub(crate) mod console;
pub(crate) mod exec;
pub(crate) mod forks;
pub(crate) mod images;
pub(crate) mod instances;
pub(crate) mod lifecycle;
pub(crate) mod service;
pub(crate) mod wait;
