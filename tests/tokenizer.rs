//! Tokenizers and chat templates against published cases, a whole-text decoder, and hostile input.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "tokenizer/decoding.rs"]
mod decoding;
#[path = "tokenizer/encoding.rs"]
mod encoding;
#[path = "tokenizer/files.rs"]
mod files;
#[path = "tokenizer/golden.rs"]
mod golden;
#[path = "tokenizer/prompts.rs"]
mod prompts;
#[path = "tokenizer/templates.rs"]
mod templates;
#[path = "tokenizer/vocabularies.rs"]
mod vocabularies;
