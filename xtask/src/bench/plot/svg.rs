//! Two kinds of plots as SVG text: bars with their budgets, and cumulative distributions.
//!
//! Invariant: the same values give the same text, so that a plot under version control changes with its values only.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
/// Of the names of bars, and of the values behind them.
const NAMES: f64 = 260.0;
const VALUES: f64 = 110.0;
const ROW: f64 = 24.0;
const TITLE: f64 = 34.0;
/// Around a distribution's axes: left, right, top, bottom.
const MARGIN: [f64; 4] = [60.0, 20.0, 34.0, 48.0];
const HEIGHT: f64 = 360.0;
const COLOURS: [&str; 4] = ["#2a6fb0", "#c2571a", "#3a8a4d", "#7a4fa3"];
const LIMIT: &str = "#b3261e";

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    pub name: String,
    pub value: f64,
    /// As it is written behind the bar.
    pub text: String,
    /// Where the budget's line stands.
    pub limit: Option<f64>,
    /// Whether the budget holds.
    pub ok: bool,
}

/// Bars of one unit, drawn on one scale.
#[derive(Clone, Debug)]
pub struct Panel {
    pub title: String,
    pub bars: Vec<Bar>,
}

/// One line of a distribution.
#[derive(Clone, Debug)]
pub struct Line {
    pub name: String,
    /// Sorted.
    pub values: Vec<f64>,
}

/// Panels under each other.
pub fn bars(panels: &[Panel]) -> String {
    let height: f64 = panels.iter().map(|panel| TITLE + ROW * panel.bars.len() as f64).sum::<f64>() + ROW;
    let mut svg = Svg::new(WIDTH, height);
    let mut top = 0.0;
    for panel in panels {
        svg.text(10.0, top + 22.0, "start", "title", &panel.title);
        top += TITLE;
        let largest = |most: f64, bar: &Bar| most.max(bar.value).max(bar.limit.unwrap_or(0.0));
        let full = panel.bars.iter().fold(0.0, largest).max(f64::MIN_POSITIVE);
        let scale = |value: f64| NAMES + (WIDTH - NAMES - VALUES) * value.max(0.0) / full;
        for bar in &panel.bars {
            svg.text(NAMES - 8.0, top + 15.0, "end", "name", &bar.name);
            let colour = if bar.ok { COLOURS[0] } else { LIMIT };
            svg.rectangle(NAMES, top + 4.0, scale(bar.value) - NAMES, ROW - 8.0, colour);
            if let Some(limit) = bar.limit {
                svg.line([scale(limit), top], [scale(limit), top + ROW], LIMIT, 2.0);
            }
            svg.text(WIDTH - VALUES + 8.0, top + 15.0, "start", "value", &bar.text);
            top += ROW;
        }
    }
    svg.end()
}

/// Which share of the values of each line is at most x. `limit` is the budget's line.
pub fn distribution(title: &str, unit: &str, lines: &[Line], limit: f64) -> String {
    let [left, right, top, bottom] = MARGIN;
    let mut svg = Svg::new(WIDTH, HEIGHT);
    let full = ticks(lines.iter().flat_map(|line| line.values.last().copied()).fold(limit, f64::max) * 1.02);
    let end = full.last().copied().unwrap_or(1.0);
    let x = |value: f64| left + (WIDTH - left - right) * value / end;
    let y = |share: f64| HEIGHT - bottom - (HEIGHT - top - bottom) * share;
    svg.text(10.0, 22.0, "start", "title", title);
    for value in &full {
        svg.line([x(*value), y(0.0)], [x(*value), y(1.0)], "#e4e4e4", 1.0);
        svg.text(x(*value), y(0.0) + 16.0, "middle", "value", &format!("{value}"));
    }
    for share in [0, 25, 50, 75, 100] {
        let height = y(f64::from(share) / 100.0);
        svg.line([x(0.0), height], [x(end), height], "#e4e4e4", 1.0);
        svg.text(left - 6.0, height + 4.0, "end", "value", &format!("{share} %"));
    }
    svg.text(x(end), HEIGHT - 10.0, "end", "value", unit);
    svg.line([x(limit), y(0.0)], [x(limit), y(1.0)], LIMIT, 2.0);
    for ((i, line), colour) in lines.iter().enumerate().zip(COLOURS.iter().cycle()) {
        let steps: Vec<[f64; 2]> = steps(&line.values).into_iter().map(|[value, share]| [x(value), y(share)]).collect();
        svg.path(&steps, colour);
        let at = HEIGHT - 10.0;
        let from = left + 200.0 * i as f64;
        svg.rectangle(from, at - 9.0, 10.0, 10.0, colour);
        svg.text(from + 16.0, at, "start", "name", &line.name);
    }
    svg.end()
}

/// The corners of the distribution: up at each value, and right to the next.
fn steps(values: &[f64]) -> Vec<[f64; 2]> {
    let count = values.len() as f64;
    let mut corners = vec![[0.0, 0.0]];
    for (i, value) in values.iter().enumerate() {
        corners.push([*value, i as f64 / count]);
        corners.push([*value, (i + 1) as f64 / count]);
    }
    corners
}

/// Round numbers from 0 to at least `most`: five to ten of them behind 0.
fn ticks(most: f64) -> Vec<f64> {
    let magnitude = 10_f64.powf(most.log10().floor());
    let step = [0.1, 0.2, 0.5, 1.0].map(|step| step * magnitude).into_iter().find(|step| most / step <= 10.0);
    let step = step.unwrap_or(magnitude);
    (0..).map(|i| f64::from(i) * step).take_while(|tick| *tick < most + step).collect()
}

struct Svg(String);

impl Svg {
    fn new(width: f64, height: f64) -> Svg {
        let mut svg = Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"13\">\n<style>.title {{ font-weight: bold }} \
             .value {{ fill: #555 }}</style>\n"
        ));
        // Readable on a dark page too.
        svg.rectangle(0.0, 0.0, width, height, "#ffffff");
        svg
    }

    fn rectangle(&mut self, x: f64, y: f64, width: f64, height: f64, colour: &str) {
        self.push(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        ));
    }

    fn line(&mut self, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], colour: &str, width: f64) {
        self.push(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\"/>"
        ));
    }

    fn path(&mut self, corners: &[[f64; 2]], colour: &str) {
        let points: Vec<String> = corners.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
        let points = points.join(" ");
        self.push(format_args!("<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"));
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
        ));
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{element}").expect("a String takes everything");
    }

    fn end(self) -> String {
        self.0 + "</svg>\n"
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn bars_share_a_scale_with_the_budget() {
        let bar =
            |name: &str, value, limit, ok| Bar { name: name.to_owned(), value, text: format!("{value}"), limit, ok };
        let bars_ = vec![bar("a < b", 0.5, Some(1.0), false), bar("plain", 0.25, None, true)];
        let text = bars(&[Panel { title: "Ratios".to_owned(), bars: bars_ }]);
        expect![[r##"
            <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 106" width="760" height="106" font-family="sans-serif" font-size="13">
            <style>.title { font-weight: bold } .value { fill: #555 }</style>
            <rect x="0.0" y="0.0" width="760.0" height="106.0" fill="#ffffff"/>
            <text x="10.0" y="22.0" text-anchor="start" class="title">Ratios</text>
            <text x="252.0" y="49.0" text-anchor="end" class="name">a &lt; b</text>
            <rect x="260.0" y="38.0" width="195.0" height="16.0" fill="#b3261e"/>
            <line x1="650.0" y1="34.0" x2="650.0" y2="58.0" stroke="#b3261e" stroke-width="2"/>
            <text x="658.0" y="49.0" text-anchor="start" class="value">0.5</text>
            <text x="252.0" y="73.0" text-anchor="end" class="name">plain</text>
            <rect x="260.0" y="62.0" width="97.5" height="16.0" fill="#2a6fb0"/>
            <text x="658.0" y="73.0" text-anchor="start" class="value">0.25</text>
            </svg>
        "##]].assert_eq(&text);
    }

    #[test]
    fn a_distribution_ends_at_one_and_never_falls() {
        let corners = steps(&[1.0, 3.0, 3.0, 8.0]);
        assert_eq!(corners.last(), Some(&[8.0, 1.0]));
        assert!(corners.windows(2).all(|pair| pair[0][0] <= pair[1][0] && pair[0][1] <= pair[1][1]));
        assert!(corners.windows(2).all(|pair| pair[0][0] == pair[1][0] || pair[0][1] == pair[1][1]));
    }

    #[test]
    fn ticks_are_round_few_and_reach_the_end() {
        for most in [0.7, 9.9, 10.0, 612.0, 1000.0, 1020.0, 23_456.0] {
            let ticks = ticks(most);
            assert!((6..=12).contains(&ticks.len()), "{most}: {ticks:?}");
            assert!(ticks[0] == 0.0 && *ticks.last().unwrap() >= most, "{most}: {ticks:?}");
        }
        assert_eq!(ticks(1020.0), [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0, 1200.0]);
    }

    #[test]
    fn a_distribution_is_drawn_with_its_limit() {
        let line = Line { name: "gateway off".to_owned(), values: vec![250.0, 500.0] };
        expect![[r##"
            <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 360" width="760" height="360" font-family="sans-serif" font-size="13">
            <style>.title { font-weight: bold } .value { fill: #555 }</style>
            <rect x="0.0" y="0.0" width="760.0" height="360.0" fill="#ffffff"/>
            <text x="10.0" y="22.0" text-anchor="start" class="title">Gap</text>
            <line x1="60.0" y1="312.0" x2="60.0" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="60.0" y="328.0" text-anchor="middle" class="value">0</text>
            <line x1="173.3" y1="312.0" x2="173.3" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="173.3" y="328.0" text-anchor="middle" class="value">200</text>
            <line x1="286.7" y1="312.0" x2="286.7" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="286.7" y="328.0" text-anchor="middle" class="value">400</text>
            <line x1="400.0" y1="312.0" x2="400.0" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="400.0" y="328.0" text-anchor="middle" class="value">600</text>
            <line x1="513.3" y1="312.0" x2="513.3" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="513.3" y="328.0" text-anchor="middle" class="value">800</text>
            <line x1="626.7" y1="312.0" x2="626.7" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="626.7" y="328.0" text-anchor="middle" class="value">1000</text>
            <line x1="740.0" y1="312.0" x2="740.0" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="740.0" y="328.0" text-anchor="middle" class="value">1200</text>
            <line x1="60.0" y1="312.0" x2="740.0" y2="312.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="54.0" y="316.0" text-anchor="end" class="value">0 %</text>
            <line x1="60.0" y1="242.5" x2="740.0" y2="242.5" stroke="#e4e4e4" stroke-width="1"/>
            <text x="54.0" y="246.5" text-anchor="end" class="value">25 %</text>
            <line x1="60.0" y1="173.0" x2="740.0" y2="173.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="54.0" y="177.0" text-anchor="end" class="value">50 %</text>
            <line x1="60.0" y1="103.5" x2="740.0" y2="103.5" stroke="#e4e4e4" stroke-width="1"/>
            <text x="54.0" y="107.5" text-anchor="end" class="value">75 %</text>
            <line x1="60.0" y1="34.0" x2="740.0" y2="34.0" stroke="#e4e4e4" stroke-width="1"/>
            <text x="54.0" y="38.0" text-anchor="end" class="value">100 %</text>
            <text x="740.0" y="350.0" text-anchor="end" class="value">ms</text>
            <line x1="626.7" y1="312.0" x2="626.7" y2="34.0" stroke="#b3261e" stroke-width="2"/>
            <polyline points="60.0,312.0 201.7,312.0 201.7,173.0 343.3,173.0 343.3,34.0" fill="none" stroke="#2a6fb0" stroke-width="2"/>
            <rect x="60.0" y="341.0" width="10.0" height="10.0" fill="#2a6fb0"/>
            <text x="76.0" y="350.0" text-anchor="start" class="name">gateway off</text>
            </svg>
        "##]].assert_eq(&distribution("Gap", "ms", &[line], 1000.0));
    }
}
