//! Turns what criterion measured into one table and one plot, `benches/results.md` and `benches/results.svg`, with the
//! machine described.
//!
//!     cargo bench -p opt-benches --features tch,candle,wgpu
//!     cargo run -p opt-benches --bin report              # ours alone
//!     cargo run -p opt-benches --bin report -- DIR       # beside transformers and CTranslate2 of the environment DIR
//!
//! Peers are measured here and now (`peers.py`): run both commands on the same idle machine, one after the other.

use opt_benches::{machine, save};
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    error::Error,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// One figure: how long one run of `group` took.
#[derive(Debug, Clone, Deserialize)]
struct Figure {
    group: String,
    name: String,
    /// The median.
    seconds: f64,
    /// Tokens of one run, where the figure is a rate.
    tokens: Option<u64>,
}

/// The groups in their order, and what their figures are.
const GROUPS: [(&str, &str); 6] = [
    ("load", "s"),
    ("first token", "s"),
    ("prefill 128", "tokens/s"),
    ("prefill 512", "tokens/s"),
    ("decode, batch 1", "tokens/s"),
    ("decode, batch 8", "tokens/s"),
];

impl Figure {
    /// In the unit of its group.
    fn value(&self) -> f64 {
        self.tokens.map_or(self.seconds, |tokens| tokens as f64 / self.seconds)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let benches = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| benches.join("../target"), PathBuf::from);
    let mut figures = criterion(&target.join("criterion"))?;
    if figures.is_empty() {
        return Err("no figures: expected target/criterion, made by cargo bench -p opt-benches".into());
    }
    if let Some(environment) = std::env::args_os().nth(1) {
        figures.extend(peers(&benches.join("peers.py"), Path::new(&environment))?);
    }
    let table = table(&figures, &machine());
    print!("{table}");
    save(&benches.join("results.md"), &table)?;
    let file = benches.join("results.svg");
    save(&file, &plot(&figures)?)?;
    println!("\n{}", file.display());
    Ok(())
}

/// What the last run of criterion left: `GROUP/NAME/new/{benchmark,estimates}.json`.
fn criterion(folder: &Path) -> Result<Vec<Figure>, Box<dyn Error>> {
    #[derive(Deserialize)]
    struct Benchmark {
        group_id: String,
        value_str: Option<String>,
        throughput: Option<BTreeMap<String, u64>>,
    }
    #[derive(Deserialize)]
    struct Estimates {
        median: Estimate,
    }
    #[derive(Deserialize)]
    struct Estimate {
        /// Nanoseconds.
        point_estimate: f64,
    }
    let mut figures = Vec::new();
    for group in folders(folder)? {
        for bench in folders(&group)? {
            let (benchmark, estimates) = (bench.join("new/benchmark.json"), bench.join("new/estimates.json"));
            if !benchmark.exists() {
                continue;
            }
            let benchmark: Benchmark = serde_json::from_str(&fs::read_to_string(benchmark)?)?;
            let estimates: Estimates = serde_json::from_str(&fs::read_to_string(estimates)?)?;
            figures.push(Figure {
                group: benchmark.group_id,
                name: benchmark.value_str.unwrap_or_default(),
                seconds: estimates.median.point_estimate * 1e-9,
                tokens: benchmark.throughput.and_then(|t| t.get("Elements").copied()),
            });
        }
    }
    figures.retain(|figure| GROUPS.iter().any(|(group, _)| *group == figure.group));
    Ok(figures)
}

fn folders(parent: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    if !parent.exists() {
        return Ok(Vec::new());
    }
    let mut folders: Vec<PathBuf> =
        fs::read_dir(parent)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    folders.retain(|path| path.is_dir());
    folders.sort();
    Ok(folders)
}

/// Runs the script in its environment.
fn peers(script: &Path, environment: &Path) -> Result<Vec<Figure>, Box<dyn Error>> {
    let output = Command::new(environment.join("bin/python")).arg(script).arg(environment).output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}", script.display(), text.lines().last().unwrap_or_default()).into());
    }
    let lines = String::from_utf8(output.stdout)?;
    Ok(lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// Names in the order of the build, ours before peers.
fn names(figures: &[Figure]) -> Vec<&str> {
    let rank = |name: &str| {
        let place = |prefix: &&str| name.starts_with(*prefix);
        ["cpu", "tch", "candle", "wgpu"].iter().position(place).unwrap_or(4)
    };
    let mut names: Vec<&str> = figures.iter().map(|figure| figure.name.as_str()).collect();
    names.sort_by_key(|name| (rank(name), *name));
    names.dedup();
    names
}

fn find<'a>(figures: &'a [Figure], group: &str, name: &str) -> Option<&'a Figure> {
    figures.iter().find(|figure| figure.group == group && figure.name == name)
}

fn table(figures: &[Figure], machine: &str) -> String {
    let mut text = format!("OPT-125m shape, random weights, on {machine}.\n\n|");
    for (group, unit) in GROUPS {
        let _ = write!(text, " | {group} ({unit})");
    }
    let _ = writeln!(text, " |\n|---{}|", "|---".repeat(GROUPS.len()));
    for name in names(figures) {
        let _ = write!(text, "| {name}");
        for (group, unit) in GROUPS {
            let _ = match find(figures, group, name).map(Figure::value) {
                None => write!(text, " |"),
                Some(value) if unit == "s" => write!(text, " | {value:.3}"),
                Some(value) => write!(text, " | {value:.1}"),
            };
        }
        text.push_str(" |\n");
    }
    text
}

/// One panel a group, one bar a name, as SVG.
fn plot(figures: &[Figure]) -> Result<String, Box<dyn Error>> {
    let names = names(figures);
    let height = 60 + 22 * names.len() as u32;
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (1000, 3 * height)).into_drawing_area();
    root.fill(&WHITE)?;
    for ((group, unit), area) in GROUPS.iter().zip(root.split_evenly((3, 2))) {
        let values: Vec<Option<f64>> =
            names.iter().map(|name| find(figures, group, name).map(Figure::value)).collect();
        let largest = values.iter().flatten().fold(0.0f64, |a, b| a.max(*b)).max(f64::MIN_POSITIVE);
        let title = ("sans-serif", 16).into_font();
        area.draw(&Text::new(format!("{group} ({unit})"), (12, 8), title))?;
        let (label, bar) = (150, 260.0);
        for (row, (name, value)) in names.iter().zip(&values).enumerate() {
            let (top, color) = (36 + 22 * row as i32, Palette99::pick(row).to_rgba());
            let right = TextStyle::from(("sans-serif", 13).into_font()).pos(Pos::new(HPos::Right, VPos::Top));
            area.draw(&Text::new((*name).to_owned(), (label - 8, top), right))?;
            let Some(value) = value else { continue };
            let end = label + (bar * value / largest).max(1.0) as i32;
            area.draw(&Rectangle::new([(label, top), (end, top + 14)], color.filled()))?;
            let shown = if *unit == "s" { format!("{value:.3}") } else { format!("{value:.0}") };
            area.draw(&Text::new(shown, (end + 6, top), ("sans-serif", 13).into_font()))?;
        }
    }
    root.present()?;
    drop(root);
    Ok(svg)
}
