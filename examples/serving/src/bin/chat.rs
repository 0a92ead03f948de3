//! Talks with a model over HTTP, at a terminal: what is said goes up as one growing text, and the answer comes down word by
//! word as it is made.
//!
//!     cargo run --release -p opt-cli -- serve
//!     cargo run --release -p opt-serving --bin chat -- http://127.0.0.1:8080
//!
//! OPT is no chat model: it goes on writing a text, here a dialogue of two people, and its part ends where the other one
//! would speak. A key is taken from OPT_API_KEY.

use serde_json::{Value, json};
use std::{
    error::Error,
    io::{self, BufRead, BufReader, Write},
};

const NAMES: [&str; 2] = ["\nVisitor:", "\nCaptain:"];

/// Asks for what the captain says next, prints it as it comes, and gives it back.
fn answer(server: &str, dialogue: &str) -> Result<String, Box<dyn Error>> {
    let body = json!({
        "prompt": dialogue, "stream": true, "max_tokens": 60, "temperature": 0.8, "top_p": 0.95,
        "repetition_penalty": 1.1, "stop": NAMES,
    });
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut request = agent.post(format!("{server}/v1/completions")).content_type("application/json");
    if let Ok(key) = std::env::var("OPT_API_KEY") {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let response = request.send(body.to_string())?;
    if !response.status().is_success() {
        let body: Value = serde_json::from_str(&response.into_body().read_to_string()?)?;
        return Err(format!("the server refuses: {}", body["error"]["message"]).into());
    }
    let mut said = String::new();
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line?;
        // Lines between events are empty, and those that begin with a colon keep the connection open.
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            break;
        }
        let piece: Value = serde_json::from_str(data)?;
        if let Some(message) = piece["error"]["message"].as_str() {
            return Err(format!("the answer broke off: {message}").into());
        }
        let text = piece["choices"][0]["text"].as_str().unwrap_or_default();
        print!("{text}");
        io::stdout().flush()?;
        said.push_str(text);
    }
    println!();
    Ok(said)
}

fn main() -> Result<(), Box<dyn Error>> {
    let server = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8080".to_owned());
    let server = server.trim_end_matches('/');
    let [visitor, captain] = NAMES;
    let mut dialogue = String::from("A visitor came on board and spoke with the captain of the ship.\n");
    println!("Say something to the captain; an empty line ends the conversation.");
    for line in io::stdin().lock().lines() {
        let line = line?;
        if line.trim().is_empty() {
            break;
        }
        dialogue.push_str(&format!("{visitor} {}{captain}", line.trim()));
        // Only the end of a long conversation fits into the context.
        let start = dialogue.len().saturating_sub(1000);
        let start = (start..dialogue.len()).find(|at| dialogue.is_char_boundary(*at)).unwrap_or(0);
        let said = answer(server, &dialogue[start..])?;
        dialogue.push_str(&said);
    }
    Ok(())
}
