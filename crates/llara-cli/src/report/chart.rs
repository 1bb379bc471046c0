//! Line charts and histograms as SVG.

use std::fmt::Write;

use maud::{Markup, html};

/// Size of a chart in the units of its view box.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 240.0;
/// Space for the labels.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 28.0;
/// Points of a line beyond which it is drawn by the lowest and highest of each interval.
const MAX_POINTS: usize = 600;
/// Points of a line beyond which its running mean is drawn, too.
const SMOOTHED_POINTS: usize = 30;

/// A line of a chart.
pub(super) struct Series {
    pub(super) name: String,
    /// Number of its color; see the style sheet.
    pub(super) color: usize,
    /// (step, value), ascending; all values are finite.
    pub(super) points: Vec<(f64, f64)>,
}

/// A line chart.
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) series: Vec<Series>,
    /// Whether to draw a running mean over lines of many points.
    pub(super) is_noisy: bool,
    /// Whether each point is marked.
    pub(super) has_dots: bool,
}

impl Chart {
    /// The chart, or nothing if there is no point.
    pub(super) fn draw(&self) -> Markup {
        let all = || self.series.iter().flat_map(|series| series.points.iter().copied());
        let Some(plane) = Plane::around(all()) else { return html! {} };
        html! {
            figure.chart {
                figcaption { (self.title) }
                svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label=(self.title) {
                    (plane.axes())
                    @for series in &self.series { (self.line(series, &plane)) }
                }
                @if self.series.len() > 1 { (legend(&self.series)) }
            }
        }
    }

    fn line(&self, series: &Series, plane: &Plane) -> Markup {
        let smoothed = self.is_noisy && series.points.len() > SMOOTHED_POINTS;
        let raw = plane.path(&thinned(&series.points));
        let mean = smoothed.then(|| plane.path(&thinned(&running_mean(&series.points))));
        let color = format!("c{}", series.color);
        let last = series.points.last();
        html! {
            path class={ "line " (color) @if smoothed { " faint" } } d=(raw) {}
            @if let Some(mean) = mean { path class={ "line " (color) } d=(mean) {} }
            @if self.has_dots || series.points.len() == 1 {
                @for &(x, y) in &series.points {
                    circle class=(color) cx=(plane.x(x)) cy=(plane.y(y)) r="3" {
                        title { (series.name) ": " (number(y)) " at step " (x) }
                    }
                }
            } @else if let Some(&(x, y)) = last {
                circle class=(color) cx=(plane.x(x)) cy=(plane.y(y)) r="3" {
                    title { (series.name) ": " (number(y)) " at step " (x) }
                }
            }
        }
    }
}

fn legend(series: &[Series]) -> Markup {
    html! {
        ul.legend {
            @for series in series {
                li { span class={ "swatch c" (series.color) } {} (series.name) }
            }
        }
    }
}

/// Bars of equal width, with a mark at a limit.
pub(super) struct Bars<'b> {
    pub(super) title: String,
    /// Value at the left side of the first bar.
    pub(super) first: usize,
    /// Width of a bar.
    pub(super) width: usize,
    pub(super) counts: &'b [u64],
    /// A limit, marked where it is within the bars.
    pub(super) limit: usize,
}

impl Bars<'_> {
    pub(super) fn draw(&self) -> Markup {
        let most = self.counts.iter().copied().max().unwrap_or(0);
        if most == 0 {
            return html! {};
        }
        let bars = self.counts.len() as f64;
        let end = self.first as f64 + bars * self.width as f64;
        let Some(plane) = Plane::around([(self.first as f64, 0.0), (end, most as f64)].into_iter())
        else {
            return html! {};
        };
        let step = (WIDTH - LEFT - RIGHT) / bars;
        html! {
            figure.chart {
                figcaption { (self.title) }
                svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label=(self.title) {
                    (plane.axes())
                    @for (i, &count) in self.counts.iter().enumerate() {
                        @let from = self.first + i * self.width;
                        @let top = plane.y(count as f64);
                        rect.bar x=(round(LEFT + i as f64 * step + 0.5)) y=(top)
                            width=(round(step - 1.0)) height=(round(plane.y(0.0) - top)) {
                            title {
                                (from) @if i + 1 == self.counts.len() { " or more" }
                                @else { "–" (from + self.width - 1) }
                                " tokens: " (count) " texts"
                            }
                        }
                    }
                    @if (self.limit as f64) <= end && self.limit >= self.first {
                        @let x = plane.x(self.limit as f64);
                        line.limit x1=(x) x2=(x) y1=(TOP) y2=(HEIGHT - BOTTOM) {}
                        text.limit x=(round(x - 4.0)) y=(TOP + 10.0) text-anchor="end" {
                            "maximum length " (self.limit)
                        }
                    }
                }
            }
        }
    }
}

/// The area between the axes: ranges of both coordinates that have positive lengths.
struct Plane {
    x: (f64, f64),
    y: (f64, f64),
    y_step: f64,
}

impl Plane {
    /// An area that holds all points; `None` without a point.
    fn around(points: impl Iterator<Item = (f64, f64)>) -> Option<Self> {
        let mut bounds: Option<[f64; 4]> = None;
        for (x, y) in points.filter(|(x, y)| x.is_finite() && y.is_finite()) {
            let [x0, x1, y0, y1] = bounds.unwrap_or([x, x, y, y]);
            bounds = Some([x0.min(x), x1.max(x), y0.min(y), y1.max(y)]);
        }
        let [x0, x1, y0, y1] = bounds?;
        let x1 = if x1 > x0 { x1 } else { x0 + 1.0 };
        // Equal values lie in the middle of a range of their own size.
        let margin = if y1 > y0 { 0.0 } else { y0.abs().max(1e-12) / 2.0 };
        let (y0, y1) = (y0 - margin, y1 + margin);
        let y_step = tick((y1 - y0) / 4.0);
        let y = ((y0 / y_step).floor() * y_step, (y1 / y_step).ceil() * y_step);
        Some(Plane { x: (x0, x1), y, y_step })
    }

    fn x(&self, x: f64) -> f64 {
        round(LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT))
    }

    fn y(&self, y: f64) -> f64 {
        let share = (y - self.y.0) / (self.y.1 - self.y.0);
        round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM))
    }

    /// The data of an SVG path.
    fn path(&self, points: &[(f64, f64)]) -> String {
        let mut path = String::new();
        for (i, &(x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{},{}", if i == 0 { "M" } else { "L" }, self.x(x), self.y(y));
        }
        path
    }

    fn axes(&self) -> Markup {
        let x_step = tick((self.x.1 - self.x.0) / 6.0).max(1.0);
        let bottom = HEIGHT - BOTTOM;
        html! {
            @for y in ticks(self.y, self.y_step) {
                line.grid x1=(LEFT) x2=(WIDTH - RIGHT) y1=(self.y(y)) y2=(self.y(y)) {}
                text x=(LEFT - 6.0) y=(round(self.y(y) + 4.0)) text-anchor="end" { (number(y)) }
            }
            @for x in ticks(self.x, x_step) {
                line.grid x1=(self.x(x)) x2=(self.x(x)) y1=(bottom) y2=(bottom + 4.0) {}
                text x=(self.x(x)) y=(bottom + 18.0) text-anchor="middle" { (number(x)) }
            }
        }
    }
}

/// The least of 1, 2 and 5 times a power of ten that is not below `least`.
fn tick(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|n| n * power)
        .into_iter()
        .find(|&t| t >= least * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

/// Multiples of `step` in a range.
fn ticks((from, to): (f64, f64), step: f64) -> Vec<f64> {
    let first = (from / step - 1e-9).ceil() as i64;
    let last = (to / step + 1e-9).floor() as i64;
    (first..=last.min(first + 20)).map(|i| i as f64 * step).collect()
}

/// A number in at most about six characters.
pub(super) fn number(x: f64) -> String {
    let size = x.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e6).contains(&size) {
        let text = format!("{x:.1e}");
        return text.replace(".0e", "e");
    }
    let decimals = (3 - size.log10().floor() as i32).clamp(0, 4) as usize;
    let text = format!("{x:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn round(x: f64) -> f64 {
    (x * 10.0).round() / 10.0
}

/// At most about [`MAX_POINTS`] points: of each interval the lowest and the highest, so that a peak of one
/// step stays visible.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let size = points.len().div_ceil(MAX_POINTS / 2);
    let mut kept = Vec::with_capacity(MAX_POINTS + 2);
    for interval in points.chunks(size) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (interval.iter().min_by(by_value), interval.iter().max_by(by_value));
        let mut both: Vec<_> = low.into_iter().chain(high).copied().collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        both.dedup();
        kept.extend(both);
    }
    kept
}

/// The mean of each point and its neighbors, together a twentieth of the points.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 40;
    let mut sums = vec![0.0];
    sums.extend(points.iter().scan(0.0, |sum, &(_, y)| {
        *sum += y;
        Some(*sum)
    }));
    let mean = |i: usize| {
        let (from, to) = (i.saturating_sub(reach), (i + reach + 1).min(points.len()));
        (sums[to] - sums[from]) / (to - from) as f64
    };
    points.iter().enumerate().map(|(i, &(x, _))| (x, mean(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!([0.3, 1.0, 1.1, 4.9, 70.0].map(tick), [0.5, 1.0, 2.0, 5.0, 100.0]);
        assert_eq!(ticks((0.0, 1.0), 0.25), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(ticks((-1.0, 1.0), 1.0), [-1.0, 0.0, 1.0]);
    }

    #[test]
    fn numbers_are_short() {
        let texts =
            [0.0, 1.0, 0.25, 1234.5, 5e-5, 1.25e-3, 93_000.0, 2_500_000.0, -3.0].map(number);
        assert_eq!(texts, ["0", "1", "0.25", "1234", "5e-5", "0.0013", "93000", "2.5e6", "-3"]);
    }

    #[test]
    fn a_peak_of_one_step_survives_thinning() {
        let mut points: Vec<_> = (0..10_000).map(|i| (f64::from(i), 1.0)).collect();
        points[4321].1 = 9.0;
        let kept = thinned(&points);
        assert!(kept.len() <= MAX_POINTS + 2 && kept.contains(&(4321.0, 9.0)));
        assert!(kept.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn the_mean_of_a_constant_is_the_constant() {
        let points: Vec<_> = (0..100).map(|i| (f64::from(i), 2.0)).collect();
        assert_eq!(running_mean(&points), points);
    }

    #[test]
    fn every_point_is_inside_the_chart() {
        for values in [vec![5.0], vec![0.0, 0.0], vec![-1e-9, 1e9], vec![3.0, -2.0, 8.0]] {
            let points: Vec<_> =
                values.into_iter().enumerate().map(|(i, y)| (i as f64, y)).collect();
            let plane = Plane::around(points.iter().copied()).unwrap();
            for &(x, y) in &points {
                assert!((LEFT..=WIDTH - RIGHT).contains(&plane.x(x)), "{points:?}");
                assert!((TOP..=HEIGHT - BOTTOM).contains(&plane.y(y)), "{points:?}");
            }
        }
        assert!(Plane::around([(f64::NAN, 1.0)].into_iter()).is_none());
    }
}
