//! Texts that keep a form: JSON under a schema, and a pattern.

use opt_core::{Opt, Request, Result, constraint::Constraint, generation::GenerationConfig};
use serde_json::json;

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    // Bounded on all sides: a small model would rather go on.
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9})?$"},
            "age": {"type": "integer", "minimum": 18, "maximum": 90},
            "mood": {"enum": ["merry", "grave", "weary"]},
        },
        "required": ["name", "age", "mood"],
        "additionalProperties": false,
    });
    let person = Constraint::json_schema(&opt, &schema)?;
    let time = Constraint::regex(&opt, r" (one|two|three|seven|twelve) o'clock in the (morning|evening)\.")?;

    let settings = GenerationConfig::default().max_new_tokens(80);
    let drawn = settings.clone().do_sample(true).seed(3).num_return_sequences(3);
    let requests = [
        Request::new("The captain: ").config(drawn).constrain(&person),
        Request::new("The train came at").config(settings.num_beams(4)).constrain(&time),
    ];
    for generated in opt.generate_batch(requests)? {
        for sequence in generated.sequences {
            println!("{}", sequence.text.unwrap_or_default());
        }
    }
    Ok(())
}
