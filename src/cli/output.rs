//! What a person or a program sees: text on a terminal, JSON lines on request, progress bars only
//! where somebody watches. Colours follow NO_COLOR and the terminal.

use super::failure::{exit_code, sentence};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};

/// How to print, decided once per run.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON lines instead of text.
    pub json: bool,
    /// No progress bars, no notices.
    pub quiet: bool,
    /// ANSI colours on standard output.
    pub color: bool,
    /// ANSI colours and progress bars on standard error.
    pub color_errors: bool,
}

impl Output {
    /// Looks at the two streams and at `NO_COLOR` (<https://no-color.org>: set and not empty).
    pub fn detect(json: bool, quiet: bool, no_color: Option<&str>) -> Self {
        let color = no_color.is_none_or(str::is_empty) && !json;
        Self {
            json,
            quiet,
            color: color && std::io::stdout().is_terminal(),
            color_errors: color && std::io::stderr().is_terminal(),
        }
    }

    /// Dim text on standard error, for what is no part of the answer.
    ///
    /// # Errors
    /// Standard error is closed.
    pub fn notice(&self, text: &str) -> std::io::Result<()> {
        let mut stream = std::io::stderr().lock();
        match (self.quiet, self.color_errors) {
            (true, _) => Ok(()),
            (false, true) => writeln!(stream, "\x1b[2m{text}\x1b[0m"),
            (false, false) => writeln!(stream, "{text}"),
        }
    }

    /// Why the command failed, on standard error: a sentence, or an object with `--json`.
    pub fn failure(&self, error: &anyhow::Error) {
        let mut stream = std::io::stderr().lock();
        let message = sentence(error);
        // Nobody is left to be told that standard error is closed.
        let _ = match (self.json, self.color_errors) {
            (true, _) => {
                let code = exit_code(error);
                let object = serde_json::json!({ "error": message, "exit_code": code });
                writeln!(stream, "{object}")
            }
            (false, true) => writeln!(stream, "\x1b[31mtandem: {message}\x1b[0m"),
            (false, false) => writeln!(stream, "tandem: {message}"),
        };
    }

    /// One line of text.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn line(&self, text: &str) -> std::io::Result<()> {
        writeln!(std::io::stdout().lock(), "{text}")
    }

    /// A piece of an answer, at once.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn piece(&self, text: &str) -> std::io::Result<()> {
        let mut stream = std::io::stdout().lock();
        stream.write_all(text.as_bytes())?;
        stream.flush()
    }

    /// One JSON object on a line of its own.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn object(&self, value: &impl Serialize) -> std::io::Result<()> {
        let mut stream = std::io::stdout().lock();
        serde_json::to_writer(&mut stream, value)?;
        stream.write_all(b"\n")?;
        stream.flush()
    }

    /// A bold word for headings, plain where there are no colours.
    pub fn heading(&self, text: &str) -> String {
        if self.color { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A table with aligned columns; those that hold only numbers (cells that start with a digit)
    /// to the right.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn table(&self, header: &[&str], rows: &[Vec<String>]) -> std::io::Result<()> {
        let widths: Vec<usize> = (0..header.len())
            .map(|column| {
                let cells = rows.iter().map(|row| row[column].chars().count());
                cells.chain([header[column].chars().count()]).max().unwrap_or(0)
            })
            .collect();
        let is_number = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit());
        let numeric: Vec<bool> = (0..header.len())
            .map(|column| rows.iter().all(|row| is_number(&row[column])))
            .collect();
        let aligned = |cells: &[String]| {
            let cells = cells.iter().zip(&widths).zip(&numeric);
            let padded: Vec<String> = cells
                .map(|((cell, width), numeric)| match numeric {
                    true => format!("{cell:>width$}"),
                    false => format!("{cell:<width$}"),
                })
                .collect();
            padded.join("  ").trim_end().to_owned()
        };
        let heads: Vec<String> = header.iter().map(|head| (*head).to_owned()).collect();
        self.line(&self.heading(&aligned(&heads)))?;
        for row in rows {
            self.line(&aligned(row))?;
        }
        Ok(())
    }

    /// Whether a person watches standard error.
    pub fn shows_bars(&self) -> bool {
        !self.quiet && !self.json && std::io::stderr().is_terminal()
    }

    /// A bar on standard error; hidden unless a person watches.
    pub fn progress(&self, label: &str, unit: ProgressUnit) -> ProgressBar {
        if !self.shows_bars() {
            return ProgressBar::hidden();
        }
        let counts = match unit {
            ProgressUnit::Bytes => "{bytes}/{total_bytes} {bytes_per_sec}",
            ProgressUnit::Tokens => "{pos}/{len} tokens",
        };
        let template = format!("{{msg:10}} [{{bar:32}}] {counts} {{eta}}");
        let style = ProgressStyle::with_template(&template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style);
        bar.set_message(label.to_owned());
        bar
    }
}

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressUnit {
    /// Bytes of weights.
    Bytes,
    /// Tokens of a prompt or text.
    Tokens,
}
