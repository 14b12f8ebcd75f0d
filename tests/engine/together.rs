//! The same answers together: many clients at once get what each would get alone.

use super::rig::{config, tiny_model_file};
use std::path::{Path, PathBuf};
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::request::{Request, SamplingParams};

const CLIENTS: usize = 64;
const TOKENS: usize = 32;

fn subjects() -> impl Iterator<Item = String> {
    let places = ["sea", "forest", "city", "desert", "mountain", "river", "library", "moon"];
    let openings = [
        "Once upon a time by the",
        "The most surprising fact about the",
        "def describe_the_",
        "Dear friend, yesterday I went to the",
        "List three words about the",
        "In 1923, a scientist studying the",
        "Q: What is the colour of the",
        "\"Stop!\" she cried from the",
    ];
    openings.into_iter().flat_map(move |opening| places.map(|place| format!("{opening} {place}")))
}

fn request(prompt: &str) -> Request {
    let mut request = Request::text(prompt).max_tokens(TOKENS).sampling(SamplingParams::greedy());
    request.ignore_eos = true;
    request
}

async fn assert_same_together(path: PathBuf, config: Config) {
    let engine = Engine::builder().model(path).config(config).build().await.unwrap();
    let prompts: Vec<String> = subjects().take(CLIENTS).collect();
    assert_eq!(prompts.len(), CLIENTS);
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(engine.generate(request(prompt)).collect_text().await.unwrap());
    }
    let together: Vec<_> = prompts
        .iter()
        .map(|prompt| tokio::spawn(engine.generate(request(prompt)).collect_text()))
        .collect();
    for (number, task) in together.into_iter().enumerate() {
        let text = task.await.unwrap().unwrap();
        assert_eq!(text, alone[number], "{:?}", prompts[number]);
    }
    let stats = engine.stats();
    assert_eq!(stats.metrics.completion_tokens as usize, 2 * CLIENTS * TOKENS);
    assert!(stats.metrics.step_tokens > stats.metrics.steps, "steps were shared");
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_clients_of_a_tiny_model_get_the_answers_they_get_alone() {
    assert_same_together(tiny_model_file(), config()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_clients_of_smollm2_get_the_answers_they_get_alone() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models");
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        assert!(
            std::env::var_os("TANDEM_REQUIRE_MODELS").is_none(),
            "{} is missing",
            path.display()
        );
        eprintln!("skipped: {} is missing", path.display());
        return;
    }
    assert_same_together(path, Config::default()).await;
}
