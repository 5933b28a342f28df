//! Scores against length, and how they were learned.

use super::Measured;
use crate::commands::train::curve::Point;
use anyhow::Result;
use plotters::coord::{Shift, types::RangedCoordf64};
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// Told apart by people who see fewer colours (after Okabe and Ito).
pub(super) const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(176, 70, 138),
    RGBColor(143, 109, 0),
    RGBColor(90, 90, 90),
    RGBColor(122, 81, 149),
    RGBColor(58, 134, 200),
];

type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// White, with room for what the axes say.
pub(super) fn chart<'a>(
    root: &DrawingArea<SVGBackend<'a>, Shift>,
    x: Range<f64>,
    y: Range<f64>,
) -> Result<Chart<'a>> {
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(root);
    Ok(chart.margin(14).x_label_area_size(38).y_label_area_size(44).build_cartesian_2d(x, y)?)
}

/// The names of what was drawn.
pub(super) fn legend(chart: &mut Chart<'_>, position: SeriesLabelPosition) -> Result<()> {
    let mut labels = chart.configure_series_labels();
    Ok(labels.position(position).background_style(WHITE).border_style(WHITE).draw()?)
}

/// An SVG: the mean over tasks for each arm; a dot for each seed.
pub fn draw(arms: &[(&str, Vec<&Measured>)]) -> Result<String> {
    let all = || arms.iter().flat_map(|(_, measured)| measured);
    let (low, high) = all()
        .flat_map(|m| &m.cells)
        .fold((usize::MAX, 1), |(low, high), cell| (low.min(cell.context), high.max(cell.context)));
    let trained = all().map(|m| m.trained).next().unwrap_or(1) as f64;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (640, 400)).into_drawing_area();
        let (left, right) = ((low as f64).log2() - 0.15, (high as f64).log2() + 0.15);
        let mut chart = chart(&root, left..right, 0.0..100.0)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_labels(5)
            .x_label_formatter(&|log| format!("{:.0}", log.exp2()))
            .x_desc("tokens of the prompt (the dashed line: the length trained on)")
            .y_desc("right, %")
            .draw()?;
        let grey = RGBColor(140, 140, 140);
        chart.draw_series(DashedLineSeries::new(
            [(trained.log2(), 0.0), (trained.log2(), 100.0)],
            4,
            4,
            grey.stroke_width(1),
        ))?;
        for ((arm, measured), color) in arms.iter().zip(COLORS.iter().cycle()) {
            let seeds: Vec<BTreeMap<usize, f64>> = measured.iter().map(|m| by_length(m)).collect();
            let lengths =
                seeds.first().map(|s| s.keys().copied().collect::<Vec<_>>()).unwrap_or_default();
            let mean = |length: usize| {
                let scores: Vec<f64> =
                    seeds.iter().filter_map(|s| s.get(&length).copied()).collect();
                scores.iter().sum::<f64>() / scores.len().max(1) as f64
            };
            let line = lengths.iter().map(|&length| ((length as f64).log2(), mean(length)));
            chart.draw_series(LineSeries::new(line, color.stroke_width(2)))?.label(*arm).legend(
                move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)),
            );
            let dots = seeds.iter().flatten();
            chart.draw_series(dots.map(|(&length, &score)| {
                Circle::new(((length as f64).log2(), score), 3, color.filled())
            }))?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperMiddle)?;
        root.present()?;
    }
    Ok(svg)
}

/// The mean over tasks at each length, in percent.
fn by_length(measured: &Measured) -> BTreeMap<usize, f64> {
    let mut cells: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for cell in &measured.cells {
        cells.entry(cell.context).or_default().push(100.0 * cell.score());
    }
    cells.into_iter().map(|(c, s)| (c, s.iter().sum::<f64>() / s.len() as f64)).collect()
}

/// Points of a course that are drawn as their mean: a step's loss is that of its few rows.
const SMOOTH: usize = 12;

/// An SVG: what answers lose against tokens, a line for each run; `arms` have the colours that [`draw`] gives them.
pub fn courses(arms: &[&str], runs: &[(String, Vec<Point>)]) -> Result<String> {
    let smooth = |points: &[Point]| -> Vec<(f64, f64)> {
        let mean = |some: &[Point]| {
            let tokens = some.last().map_or(0.0, |point| point.tokens as f64 / 1e6);
            (tokens, some.iter().map(|point| point.answers).sum::<f64>() / some.len() as f64)
        };
        points.chunks(SMOOTH).map(mean).collect()
    };
    let lines: Vec<(&str, Vec<(f64, f64)>)> =
        runs.iter().map(|(arm, points)| (&**arm, smooth(points))).collect();
    let end = lines.iter().flat_map(|(_, line)| line).fold(1.0, |end: f64, point| end.max(point.0));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (640, 400)).into_drawing_area();
        let mut chart = chart(&root, 0.0..end, 0.0..2.0)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("million tokens")
            .y_desc("nats a token of an answer")
            .draw()?;
        for (arm, color) in arms.iter().zip(COLORS.iter().cycle()) {
            for (seed, (_, line)) in lines.iter().filter(|(of, _)| of == arm).enumerate() {
                let shown = line.iter().copied().filter(|point| point.1 <= 2.0);
                let drawn = chart.draw_series(LineSeries::new(shown, color.stroke_width(2)))?;
                if seed == 0 {
                    drawn.label(*arm).legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                    });
                }
            }
        }
        legend(&mut chart, SeriesLabelPosition::LowerLeft)?;
        root.present()?;
    }
    Ok(svg)
}
