//! The Jinja dialect of published chat templates: Hugging Face's settings, Python's methods, and
//! the few functions that it adds.

use super::calendar;
use super::python_json::{self, JsonStyle};
use super::{TemplateError, charges, prices};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};

/// The one template of an environment.
pub(super) const NAME: &str = "chat_template";

/// Macro calls and nested blocks.
const RECURSION_MAX: usize = 200;

/// An environment that holds the template and can load nothing else.
pub(super) fn compile(
    source: &str,
    clock: fn() -> u64,
) -> Result<Environment<'static>, TemplateError> {
    let mut environment = Environment::new();
    environment.set_debug(true);
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(place)?);
    environment.set_recursion_limit(RECURSION_MAX);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| {
        calendar::format(format, clock())
            .map_err(|message| Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", to_json);
    // As in Jinja: the engine's own test says that none is iterable.
    environment.add_test("iterable", |value: Value| {
        value.as_str().is_some() || (!value.is_none() && value.try_iter().is_ok())
    });
    for filter in charges::FREE_FILTERS {
        environment.remove_filter(filter);
    }
    environment.remove_global("debug");
    prices::install(&mut environment);
    // First as it is, so that errors of syntax come with their own place, and before anything here
    // looks at a text that may be nested beyond reason.
    let source = without_generation_tags(source);
    if [charges::CHARGED, charges::COUNTED].iter().any(|name| source.contains(name)) {
        let (charged, counted) = (charges::CHARGED, charges::COUNTED);
        let message = format!("the names {charged} and {counted} are taken");
        return Err(TemplateError::without_place(message));
    }
    environment.template_from_named_str(NAME, &source).map_err(place)?;
    environment.add_template_owned(NAME, charges::charge(&source)).map_err(place)?;
    Ok(environment)
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let style = JsonStyle {
        indent: options.get::<Option<usize>>("indent")?,
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    // Separators other than Python's are not in use.
    let _ = options.get::<Option<Value>>("separators")?;
    options.assert_all_used()?;
    let text = python_json::write(&value, &style)
        .map_err(|message| Error::new(ErrorKind::InvalidOperation, message))?;
    Ok(Value::from_safe_string(text))
}

/// Replaces `{% generation %}` and its end, which only training looks at, by a block that is always
/// there; lines stay where they are.
fn without_generation_tags(source: &str) -> String {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|at| open + at) else { break };
        let (before, tag) = (&rest[..open + 2], &rest[open + 2..close]);
        rewritten.push_str(before);
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => rewritten.push_str(&tag.replace(word, "if true")),
            "endgeneration" => rewritten.push_str(&tag.replace(word, "endif")),
            _ => rewritten.push_str(tag),
        }
        rewritten.push_str("%}");
        rest = &rest[close + 2..];
    }
    rewritten.push_str(rest);
    rewritten
}

/// The engine's error with its place in the template.
pub(super) fn place(error: Error) -> TemplateError {
    let line = error.line().unwrap_or(0);
    let start = error.range().zip(error.template_source()).and_then(|(range, source)| {
        let before = source.get(..range.start)?;
        Some(before.rsplit('\n').next()?.chars().count() + 1)
    });
    let message = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "the template goes on for too long".to_owned(),
        // Our bound on the output speaks through the writer's own error.
        (ErrorKind::WriteFailure, _) => source_message(&error).unwrap_or_default(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => source_message(&error).unwrap_or_else(|| kind.to_string()),
    };
    TemplateError { line, column: start.unwrap_or(0), message }
}

fn source_message(error: &Error) -> Option<String> {
    std::error::Error::source(error).map(ToString::to_string)
}
