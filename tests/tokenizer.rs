//! Tokenizers and chat templates against published cases, a whole-text decoder, and hostile input.

#[path = "tokenizer/files.rs"]
mod files;
#[path = "tokenizer/golden.rs"]
mod golden;
