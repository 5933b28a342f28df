//! The demo as a picture: needles found against the share of the cache removed.

use super::Run;
use anyhow::{Result, anyhow};
use plotters::prelude::*;

const SIZE: (u32, u32) = (720, 400);
const TEXT: (&str, u32) = ("sans-serif", 14);
const KVZAP: RGBColor = RGBColor(37, 99, 235);
const OTHERS: RGBColor = RGBColor(120, 120, 120);

/// An SVG of `runs` over `asked` needles: KVzap's thresholds as a line, every other method as a point.
pub(super) fn draw(runs: &[Run], asked: usize) -> Result<String> {
    let mut svg = String::new();
    chart(&mut svg, runs, asked).map_err(|error| anyhow!("cannot draw the picture: {error}"))?;
    Ok(svg)
}

fn chart(svg: &mut String, runs: &[Run], asked: usize) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let top = asked as f64;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..1.0, 0.0..top * 1.1)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .x_desc("share of the cache removed")
        .y_desc(format!("needles found, of {asked}"))
        .x_label_formatter(&|share| format!("{:.0} %", 100.0 * share))
        .y_label_formatter(&|count| format!("{count:.0}"))
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .draw()?;
    let mut runs = runs.iter().collect::<Vec<_>>();
    runs.sort_by(|a, b| a.removed.total_cmp(&b.removed));
    let mut line = Vec::new();
    for run in runs {
        let Some(right) = run.right else { continue };
        let at = (run.removed, right as f64);
        let (colour, label, beside) = match run.threshold {
            None => (OTHERS, run.method.to_owned(), (9, -7)),
            Some(threshold) if line.is_empty() => {
                (KVZAP, format!("KVzap, τ = {threshold}"), (-70, -22))
            }
            // Above and below by turns, since they may lie close.
            Some(threshold) if line.len() % 2 == 1 => (KVZAP, threshold.to_string(), (-12, 10)),
            Some(threshold) => (KVZAP, threshold.to_string(), (-12, -22)),
        };
        line.extend(run.threshold.map(|_| at));
        chart.draw_series([Circle::new(at, 4, colour.filled())])?;
        let text = Text::new(label, beside, TEXT.into_font().color(&colour));
        chart.draw_series([EmptyElement::at(at) + text])?;
    }
    chart.draw_series(LineSeries::new(line, KVZAP.stroke_width(2)))?;
    root.present()?;
    Ok(())
}
