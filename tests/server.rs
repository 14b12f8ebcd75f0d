//! The server over a real socket, in raw bytes, with a scripted engine behind it.

#[path = "support/raw_client.rs"]
mod raw_client;
#[path = "support/scripted_engine.rs"]
mod scripted_engine;
#[path = "support/served.rs"]
mod served;

#[path = "server/client.rs"]
mod client;
#[path = "server/documentation.rs"]
mod documentation;
#[path = "server/errors.rs"]
mod errors;
#[path = "server/frames.rs"]
mod frames;
#[path = "server/params.rs"]
mod params;
#[path = "server/shutdown.rs"]
mod shutdown;
#[path = "server/socket.rs"]
mod socket;
#[path = "server/streams.rs"]
mod streams;
