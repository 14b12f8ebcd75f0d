//! The configuration with the origin of every value: defaults, file, environment, flags, in this
//! order of precedence. The only place that reads configuration files and `TANDEM__*` variables;
//! the library gets the finished [`Config`].

use anyhow::{Context, Result, anyhow};
use config::{Environment, File, FileFormat, Map, Source, Value, ValueKind};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tandem::config::{Config, DEFAULT_TOML};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "name")]
pub enum Origin {
    /// `config/default.toml`, compiled in.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
    /// A command-line flag.
    Flag,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => write!(formatter, "default"),
            Self::File(path) => write!(formatter, "file {}", path.display()),
            Self::Environment(name) => write!(formatter, "environment {name}"),
            Self::Flag => write!(formatter, "flag"),
        }
    }
}

/// A finished configuration and where each value came from, by dotted path.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The validated configuration.
    pub config: Config,
    /// Dotted path → origin.
    pub origins: BTreeMap<String, Origin>,
}

/// What decides besides the compiled-in defaults, lowest precedence first.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// A file named by `--config`, or the user's own if it exists.
    pub file: Option<PathBuf>,
    /// Environment variables (all; those that start with `TANDEM__` count).
    pub environment: Vec<(String, String)>,
    /// Dotted path and value, from flags.
    pub flags: Vec<(String, String)>,
}

impl Layers {
    /// The user's own file: `$XDG_CONFIG_HOME/tandem/config.toml`, or the same below `~/.config`.
    pub fn user_file(environment: &[(String, String)]) -> Option<PathBuf> {
        let get = |name: &str| {
            let found = environment.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
        };
        let base = match get("XDG_CONFIG_HOME") {
            Some(folder) => PathBuf::from(folder),
            None => Path::new(get("HOME")?).join(".config"),
        };
        Some(base.join("tandem").join("config.toml")).filter(|path| path.is_file())
    }

    /// Merges all layers, checks every range and keeps the origins.
    ///
    /// # Errors
    /// A file that can't be read or parsed, an unknown key, a value of the wrong type or out of
    /// range; each names the key and its origin.
    pub fn load(&self) -> Result<Settings> {
        let mut origins = BTreeMap::new();
        let mut builder = config::Config::builder();
        let defaults = File::from_str(DEFAULT_TOML, FileFormat::Toml);
        record(&mut origins, &defaults.collect()?, |_| Origin::Default);
        builder = builder.add_source(defaults);
        let known: Vec<String> = origins.keys().cloned().collect();
        if let Some(path) = &self.file {
            let file = File::from(path.as_path()).format(FileFormat::Toml);
            let values =
                file.collect().with_context(|| format!("configuration file {}", path.display()))?;
            record(&mut origins, &values, |_| Origin::File(path.clone()));
            builder = builder.add_source(file);
        }
        let variables = self.environment.iter().filter(|(name, _)| name.starts_with("TANDEM__"));
        let environment = Environment::with_prefix("TANDEM")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .source(Some(variables.cloned().collect()));
        record(&mut origins, &environment.collect()?, |key| {
            Origin::Environment(format!("TANDEM__{}", key.to_uppercase().replace('.', "__")))
        });
        builder = builder.add_source(environment);
        for (key, value) in &self.flags {
            builder = builder.set_override(key, typed(value))?;
            origins.insert(key.clone(), Origin::Flag);
        }
        if let Some((key, origin)) = origins.iter().find(|(key, _)| !known.contains(key)) {
            let nearest = nearest(key, &known);
            return Err(anyhow!("{key} ({origin}) is no setting; did you mean {nearest}?"));
        }
        let config: Config =
            builder.build()?.try_deserialize().context("the configuration does not fit")?;
        config.validate().map_err(|error| {
            let origin = origins.get(&error.field).unwrap_or(&Origin::Default);
            anyhow!("{error} (from {origin})")
        })?;
        Ok(Settings { config, origins })
    }
}

/// A flag's text as the type that it spells.
fn typed(text: &str) -> Value {
    let kind = if let Ok(value) = text.parse::<bool>() {
        ValueKind::Boolean(value)
    } else if let Ok(value) = text.parse::<i64>() {
        ValueKind::I64(value)
    } else if let Ok(value) = text.parse::<f64>() {
        ValueKind::Float(value)
    } else {
        ValueKind::String(text.to_owned())
    };
    Value::new(None, kind)
}

fn record(
    origins: &mut BTreeMap<String, Origin>,
    values: &Map<String, Value>,
    origin: impl Fn(&str) -> Origin,
) {
    let mut pending: Vec<(String, &Value)> =
        values.iter().map(|(key, value)| (key.clone(), value)).collect();
    while let Some((key, value)) = pending.pop() {
        if let ValueKind::Table(table) = &value.kind {
            pending.extend(table.iter().map(|(inner, value)| (format!("{key}.{inner}"), value)));
        } else {
            let origin = origin(&key);
            origins.insert(key, origin);
        }
    }
}

/// The known key that shares most with a mistyped one.
fn nearest<'a>(key: &str, known: &'a [String]) -> &'a str {
    let score = |candidate: &String| {
        let same = candidate.chars().zip(key.chars()).take_while(|(a, b)| a == b).count();
        let tail = candidate.chars().rev().zip(key.chars().rev()).take_while(|(a, b)| a == b);
        same + tail.count()
    };
    known.iter().max_by_key(|candidate| score(candidate)).map_or("", String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn later_layers_win_and_origins_say_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        std::fs::write(&path, "[cpu]\nthreads = 3\npin = false\n[kv]\nblock_tokens = 64\n")
            .unwrap();
        let layers = Layers {
            file: Some(path.clone()),
            environment: vec![pair("TANDEM__CPU__THREADS", "5"), pair("OTHER", "x")],
            flags: vec![pair("kv.block_tokens", "16")],
        };
        let settings = layers.load().unwrap();
        assert_eq!(settings.config.cpu.threads, 5);
        assert!(!settings.config.cpu.pin);
        assert_eq!(settings.config.kv.block_tokens, 16);
        assert_eq!(settings.origins["cpu.pin"], Origin::File(path));
        let variable = Origin::Environment("TANDEM__CPU__THREADS".into());
        assert_eq!(settings.origins["cpu.threads"], variable);
        assert_eq!(settings.origins["kv.block_tokens"], Origin::Flag);
        assert_eq!(settings.origins["stream.window_bytes"], Origin::Default);
    }

    #[test]
    fn every_profile_fits() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/profiles");
        for entry in std::fs::read_dir(folder).unwrap() {
            let layers = Layers { file: Some(entry.unwrap().path()), ..Layers::default() };
            let settings = layers.load().unwrap();
            assert_ne!(settings.config, Config::default(), "{layers:?}");
        }
    }

    #[test]
    fn a_mistyped_key_is_named_with_its_neighbour() {
        let layers = Layers { flags: vec![pair("cpu.thread", "2")], ..Layers::default() };
        let message = layers.load().unwrap_err().to_string();
        assert!(message.contains("cpu.thread (flag)"), "{message}");
        assert!(message.contains("cpu.threads"), "{message}");
    }

    #[test]
    fn a_value_out_of_range_names_key_and_origin() {
        let environment = vec![pair("TANDEM__KV__BLOCK_TOKENS", "17")];
        let message = Layers { environment, ..Layers::default() }.load().unwrap_err().to_string();
        assert!(message.contains("kv.block_tokens"), "{message}");
        assert!(message.contains("TANDEM__KV__BLOCK_TOKENS"), "{message}");
    }
}
