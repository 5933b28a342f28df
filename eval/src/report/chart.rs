//! Charts as SVG whose colours are the page's, so that they follow its light or dark scheme; plotters writes fixed ones.

use super::published::Published;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// A method's points, by the share removed.
pub struct Series {
    name: String,
    points: Vec<Point>,
}

/// Percent removed, percent right.
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub interval: [f64; 2],
    pub label: String,
}

impl Series {
    pub fn new(name: &str, mut points: Vec<Point>) -> Self {
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        Self { name: name.to_owned(), points }
    }
}

/// The colours of page and pictures. Those of the series are told apart by people who see fewer colours (after Okabe and Ito).
pub const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#ffffff;--faint:#8a929c;--grid:#e3e6ea;\
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b0468a;--c4:#8f6d00;--c5:#3a86c8;--c6:#7a5195;--c7:#555f6b}\
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--paper:#15181c;--faint:#8b95a1;--grid:#2d333b;\
--c0:#56b4e9;--c1:#ff9f5a;--c2:#3fd0a4;--c3:#e38ac0;--c4:#f0e442;--c5:#9cc9ff;--c6:#c5a3e0;--c7:#b4bcc6}}\
svg{max-width:100%;height:auto;font:14px system-ui,sans-serif}svg text{fill:var(--ink)}\
.grid{stroke:var(--grid)}.faint{fill:var(--faint)!important}.bar{stroke-width:1.5;opacity:.6}\
.line{fill:none;stroke-width:2}";

const WIDTH: f64 = 440.0;
const LEFT: f64 = 36.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 14.0;
const PLOT: f64 = 220.0;

/// Scores against the share removed.
pub fn lines(title: &str, series: &[Series], published: &[Published]) -> String {
    let x = |percent: f64| LEFT + percent / 100.0 * (WIDTH - LEFT - RIGHT);
    let y = |percent: f64| TOP + (1.0 - percent / 100.0) * PLOT;
    let rows = series.len() + usize::from(!published.is_empty());
    let height = TOP + PLOT + 44.0 + 20.0 * rows.div_ceil(2) as f64;
    let mut svg = open(height, &format!("{title}: score against the share of the cache removed"));
    for tick in [0, 20, 40, 60, 80, 100] {
        let (at, up) = (f64::from(tick), y(f64::from(tick)));
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{up:.1}\" y2=\"{up:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            up + 4.0,
            x(at),
            TOP + PLOT + 18.0,
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" class=\"faint\">percent removed</text>\
         <text x=\"{:.1}\" y=\"{:.1}\" class=\"faint\">percent right</text>",
        WIDTH - RIGHT,
        TOP + PLOT + 34.0,
        LEFT + 4.0,
        TOP + PLOT - 6.0,
    );
    for point in published {
        let _ = write!(
            svg,
            "<circle class=\"faint\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"><title>{} {:.1} % removed: {}; {}</title></circle>",
            x(point.x),
            y(point.y),
            escape(point.press),
            point.x,
            point.y,
            escape(point.source)
        );
    }
    for (number, Series { name, points }) in series.iter().enumerate() {
        let colour = format!("var(--c{})", number % 8);
        let path: Vec<String> =
            points.iter().map(|p| format!("{:.1},{:.1}", x(p.x), y(p.y))).collect();
        let _ = write!(
            svg,
            "<polyline class=\"line\" stroke=\"{colour}\" points=\"{}\"/>",
            path.join(" ")
        );
        for Point { x: px, y: py, interval: [low, high], label } in points {
            let at = x(*px);
            let _ = write!(
                svg,
                "<line class=\"bar\" stroke=\"{colour}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
                 <circle fill=\"{colour}\" cx=\"{at:.1}\" cy=\"{:.1}\" r=\"4\"><title>{}: {px:.1} % removed, {py:.1} ({low:.1} to \
                 {high:.1})</title></circle>",
                y(*low),
                y(*high),
                y(*py),
                escape(label),
            );
        }
        legend(&mut svg, number, &format!("fill=\"{colour}\""), name);
    }
    if !published.is_empty() {
        legend(&mut svg, series.len(), "class=\"faint\"", "published by others, same model");
    }
    svg + "</svg>"
}

/// Scores by length, to the right, and depth, downwards.
pub fn heat(title: &str, map: &BTreeMap<(u64, u64), Vec<f64>>) -> String {
    let lengths: BTreeSet<u64> = map.keys().map(|(length, _)| *length).collect();
    let depths: BTreeSet<u64> = map.keys().map(|(_, depth)| *depth).collect();
    let (cell, line) = ((WIDTH - 90.0) / lengths.len() as f64, 34.0);
    let cell = cell.min(90.0);
    let height = TOP + line * depths.len() as f64 + 44.0;
    let mut svg = open(height, &format!("{title}: needles found by length and depth"));
    for (row, depth) in depths.iter().enumerate() {
        let up = TOP + line * row as f64;
        let _ = write!(
            svg,
            "<text x=\"78\" y=\"{:.1}\" text-anchor=\"end\">{depth} %</text>",
            up + 21.0
        );
        for (column, length) in lengths.iter().enumerate() {
            let Some(scores) = map.get(&(*length, *depth)) else { continue };
            let share = scores.iter().sum::<f64>() / scores.len() as f64;
            let left = 86.0 + cell * column as f64;
            let _ = write!(
                svg,
                "<rect x=\"{left:.1}\" y=\"{up:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"3\" fill=\"var(--c0)\" \
                 fill-opacity=\"{:.2}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0}<title>{} needles, {depth} % \
                 deep in {length} tokens</title></text>",
                cell - 3.0,
                line - 3.0,
                0.08 + 0.55 * share,
                left + cell / 2.0,
                up + 21.0,
                100.0 * share,
                scores.len(),
            );
        }
    }
    let under = TOP + line * depths.len() as f64 + 16.0;
    for (column, length) in lengths.iter().enumerate() {
        let middle = 86.0 + cell * (column as f64 + 0.5);
        let _ = write!(
            svg,
            "<text x=\"{middle:.1}\" y=\"{under:.1}\" text-anchor=\"middle\">{length}</text>"
        );
    }
    let _ = write!(
        svg,
        "<text class=\"faint\" x=\"86\" y=\"{:.1}\">tokens; to the left the depth</text>",
        under + 18.0
    );
    svg + "</svg>"
}

/// What each kv head, downwards, of each layer, to the right, kept, in percent.
pub fn heads(title: &str, kept: &[Vec<f64>]) -> String {
    let rows = kept.iter().map(Vec::len).max().unwrap_or(0);
    let cell = (WIDTH - LEFT - RIGHT) / kept.len().max(1) as f64;
    let line = cell.clamp(10.0, 18.0);
    let height = TOP + line * rows as f64 + 40.0;
    let mut svg = open(height, &format!("{title}: the share that each head of each layer kept"));
    for (layer, heads) in kept.iter().enumerate() {
        for (head, percent) in heads.iter().enumerate() {
            let _ = write!(
                svg,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"var(--c0)\" fill-opacity=\"{:.2}\"><title>\
                 layer {layer}, kv head {head}: {percent:.1} % kept</title></rect>",
                LEFT + cell * layer as f64,
                TOP + line * head as f64,
                cell - 1.0,
                line - 1.0,
                0.06 + 0.94 * percent / 100.0,
            );
        }
    }
    let under = TOP + line * rows as f64 + 16.0;
    for layer in (0..kept.len()).step_by((kept.len() / 6).max(1)) {
        let middle = LEFT + cell * (layer as f64 + 0.5);
        let _ = write!(
            svg,
            "<text x=\"{middle:.1}\" y=\"{under:.1}\" text-anchor=\"middle\">{layer}</text>"
        );
    }
    let _ = write!(
        svg,
        "<text class=\"faint\" x=\"{LEFT}\" y=\"{:.1}\">layer; downwards its kv heads; full colour is all kept</text>",
        under + 18.0
    );
    svg + "</svg>"
}

/// A chart with its colours, for a file of its own.
pub fn alone(svg: &str) -> String {
    let at = svg.find('>').map_or(0, |at| at + 1);
    let background = "<rect width=\"100%\" height=\"100%\" fill=\"var(--paper)\"/>";
    format!("{}<style>{STYLE}</style>{background}{}\n", &svg[..at], &svg[at..])
}

fn open(height: f64, what: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" role=\"img\" \
         aria-label=\"{}\">",
        escape(what)
    )
}

fn legend(svg: &mut String, number: usize, colour: &str, name: &str) {
    let left = LEFT + (number % 2) as f64 * (WIDTH - LEFT) / 2.0;
    let up = TOP + PLOT + 56.0 + 20.0 * (number / 2) as f64;
    let _ = write!(
        svg,
        "<circle {colour} cx=\"{left:.1}\" cy=\"{:.1}\" r=\"5\"/><text x=\"{:.1}\" y=\"{up:.1}\">{}</text>",
        up - 4.0,
        left + 12.0,
        escape(name)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
