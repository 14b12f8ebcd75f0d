//! Every method with the schemas of its parameters and its result.

use super::params::{
    CancelParams, ChatParams, DetokenizeParams, GenerateParams, NoParams, PlanParams,
    ShutdownParams, SubscribeParams, TokenizeParams,
};
use super::results::{
    CancelResult, DescribeResult, DetokenizeResult, ErrorRow, GenerationResult, Hello,
    ModelsResult, PingResult, PlanResult, ShutdownResult, StatsResult, StatusResult,
    SubscribeResult, TokenizeResult,
};
use super::{ErrorObject, VERSION, WireEvent, json::brief_text, schema};
use crate::request::ErrorKind;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// A method of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the protocol's word of the same name")]
pub enum Method {
    Ping,
    Describe,
    Status,
    StatsGet,
    StatsSubscribe,
    ModelsList,
    ModelsPlan,
    Generate,
    Chat,
    Tokenize,
    Detokenize,
    Cancel,
    Shutdown,
}

impl Method {
    /// Every method with its name.
    pub const ALL: [(Method, &'static str); 13] = [
        (Method::Ping, "ping"),
        (Method::Describe, "describe"),
        (Method::Status, "status"),
        (Method::StatsGet, "stats.get"),
        (Method::StatsSubscribe, "stats.subscribe"),
        (Method::ModelsList, "models.list"),
        (Method::ModelsPlan, "models.plan"),
        (Method::Generate, "generate"),
        (Method::Chat, "chat"),
        (Method::Tokenize, "tokenize"),
        (Method::Detokenize, "detokenize"),
        (Method::Cancel, "cancel"),
        (Method::Shutdown, "shutdown"),
    ];

    /// The method of a name.
    ///
    /// # Errors
    /// `method_not_found`, listing what there is.
    pub fn named(name: &str) -> Result<Self, ErrorObject> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name);
        found.map(|(method, _)| *method).ok_or_else(|| {
            let names = Self::ALL.map(|(_, known)| known);
            let message = format!("no method {}; there are {}", brief_text(name), names.join(", "));
            ErrorObject::new(ErrorKind::MethodNotFound, message)
                .with("got", brief_text(name))
                .with("allowed", names.to_vec())
        })
    }

    /// Whether events follow.
    fn has_events(self) -> bool {
        matches!(self, Self::Generate | Self::Chat | Self::StatsSubscribe)
    }

    fn schemas(self) -> (Value, Value) {
        match self {
            Self::Ping => pair::<NoParams, PingResult>(),
            Self::Describe => pair::<NoParams, DescribeResult>(),
            Self::Status => pair::<NoParams, StatusResult>(),
            Self::StatsGet => pair::<NoParams, StatsResult>(),
            Self::StatsSubscribe => pair::<SubscribeParams, SubscribeResult>(),
            Self::ModelsList => pair::<NoParams, ModelsResult>(),
            Self::ModelsPlan => pair::<PlanParams, PlanResult>(),
            Self::Generate => pair::<GenerateParams, GenerationResult>(),
            Self::Chat => pair::<ChatParams, GenerationResult>(),
            Self::Tokenize => pair::<TokenizeParams, TokenizeResult>(),
            Self::Detokenize => pair::<DetokenizeParams, DetokenizeResult>(),
            Self::Cancel => pair::<CancelParams, CancelResult>(),
            Self::Shutdown => pair::<ShutdownParams, ShutdownResult>(),
        }
    }
}

/// A type's schema with everything inline, so that a reader needs no references.
fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

fn pair<P: JsonSchema, R: JsonSchema>() -> (Value, Value) {
    (schema_of::<P>(), schema_of::<R>())
}

/// The schemas of all methods. Made once per server.
#[derive(Debug)]
pub struct Catalogue {
    /// Parameters and result, in the order of [`Method::ALL`].
    schemas: Vec<(Value, Value)>,
}

impl Default for Catalogue {
    fn default() -> Self {
        Self { schemas: Method::ALL.iter().map(|(method, _)| method.schemas()).collect() }
    }
}

impl Catalogue {
    /// The schema of a method's parameters.
    pub fn params_schema(&self, method: Method) -> &Value {
        // The discriminants count the entries of `Method::ALL`; a test holds them together.
        &self.schemas[method as usize].0
    }

    /// Reads a method's parameters. Unknown fields become warnings.
    ///
    /// # Errors
    /// `invalid_params` naming the field, what came and what is allowed.
    pub fn read<T: DeserializeOwned>(
        &self,
        method: Method,
        params: Map<String, Value>,
        warnings: &mut Vec<String>,
    ) -> Result<T, ErrorObject> {
        schema::check(self.params_schema(method), &params, warnings)?;
        serde_json::from_value(Value::Object(params)).map_err(|error| {
            ErrorObject::invalid_params("params", &error.to_string(), "see describe")
        })
    }

    /// What `describe` returns.
    pub fn describe(&self) -> DescribeResult {
        let methods = Method::ALL.iter().zip(&self.schemas).map(|((method, name), schemas)| {
            let entry = json!({
                "params": schemas.0, "result": schemas.1, "events": method.has_events(),
            });
            ((*name).to_owned(), entry)
        });
        let errors = ErrorKind::TABLE.map(|(_, kind, code, http, retryable)| ErrorRow {
            kind: kind.to_owned(),
            code,
            http,
            retryable,
        });
        DescribeResult {
            protocol: VERSION,
            methods: Value::Object(methods.collect()),
            events: schema_of::<WireEvent>(),
            hello: schema_of::<Hello>(),
            errors: errors.into(),
        }
    }
}
