//! The protocol's words and rules as pure functions from bytes to commands and from events to
//! lines; `docs/protocol.md` is their description. Must not know sockets and tasks, and of an
//! engine only the schemas of its figures. The server's connections and the client call it.

mod catalogue;
mod error;
mod event;
mod frame;
mod inbound;
mod json;
mod outbound;
mod params;
mod results;
mod schema;

pub use catalogue::{Catalogue, Method};
pub use error::{ErrorData, ErrorObject};
pub use event::{WireEvent, WireToken, WireTop};
pub use frame::{FrameBuffer, FrameTooLarge};
pub use inbound::{
    AfterRefusal, Command, ID_BYTES_MAX, ID_NUMBER_MAX, Inbound, Refused, RequestId, read_line,
};
pub use json::{JsonLimits, parse};
pub use outbound::{Line, error_line, event_line, hello_line, result_line};
pub use params::{
    CancelParams, ChatParams, Delivery, DetokenizeParams, GenerateParams, GenerationParams,
    NoParams, PlanParams, ShutdownParams, StopParam, SubscribeParams, TokenizeParams, add_special,
    parse_special,
};
pub use results::{
    CancelResult, DescribeResult, DetokenizeResult, ErrorRow, GenerationResult, Hello, Limits,
    ModelsResult, PingResult, PlanResult, ServerStats, ShutdownResult, StatsResult, StatusResult,
    SubscribeResult, TokenizeResult, Version, WholeAnswer,
};

/// Major version that is spoken here.
pub const PROTOCOL_MAJOR: u32 = 1;
/// The version that is spoken here.
pub const VERSION: Version = Version { major: PROTOCOL_MAJOR, minor: 0 };
