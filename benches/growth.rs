//! How the CPU backend's cost grows with context, prompt and batch, beside what counting bytes and operations says:
//! `growth.md` and `growth.svg` in OUT_DIR, without one in this folder.
//!
//!     cargo run --release -p opt-benches --bin random_model -- MODEL_DIR
//!     cargo run --release -p opt-benches --bin growth -- MODEL_DIR [OUT_DIR]
//!
//! The weights are held as f32 and, quantized while they are loaded, as int8. All points take turns within each round,
//! so that a slow minute does not hit one point only.

use opt_benches::{bandwidth, caches, ids, machine, median, save, step};
use opt_core::{
    Load, Opt,
    backends::{self, BackendOptions},
    checkpoint::Checkpoint,
    config::OptConfig,
    engine::KvCache,
    quantize::QuantSpec,
};
use plotters::{
    coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter},
    element::DashedPathElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::{error::Error, fmt::Write, fs, ops::Range, path::PathBuf, process::ExitCode, time::Instant};

/// Positions in the cache after the last measured step, at batch 1.
const CONTEXTS: [usize; 7] = [64, 128, 256, 512, 1024, 1536, 2000];
/// Tokens of a prompt.
const PROMPTS: [usize; 6] = [64, 128, 256, 512, 1024, 2048];
/// The one of [`PROMPTS`] that gives the rate of arithmetic.
const FITTED: usize = 512;
/// Sequences of a step, each with [`BATCH_CONTEXT`] positions.
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const BATCH_CONTEXT: usize = 128;

/// Rounds, the first of which warms up.
const ROUNDS: usize = 12;
/// Steps of decoding in each round.
const STEPS: usize = 8;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("growth: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (folder, out) = match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(folder), out, None) => (folder, out.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into())),
        _ => return Err("usage: growth MODEL_DIR [OUT_DIR]".into()),
    };
    fs::create_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let checkpoint = Checkpoint::open(&folder)?;
    let config = checkpoint.config().clone();
    let (found, longest) = (config.max_position_embeddings, PROMPTS[PROMPTS.len() - 1]);
    if found < longest {
        let place = folder.display();
        return Err(format!("{place}: expected a context of at least {longest}, found {found}").into());
    }
    let mut models = [None, Some(QuantSpec::int8())]
        .into_iter()
        .map(|spec| Model::load(&checkpoint, spec))
        .collect::<opt_core::Result<Vec<_>>>()
        .map_err(|e| format!("{}: {e}", folder.display()))?;
    drop(checkpoint);

    let mut speeds = Vec::new();
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        speeds.push(bandwidth());
        measure(&mut models)?;
        if round == 1 {
            models.iter_mut().for_each(|model| model.times = Times::default());
        }
    }
    let speed = median(speeds);
    let panels = panels(&models, speed);
    let text = document(&panels, &models, speed);
    print!("{text}");
    save(&out.join("growth.md"), &text)?;
    let file = out.join("growth.svg");
    save(&file, &plot(&panels)?)?;
    println!("\n{}", file.display());
    Ok(())
}

/// Weights held in one way, and what they took.
struct Model {
    name: &'static str,
    opt: Opt,
    cost: Cost,
    /// One cache for each of [`CONTEXTS`], [`STEPS`] positions short of it.
    contexts: Vec<KvCache>,
    /// The caches of the largest batch, as short of [`BATCH_CONTEXT`].
    batch: Vec<KvCache>,
    times: Times,
}

/// Seconds, all runs of each point.
#[derive(Default)]
struct Times {
    decode: [Vec<f64>; CONTEXTS.len()],
    prefill: [Vec<f64>; PROMPTS.len()],
    batch: [Vec<f64>; BATCHES.len()],
}

impl Model {
    fn load(checkpoint: &Checkpoint, spec: Option<QuantSpec>) -> opt_core::Result<Self> {
        let mut load = Load::with(backends::choose("cpu", &BackendOptions::default())?);
        if let Some(spec) = spec {
            load = load.quantize(spec);
        }
        let opt = Opt::assemble(checkpoint, None, None, load)?;
        let config = opt.config();
        let mut full = caches(&opt, 1)?;
        step(&opt, &mut full, &ids(CONTEXTS[CONTEXTS.len() - 1], config))?;
        let shorter = |positions: &usize| {
            let mut cache = full[0].fork()?;
            cache.truncate(positions - STEPS)?;
            Ok(cache)
        };
        let contexts = CONTEXTS.iter().map(shorter).collect::<opt_core::Result<_>>()?;
        // Each filled on its own: forks would share the memory that the batch is to read.
        let mut batch = caches(&opt, BATCHES[BATCHES.len() - 1])?;
        step(&opt, &mut batch, &ids(BATCH_CONTEXT - STEPS, config))?;
        let name = if spec.is_some() { "int8" } else { "f32" };
        let cost = Cost::of(config, spec.is_some());
        Ok(Self { name, opt, cost, contexts, batch, times: Times::default() })
    }

    /// Seconds of each of [`STEPS`] steps of a token, after which the caches are as before.
    fn steps(opt: &Opt, caches: &mut [KvCache], seconds: &mut Vec<f64>) -> opt_core::Result<()> {
        let before = caches.first().map_or(0, KvCache::len);
        for _ in 0..STEPS {
            let started = Instant::now();
            step(opt, caches, &[7])?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        caches.iter_mut().try_for_each(|cache| cache.truncate(before))
    }
}

/// One round: every point of every model, the models in turns.
fn measure(models: &mut [Model]) -> opt_core::Result<()> {
    for point in 0..CONTEXTS.len() {
        for Model { opt, contexts, times, .. } in &mut *models {
            Model::steps(opt, &mut contexts[point..=point], &mut times.decode[point])?;
        }
    }
    for (point, &tokens) in PROMPTS.iter().enumerate() {
        for Model { opt, times, .. } in &mut *models {
            let (prompt, mut cache) = (ids(tokens, opt.config()), caches(opt, 1)?);
            let started = Instant::now();
            step(opt, &mut cache, &prompt)?;
            times.prefill[point].push(started.elapsed().as_secs_f64());
        }
    }
    for (point, &rows) in BATCHES.iter().enumerate() {
        for Model { opt, batch, times, .. } in &mut *models {
            Model::steps(opt, &mut batch[..rows], &mut times.batch[point])?;
        }
    }
    Ok(())
}

/// What a model of some shape takes by counting. Norms and biases are left out, a thousandth of it.
#[derive(Clone, Copy, Default)]
struct Cost {
    /// Weights that every token is multiplied by.
    layers: f64,
    /// Weights that a token is multiplied by whose successor is asked for.
    head: f64,
    /// Bytes of both.
    weight_bytes: f64,
    /// Numbers of the keys of one position, all layers; values have as many.
    keys: f64,
}

impl Cost {
    fn of(config: &OptConfig, int8: bool) -> Self {
        let mut cost =
            Self { keys: (config.num_hidden_layers * config.hidden_size) as f64, ..Self::default() };
        for (name, shape) in config.tensor_shapes() {
            let &[out, inputs] = shape.as_slice() else { continue };
            let weights = (out * inputs) as f64;
            let head = if config.tie_word_embeddings { "embed_tokens.weight" } else { "lm_head.weight" };
            match name.as_str() {
                name if name == head => cost.head += weights,
                // Of the other tables a token reads one row.
                name if name.starts_with("embed_") => continue,
                _ => cost.layers += weights,
            }
            // A code and its part of the group's f16 scale; projections stay as they are.
            let quantized = int8 && !name.starts_with("project_");
            cost.weight_bytes += weights * if quantized { 1.0 + 2.0 / 32.0 } else { 4.0 };
        }
        cost
    }

    /// Bytes of f32 keys and values.
    fn cache_bytes(&self, positions: f64) -> f64 {
        positions * 2.0 * self.keys * 4.0
    }

    /// Operations of a prompt: scores and sums of values take as many each, over half of all pairs of tokens.
    fn prompt(&self, tokens: f64) -> f64 {
        2.0 * (tokens * self.layers + self.head) + 4.0 * self.keys * tokens * (tokens + 1.0) / 2.0
    }

    /// Operations of a step of `rows` sequences that have `positions` each.
    fn step(&self, rows: f64, positions: f64) -> f64 {
        rows * (2.0 * (self.layers + self.head) + 4.0 * self.keys * positions)
    }
}

/// One plot and its table.
struct Panel {
    title: &'static str,
    /// What `expected` is.
    theory: String,
    x: &'static str,
    y: &'static str,
    points: &'static [usize],
    /// Where the x axis is marked, both axes being powers of two if `log`.
    ticks: &'static [usize],
    log: bool,
    curves: Vec<Curve>,
}

/// Seconds of one model: the medians at each point, and what counting says of any.
struct Curve {
    name: &'static str,
    measured: Vec<f64>,
    expected: Box<dyn Fn(f64) -> f64>,
}

/// What was measured, beside theory; `speed` is that of memory in bytes a second.
fn panels(models: &[Model], speed: f64) -> [Panel; 3] {
    let medians = |times: &[Vec<f64>]| -> Vec<f64> { times.iter().cloned().map(median).collect() };
    let fitted = PROMPTS.iter().position(|tokens| *tokens == FITTED).unwrap_or(0);
    let [mut decode, mut prefill, mut batch] = [const { Vec::new() }; 3];
    for Model { name, cost, times, .. } in models {
        let cost = *cost;
        let measured = medians(&times.decode);
        let (first, shortest) = (measured[0], cost.cache_bytes(CONTEXTS[0] as f64));
        let expected = move |positions| first + (cost.cache_bytes(positions) - shortest) / speed;
        decode.push(Curve { name, measured, expected: Box::new(expected) });

        let measured = medians(&times.prefill);
        let rate = cost.prompt(PROMPTS[fitted] as f64) / measured[fitted];
        let expected = move |tokens| cost.prompt(tokens) / rate;
        prefill.push(Curve { name, measured, expected: Box::new(expected) });

        let positions = BATCH_CONTEXT as f64;
        let expected = move |rows: f64| {
            let bytes = cost.weight_bytes + rows * cost.cache_bytes(positions);
            (bytes / speed).max(cost.step(rows, positions) / rate)
        };
        batch.push(Curve { name, measured: medians(&times.batch), expected: Box::new(expected) });
    }
    let decode_theory = format!(
        "the time measured at {} positions, and the bytes of the further keys and values at the speed of memory",
        CONTEXTS[0]
    );
    let prefill_theory = format!(
        "the operations of the weights, linear, and of attention, quadratic, at the rate measured with {FITTED} tokens"
    );
    let batch_theory = format!(
        "one read of the weights and of each row's {BATCH_CONTEXT} keys and values at the speed of memory, or the \
         step's operations at the rate of the prompt of {FITTED} tokens, whichever takes longer"
    );
    [
        Panel {
            title: "Decode: context",
            theory: decode_theory,
            x: "positions in the cache",
            y: "ms a token",
            points: &CONTEXTS,
            ticks: &[0, 512, 1024, 1536, 2048],
            log: false,
            curves: decode,
        },
        Panel {
            title: "Prefill: prompt",
            theory: prefill_theory,
            x: "tokens of the prompt",
            y: "ms a prompt",
            points: &PROMPTS,
            ticks: &[0, 512, 1024, 1536, 2048],
            log: false,
            curves: prefill,
        },
        Panel {
            title: "Decode: batch",
            theory: batch_theory,
            x: "rows of the batch",
            y: "ms a step",
            points: &BATCHES,
            ticks: &BATCHES,
            log: true,
            curves: batch,
        },
    ]
}

/// All figures as Markdown.
fn document(panels: &[Panel], models: &[Model], speed: f64) -> String {
    let millions = models.first().map_or(0.0, |model| model.opt.config().parameters() as f64 * 1e-6);
    let mut text = format!(
        "A model of {millions:.0} M parameters, f32 cache, on {}. Memory is read at {:.1} GB/s; one read of the \
         weights is",
        machine(),
        speed * 1e-9
    );
    for (index, Model { name, cost, .. }) in models.iter().enumerate() {
        let (and, ms) = (if index > 0 { " and" } else { "" }, cost.weight_bytes / speed * 1e3);
        let _ = write!(text, "{and} {:.0} MB or {ms:.1} ms in {name}", cost.weight_bytes * 1e-6);
    }
    let _ = writeln!(text, ". Medians of {} rounds, in decoding of {STEPS} steps each.", ROUNDS - 1);
    for Panel { title, theory, x, y, points, curves, .. } in panels {
        let _ = write!(text, "\n## {title}\n\n{y}; expected: {theory}.\n\n| {x}");
        for Curve { name, .. } in curves {
            let _ = write!(text, " | {name} | expected | ratio");
        }
        let _ = writeln!(text, " |\n|---{}|", "|---".repeat(3 * curves.len()));
        for (index, point) in points.iter().enumerate() {
            let _ = write!(text, "| {point}");
            for Curve { measured, expected, .. } in curves {
                let (seconds, expected) = (measured[index], expected(*point as f64));
                let [ms, expected_ms] = [seconds, expected].map(|s| s * 1e3);
                let _ = write!(text, " | {ms:.2} | {expected_ms:.2} | {:.2}", seconds / expected);
            }
            text.push_str(" |\n");
        }
    }
    text
}

const COLORS: [RGBColor; 2] = [RGBColor(31, 119, 180), RGBColor(217, 95, 2)];
const FONT: &str = "sans-serif";
/// The size of the drawing, which pages show at about half of it: plotters rounds to whole pixels, and slanted lines
/// would show that.
const SIZE: (u32, u32) = (2520, 840);
/// Lines: their width, the length of a dash and of the gap behind it, the radius of a point.
const WIDTH: u32 = 4;
const DASH: (i32, i32) = (14, 8);
const RADIUS: i32 = 8;

/// The panels side by side above one legend, as SVG.
fn plot(panels: &[Panel]) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (charts, legend) = root.split_vertically(768);
    for (panel, area) in panels.iter().zip(charts.split_evenly((1, panels.len()))) {
        draw(panel, &area)?;
    }
    let names: Vec<&str> = panels.iter().flat_map(|panel| &panel.curves).map(|curve| curve.name).collect();
    let mut left = 740;
    for (name, color) in names.iter().zip(COLORS) {
        for (what, dashed) in [("measured", false), ("expected", true)] {
            let line = [(left, 28), (left + 72, 28)];
            if dashed {
                legend.draw(&DashedPathElement::new(line, DASH.0, DASH.1, color.stroke_width(WIDTH)))?;
            } else {
                legend.draw(&PathElement::new(line, color.stroke_width(WIDTH)))?;
                legend.draw(&Circle::new((left + 36, 28), RADIUS, color.filled()))?;
            }
            let style = TextStyle::from((FONT, 30).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
            legend.draw(&Text::new(format!("{name}, {what}"), (left + 88, 28), style))?;
            left += 300;
        }
    }
    root.present()?;
    drop((charts, legend, root));
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(panel: &Panel, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
    let &Panel { title, x, y, points, ticks, log, ref curves, .. } = panel;
    let xs: Vec<f64> = points.iter().map(|point| *point as f64).collect();
    let x_axis = Axis { ticks: ticks.iter().map(|tick| *tick as f64).collect(), log };
    // Near enough to each other for what is expected to look smooth.
    let samples = Axis { ticks: xs.clone(), log }.samples(40);
    let lines: Vec<[Vec<(f64, f64)>; 2]> = curves
        .iter()
        .map(|Curve { measured, expected, .. }| {
            let measured = xs.iter().zip(measured).map(|(x, seconds)| (*x, seconds * 1e3));
            [measured.collect(), samples.iter().map(|x| (*x, expected(*x) * 1e3)).collect()]
        })
        .collect();
    let heights = || lines.iter().flatten().flatten().map(|point| point.1);
    let y_axis = Axis::over(heights().fold(f64::INFINITY, f64::min), heights().fold(0.0, f64::max), log);

    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 36))
        .margin(20)
        .margin_right(44)
        .x_label_area_size(88)
        .y_label_area_size(116)
        .build_cartesian_2d(x_axis, y_axis)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12).stroke_width(2))
        .axis_style(BLACK.mix(0.5).stroke_width(2))
        .set_all_tick_mark_size(10)
        .label_style((FONT, 28))
        .axis_desc_style((FONT, 30))
        .x_desc(x)
        .y_desc(y)
        .draw()?;
    for ([measured, expected], color) in lines.into_iter().zip(COLORS) {
        let line = color.stroke_width(WIDTH);
        chart.draw_series([DashedPathElement::new(expected, DASH.0, DASH.1, line)])?;
        chart.draw_series([PathElement::new(measured.clone(), line)])?;
        chart.draw_series(measured.into_iter().map(|point| Circle::new(point, RADIUS, color.filled())))?;
    }
    Ok(())
}

/// An axis from its first mark to its last. (Those of plotters do not mark powers of two.)
struct Axis {
    ticks: Vec<f64>,
    log: bool,
}

impl Axis {
    /// Marks around `least` and `most`: powers of two, or some steps from zero.
    fn over(least: f64, most: f64, log: bool) -> Self {
        let ticks = if log {
            (least.log2().floor() as i32..=most.log2().ceil() as i32).map(f64::from).map(f64::exp2).collect()
        } else {
            let step = nice(most / 6.0);
            (0..=(most / step).ceil() as i32).map(|i| f64::from(i) * step).collect()
        };
        Self { ticks, log }
    }

    fn place(&self, value: f64) -> f64 {
        if self.log { value.log2() } else { value }
    }

    /// Values that divide the axis into so many parts of one length.
    fn samples(&self, parts: u32) -> Vec<f64> {
        let Range { start, end } = self.range();
        let (first, last) = (self.place(start), self.place(end));
        let at = |i: u32| first + (last - first) * f64::from(i) / f64::from(parts);
        (0..=parts).map(at).map(|place| if self.log { place.exp2() } else { place }).collect()
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (near, far): (i32, i32)) -> i32 {
        let Range { start, end } = self.range();
        let [value, start, end] = [*value, start, end].map(|value| self.place(value));
        near + (f64::from(far - near) * (value - start) / (end - start)).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, _: H) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.ticks[0]..self.ticks[self.ticks.len() - 1]
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        // Steps such as 0.1 add up to what is near a decimal number only.
        format!("{}", (value * 1e6).round() / 1e6)
    }
}

/// The next of 1, 2, 5, 10, 20, ...
fn nice(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|n| n * power).find(|nice| *nice >= step).unwrap_or(10.0 * power)
}
