//! BLEU, chrF and TER against sacrebleu.

mod common;

use common::{close, of, pairs, read, rows};
use opt_metrics::{
    bleu::{Bleu, BleuOptions, BleuTokenizer, Smoothing, self_bleu},
    chrf::{Chrf, ChrfOptions},
    reference_count,
    ter::{Ter, TerOptions},
};
use serde_json::Value;

fn flag(options: &Value, name: &str) -> bool {
    options[name].as_bool().unwrap_or(false)
}

fn size(options: &Value, name: &str, default: usize) -> usize {
    options[name].as_u64().map_or(default, |n| n as usize)
}

/// sacrebleu's signature but for its version.
fn without_version(signature: &str) -> &str {
    signature.rsplit_once("|version").unwrap().0
}

fn bleu_of(o: &Value) -> Bleu {
    let mut options = BleuOptions::default();
    if let Some(name) = o["tokenize"].as_str() {
        options.tokenizer = BleuTokenizer::from_name(name).unwrap();
    }
    let value = o["smooth_value"].as_f64();
    options.smoothing = match o["smooth_method"].as_str() {
        Some("none") => Smoothing::None,
        Some("floor") => Smoothing::Floor(value.unwrap_or(0.1)),
        Some("add-k") => Smoothing::AddK(value.unwrap_or(1.0)),
        _ => Smoothing::Exp,
    };
    options.max_order = size(o, "max_ngram_order", 4);
    options.effective_order = flag(o, "effective_order");
    options.lowercase = flag(o, "lowercase");
    Bleu::new(options).unwrap()
}

#[test]
fn bleu_equals_sacrebleu() {
    let (hypotheses, references) = pairs();
    let first: Vec<&[String]> = references.iter().map(|r| &r[..1]).collect();
    for row in rows(&read("bleu.json")) {
        let bleu = bleu_of(&row["options"]);
        let what = row["options"].to_string();
        let many = bleu.corpus(&hypotheses, &references).unwrap();
        let single = bleu.corpus(&hypotheses, &first).unwrap();
        for (found, expected) in [(&many, &row["corpus"]), (&single, &row["single"])] {
            close(found.score, of(&expected[0]), &what);
            close(found.brevity_penalty, of(&expected[1]), &what);
            assert_eq!(found.hypothesis_length, of::<u64>(&expected[2]), "{what}");
            assert_eq!(found.reference_length, of::<u64>(&expected[3]), "{what}");
            let lists = [(&found.counts, 4), (&found.totals, 5), (&found.precisions, 6)];
            for (list, place) in lists {
                let wanted: Vec<f64> = of(&expected[place]);
                assert_eq!(list.len(), wanted.len(), "{what}");
                list.iter().zip(wanted).for_each(|(a, b)| close(*a, b, &what));
            }
        }
        assert_eq!(many.to_string(), of::<String>(&row["text"]));
        let signature = bleu.signature(reference_count(&references));
        assert_eq!(without_version(&signature), without_version(row["signature"].as_str().unwrap()));
        for (i, expected) in rows(&row["sentences"]).iter().enumerate() {
            let found = bleu.sentence(&hypotheses[i], &references[i]).unwrap();
            close(found.score, of(expected), &format!("{what} sentence {i}"));
        }
    }
}

#[test]
fn tokens_equal_sacrebleus() {
    let (hypotheses, _) = pairs();
    let fixture = read("tokens.json");
    for name in ["13a", "intl"] {
        let tokenizer = BleuTokenizer::from_name(name).unwrap();
        for (text, expected) in hypotheses.iter().zip(rows(&fixture[name])) {
            let trimmed =
                text.trim_end_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c));
            assert_eq!(tokenizer.tokenize(trimmed), of::<Vec<String>>(expected), "{name} {text:?}");
        }
    }
}

#[test]
fn chrf_equals_sacrebleu() {
    let (hypotheses, references) = pairs();
    let first: Vec<&[String]> = references.iter().map(|r| &r[..1]).collect();
    for row in rows(&read("chrf.json")) {
        let o = &row["options"];
        let mut options = ChrfOptions::default();
        options.char_order = size(o, "char_order", 6);
        options.word_order = size(o, "word_order", 0);
        options.beta = o["beta"].as_f64().unwrap_or(2.0);
        options.lowercase = flag(o, "lowercase");
        options.whitespace = flag(o, "whitespace");
        options.eps_smoothing = flag(o, "eps_smoothing");
        let chrf = Chrf::new(options).unwrap();
        let what = o.to_string();
        let found = chrf.corpus(&hypotheses, &references).unwrap();
        close(found.score, of(&row["corpus"][0]), &what);
        close(chrf.corpus(&hypotheses, &first).unwrap().score, of(&row["single"][0]), &what);
        assert_eq!(found.to_string(), of::<String>(&row["text"]));
        let signature = chrf.signature(reference_count(&references));
        assert_eq!(without_version(&signature), without_version(row["signature"].as_str().unwrap()));
        for (i, expected) in rows(&row["sentences"]).iter().enumerate() {
            let found = chrf.sentence(&hypotheses[i], &references[i]).unwrap();
            close(found.score, of(expected), &format!("{what} sentence {i}"));
        }
    }
}

#[test]
fn ter_equals_sacrebleu() {
    let (hypotheses, references) = pairs();
    let first: Vec<&[String]> = references.iter().map(|r| &r[..1]).collect();
    for row in rows(&read("ter.json")) {
        let o = &row["options"];
        let mut options = TerOptions::default();
        options.normalized = flag(o, "normalized");
        options.no_punct = flag(o, "no_punct");
        options.asian_support = flag(o, "asian_support");
        options.case_sensitive = flag(o, "case_sensitive");
        let ter = Ter::new(options);
        let what = o.to_string();
        for (i, expected) in rows(&row["sentences"]).iter().enumerate() {
            let found = ter.sentence(&hypotheses[i], &references[i]).unwrap();
            close(found.score, of(expected), &format!("{what} sentence {i}"));
        }
        let many = ter.corpus(&hypotheses, &references).unwrap();
        let single = ter.corpus(&hypotheses, &first).unwrap();
        for (found, expected) in [(&many, &row["corpus"]), (&single, &row["single"])] {
            close(found.score, of(&expected[0]), &what);
            assert_eq!(found.edits, of::<u64>(&expected[1]), "{what}");
            close(found.reference_length, of(&expected[2]), &what);
        }
        assert_eq!(many.to_string(), of::<String>(&row["text"]));
        let signature = ter.signature(reference_count(&references));
        assert_eq!(without_version(&signature), without_version(row["signature"].as_str().unwrap()));
    }
}

#[test]
fn self_bleu_is_the_mean_of_sentences_against_all_others() {
    let (texts, _) = pairs();
    let texts: Vec<&String> = texts.iter().filter(|t| t.len() < 300).take(60).collect();
    let mut options = BleuOptions::default();
    options.effective_order = true;
    let bleu = Bleu::new(options).unwrap();
    let mut sum = 0.0;
    for (i, text) in texts.iter().enumerate() {
        let others: Vec<&String> =
            texts.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, t)| *t).collect();
        sum += bleu.sentence(text, &others).unwrap().score;
    }
    close(self_bleu(&bleu, &texts).unwrap(), sum / texts.len() as f64, "self-BLEU");
}

#[test]
fn what_cannot_be_scored_is_an_error_in_one_line() {
    let none: [&str; 0] = [];
    let errors = [
        Bleu::default().sentence("a", &none).unwrap_err().to_string(),
        Bleu::default().corpus(&none, &[["a"]]).unwrap_err().to_string(),
        Chrf::default().corpus(&["a"], &[["a"], ["b"]]).unwrap_err().to_string(),
        Ter::default().corpus(&["a", "b"], &[vec!["a"], vec![]]).unwrap_err().to_string(),
        self_bleu(&Bleu::default(), &["a"]).unwrap_err().to_string(),
    ];
    assert_eq!(errors[0], "references of a hypothesis: at least 1 needed, 0 given");
    assert_eq!(errors[2], "hypotheses and lists of references: 1 and 2, as many of both expected");
    for error in errors {
        assert!(!error.contains('\n'), "{error}");
    }
    for bad in [f64::NAN, -1.0, f64::INFINITY] {
        let mut options = BleuOptions::default();
        options.smoothing = Smoothing::Floor(bad);
        assert!(Bleu::new(options).is_err());
        let mut options = ChrfOptions::default();
        options.beta = bad;
        assert!(Chrf::new(options).is_err());
    }
    for order in [0, 65, usize::MAX] {
        let mut options = BleuOptions::default();
        options.max_order = order;
        assert!(Bleu::new(options).is_err());
    }
}
