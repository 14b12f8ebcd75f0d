//! Prompts that another implementation turned into tokens: raw with special tokens added, and chats
//! through the models' own templates.

use crate::files::model;
use serde::Deserialize;
use tandem::formats::Checkpoint;
use tandem::request::{AddSpecial, ChatMessage, ParseSpecial};
use tandem::tokenizer::{ChatTemplate, GenerationPrompt, TemplateConfig, Tokenizer};
use tandem::units::TokenId;

#[derive(Deserialize)]
struct Case {
    model: String,
    text: String,
    prompt_tokens: Vec<TokenId>,
    messages: Option<Vec<ChatMessage>>,
}

#[test]
fn prompts_and_chats_become_the_reference_s_tokens() {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("../data/golden_prompts.json")).unwrap();
    let mut opened: Vec<(String, Option<(Tokenizer, ChatTemplate)>)> = Vec::new();
    let mut checked = 0;
    for case in cases {
        if !opened.iter().any(|(name, _)| *name == case.model) {
            let built = model(&case.model).map(|path| {
                let checkpoint = Checkpoint::open(&path).unwrap();
                let metadata = checkpoint.metadata();
                let tokenizer = Tokenizer::from_metadata(metadata).unwrap();
                let config = TemplateConfig::default();
                let chat = ChatTemplate::from_metadata(metadata, &tokenizer, config).unwrap();
                (tokenizer, chat)
            });
            opened.push((case.model.clone(), built));
        }
        let (_, built) = opened.iter().find(|(name, _)| *name == case.model).unwrap();
        let Some((tokenizer, template)) = built else { continue };
        let ids = match &case.messages {
            Some(messages) => {
                let rendered = template.render(messages, GenerationPrompt::Add).unwrap();
                assert_eq!(rendered.text, case.text, "{}", case.model);
                tokenizer.encode_chat(&rendered).unwrap()
            }
            None => {
                tokenizer.encode(&case.text, AddSpecial::ModelDefault, ParseSpecial::No).unwrap()
            }
        };
        assert_eq!(ids, case.prompt_tokens, "{}: {:?}", case.model, case.text);
        checked += 1;
    }
    println!("{checked} prompts checked");
}
