//! Results as they come: a Markdown table like llama-bench's, CSV, a JSON array or JSON lines.

use super::arguments::{Format, Test};
use super::record::{OpSplit, Record};
use crate::cli::output::Output;
use anyhow::Result;
use serde_json::Value;
use tandem::units::ByteSize;

/// Ops below this share of a test's time are left out of the table; JSON has all.
const OP_SHARE_MIN: f64 = 0.005;

/// Prints results one by one.
pub struct Printer {
    format: Format,
    output: Output,
    widths: Vec<usize>,
    /// Numbers of streams differ from 1 somewhere.
    streams: Streams,
    printed: Vec<Record>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Streams {
    One,
    Some,
}

/// Columns of the table; the last ones are numbers.
const COLUMNS: [(&str, usize); 10] = [
    ("model", 8),
    ("size", 10),
    ("params", 10),
    ("backend", 7),
    ("threads", 7),
    ("streams", 7),
    ("test", 8),
    ("t/s", 20),
    ("% DRAM", 6),
    ("% ops", 6),
];
const LEFT_COLUMNS: [usize; 2] = [0, 3];
const STREAMS_COLUMN: usize = 5;

impl Printer {
    /// A printer of the given tests of a model, whose names decide the table's widths.
    pub fn new(format: Format, output: Output, model: &str, tests: &[Test]) -> Self {
        let mut widths = COLUMNS.map(|(name, width)| name.chars().count().max(width)).to_vec();
        widths[0] = widths[0].max(model.chars().count());
        for test in tests {
            widths[6] = widths[6].max(test.label().chars().count());
        }
        let one = tests.iter().all(|test| test.streams == 1);
        let streams = if one { Streams::One } else { Streams::Some };
        Self { format, output, widths, streams, printed: Vec::new() }
    }

    /// Prints a result.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn print(&mut self, record: Record) -> Result<()> {
        let first = self.printed.is_empty();
        match self.format {
            Format::Md => {
                if first {
                    self.line(&COLUMNS.map(|(name, _)| name.to_owned()))?;
                    self.rule()?;
                }
                self.line(&cells(&record))?;
            }
            Format::Csv => {
                let fields = record.fields();
                if first {
                    let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
                    self.output.line(&names.join(","))?;
                }
                let values: Vec<_> = fields.iter().map(|(_, value)| quoted(value)).collect();
                self.output.line(&values.join(","))?;
            }
            Format::Json => {
                self.output.piece(if first { "[\n" } else { ",\n" })?;
                self.output.piece(&serde_json::to_string_pretty(&record)?)?;
            }
            Format::Jsonl => self.output.object(&record)?,
        }
        self.printed.push(record);
        Ok(())
    }

    /// Prints what comes after the last result.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn finish(&self) -> Result<()> {
        match self.format {
            Format::Json => self.output.line(if self.printed.is_empty() { "[]" } else { "\n]" })?,
            Format::Md => self.ops()?,
            Format::Csv | Format::Jsonl => {}
        }
        Ok(())
    }

    /// The columns that this table has.
    fn shown(&self) -> impl Iterator<Item = usize> + '_ {
        let hidden = |column: usize| column == STREAMS_COLUMN && self.streams == Streams::One;
        (0..COLUMNS.len()).filter(move |column| !hidden(*column))
    }

    fn line(&self, cells: &[String; COLUMNS.len()]) -> std::io::Result<()> {
        let padded = self.shown().map(|column| {
            let (cell, width) = (&cells[column], self.widths[column]);
            match LEFT_COLUMNS.contains(&column) {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            }
        });
        self.output.line(&format!("| {} |", padded.collect::<Vec<_>>().join(" | ")))
    }

    fn rule(&self) -> std::io::Result<()> {
        let rules = self.shown().map(|column| match LEFT_COLUMNS.contains(&column) {
            true => "-".repeat(self.widths[column]),
            false => format!("{}:", "-".repeat(self.widths[column] - 1)),
        });
        self.output.line(&format!("| {} |", rules.collect::<Vec<_>>().join(" | ")))
    }

    /// Where the time of each test went: a second table.
    fn ops(&self) -> std::io::Result<()> {
        if self.printed.iter().all(|record| record.ops.steps == 0) {
            return Ok(());
        }
        self.output.line("")?;
        let heads = ["threads", "streams", "test", "op", "µs/step", "waiting", "share"];
        let mut rows = Vec::new();
        for record in &self.printed {
            let OpSplit { steps, times } = &record.ops;
            let total: f64 = times.iter().map(|op| op.work_ns + op.wait_ns).sum();
            for op in times {
                let share = (op.work_ns + op.wait_ns) / total;
                if share >= OP_SHARE_MIN {
                    rows.push([
                        record.setting.threads.to_string(),
                        record.test.streams.to_string(),
                        record.test.label(),
                        op.op.to_owned(),
                        format!("{:.1}", (op.work_ns + op.wait_ns) / 1e3 / *steps as f64),
                        format!("{:.1}", op.wait_ns / 1e3 / *steps as f64),
                        format!("{:.1} %", 100.0 * share),
                    ]);
                }
            }
        }
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([heads[column].chars().count()]).max().unwrap_or(0)
        };
        let widths: [usize; 7] = std::array::from_fn(width);
        let line = |cells: [&str; 7]| {
            let cells = cells.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
                if column == 3 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            self.output.line(&format!("| {} |", cells.collect::<Vec<_>>().join(" | ")))
        };
        line(heads)?;
        let rules: [String; 7] = std::array::from_fn(|column| match column {
            3 => "-".repeat(widths[column]),
            _ => format!("{}:", "-".repeat(widths[column] - 1)),
        });
        line(rules.each_ref().map(String::as_str))?;
        rows.iter().try_for_each(|row| line(row.each_ref().map(String::as_str)))?;
        match self.printed.iter().find(|record| record.setting.gpu_layers > 0) {
            Some(record) => {
                let clock = record.setting.op_clock;
                self.output.line(&format!(
                    "\nTimes by op: {clock}, so they count starts that a recorded step saves."
                ))
            }
            None => Ok(()),
        }
    }
}

fn cells(record: &Record) -> [String; COLUMNS.len()] {
    let setting = &record.setting;
    let (mean, deviation) = record.tokens_per_second();
    let percents = record.roof_percents();
    let percent = |at: usize| percents.map_or("–".to_owned(), |all| format!("{:.1}", all[at]));
    [
        setting.model.clone(),
        ByteSize(setting.weight_bytes).to_string(),
        parameters(setting.parameters),
        setting.backend.to_owned(),
        setting.threads.to_string(),
        record.test.streams.to_string(),
        record.test.label(),
        format!("{mean:.2} ± {deviation:.2}"),
        percent(0),
        percent(1),
    ]
}

/// As llama-bench writes it: `134.52 M`, `8.03 B`.
fn parameters(count: u64) -> String {
    match count {
        0..1_000_000_000 => format!("{:.2} M", count as f64 / 1e6),
        _ => format!("{:.2} B", count as f64 / 1e9),
    }
}

/// A CSV value as llama-bench writes it: always in quotes, quotes doubled.
fn quoted(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    format!("\"{}\"", text.replace('"', "\"\""))
}
