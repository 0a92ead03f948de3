//! Learning rates beside transformers'.

mod common;

use common::fixtures;
use opt_core::tuning::schedule::{LearningRate, Schedule};

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    settings: Settings,
    lr: f64,
    warmup: u64,
    steps: u64,
    rates: Vec<f64>,
}

#[derive(serde::Deserialize)]
struct Settings {
    min_lr_rate: Option<f64>,
    power: Option<f64>,
    lr_end: Option<f64>,
}

#[test]
fn rates_are_those_of_transformers() {
    let file = std::fs::read(fixtures().join("tuning/schedules.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&file).unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        let schedule = match (case.name.parse().unwrap(), case.settings) {
            (Schedule::CosineWithMinLr { min }, settings) => {
                Schedule::CosineWithMinLr { min: settings.min_lr_rate.unwrap_or(min) }
            }
            (Schedule::Polynomial { power, lr_end }, settings) => Schedule::Polynomial {
                power: settings.power.unwrap_or(power),
                lr_end: settings.lr_end.unwrap_or(lr_end),
            },
            (schedule, _) => schedule,
        };
        let rate = LearningRate::new(schedule, case.lr, case.warmup, case.steps).unwrap();
        for (step, expected) in case.rates.iter().enumerate() {
            let (found, factor) = (rate.at(step as u64), rate.factor(step as u64));
            assert!(
                (found - expected).abs() <= 1e-7 * case.lr && (factor - expected / case.lr).abs() <= 1e-7,
                "{schedule:?}, warmup {} of {}, step {step}: expected {expected}, found {found}",
                case.warmup,
                case.steps
            );
        }
    }
}
