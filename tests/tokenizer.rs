//! Tokenizers and chat templates against published cases, a whole-text decoder, and hostile input.

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
