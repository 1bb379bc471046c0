//! The report as a browser shows it: nothing is cut off, nothing is invisible, nothing is loaded.
//!
//! Needs Chromium: `LLARA_CHROMIUM`, or `chromium` in the PATH. Without it the test is skipped, and says so.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fixture::{Bench, llara};

/// Measures the page and puts the result into the document. It is added to a copy of the report, which has no
/// scripts itself.
const MEASURE: &str = r#"
<script>
addEventListener('load', () => {
  const box = node => node.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const color = (node, name) => getComputedStyle(node)[name];
  // Wide tables may scroll inside their own box.
  const scrolls = node => node.closest('.scroll, .table') !== null;
  const visible = [...document.querySelectorAll('h1, h2, p, figure, svg, td, th, summary')]
    .filter(node => node.checkVisibility());
  const lines = [...document.querySelectorAll('svg path.line')];
  const labels = [...document.querySelectorAll('svg')].map(svg => {
    const inside = box(svg);
    return [...svg.querySelectorAll('text')].filter(text => {
      const { left, right, top, bottom } = box(text);
      return left < inside.left - 1 || right > inside.right + 1
        || top < inside.top - 1 || bottom > inside.bottom + 1;
    }).map(text => text.textContent);
  }).flat();
  const result = {
    width,
    scrollWidth: document.documentElement.scrollWidth,
    beyond: visible.filter(node => !scrolls(node) && box(node).right > width + 1)
      .map(node => node.tagName + ': ' + node.textContent.slice(0, 40)),
    empty: visible.filter(node => ['FIGURE', 'svg'].includes(node.tagName))
      .filter(node => box(node).width < 100 || box(node).height < 50).length,
    figures: document.querySelectorAll('figure').length,
    lines: lines.filter(line => line.getTotalLength() > 10).length,
    lineColors: lines.map(line => color(line, 'stroke')),
    labels,
    background: color(document.body, 'backgroundColor') === 'rgba(0, 0, 0, 0)'
      ? color(document.documentElement, 'backgroundColor') : color(document.body, 'backgroundColor'),
    text: color(document.body, 'color'),
    loaded: performance.getEntriesByType('resource').map(entry => entry.name),
  };
  document.documentElement.innerHTML = '<body>MEASURED' + JSON.stringify(result) + 'END</body>';
});
</script>"#;

fn chromium() -> Option<String> {
    let program = std::env::var("LLARA_CHROMIUM").unwrap_or_else(|_| "chromium".to_owned());
    let mut version = Command::new(&program);
    version.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    version.status().is_ok_and(|status| status.success()).then_some(program)
}

/// Shows a page in a window of this width, in the dark or the light color scheme, and returns what was measured.
fn measure(bench: &Bench, chromium: &str, page: &str, (width, dark): (u32, bool)) -> Value {
    let (profile, output) = (bench.path("profile"), bench.at("dom.html"));
    let mut browser = Command::new(chromium)
        .args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--dump-dom",
        ])
        .args(["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"])
        .arg(format!("--user-data-dir={profile}"))
        .arg(format!("--window-size={width},1000"))
        .arg(format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 }))
        .arg(format!("file://{}", bench.path(page)))
        .stdout(fs::File::create(&output).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while browser.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(120) {
            browser.kill().unwrap();
            panic!("the browser does not end");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let dom = fs::read_to_string(&output).unwrap();
    let measured = dom.split_once("MEASURED").and_then(|(_, rest)| rest.split_once("END"));
    let (json, _) = measured.unwrap_or_else(|| panic!("nothing was measured: {dom:.2000}"));
    let json = json.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&json).unwrap()
}

/// Perceived brightness of a color of CSS, `rgb(…)`, from 0 to 1.
fn brightness(color: &Value) -> f64 {
    let text = color.as_str().unwrap();
    let numbers = text.trim_start_matches(|c: char| !c.is_ascii_digit());
    let rgb: Vec<f64> = numbers
        .split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .filter_map(|part| part.parse().ok())
        .take(3)
        .collect();
    assert_eq!(rgb.len(), 3, "{text}");
    (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255.0
}

#[test]
fn the_report_is_readable_in_light_and_dark_narrow_and_wide() {
    let Some(chromium) = chromium() else {
        eprintln!(
            "skipped: no Chromium; set LLARA_CHROMIUM or install it to test the report in a browser"
        );
        return;
    };
    let bench = Bench::new();
    let (model, data, sets) = (bench.path("base"), bench.path("train.jsonl"), bench.path("beir"));
    for (out, rate) in [("a-run-with-a-rather-long-name", "1e-3"), ("b", "1e-4")] {
        let out = bench.path(out);
        let mut args =
            vec!["finetune", "--model", &model, "--train-data", &data, "--output-dir", &out];
        args.extend(["--max-steps", "12", "--logging-steps", "1", "--train-group-size", "2"]);
        args.extend(["--learning-rate", rate, "--eval-dataset", &sets, "--eval-split", "test"]);
        args.extend(["--eval-steps", "4", "--per-device-train-batch-size", "4"]);
        llara(&args).json();
    }
    let (a, b) = (bench.path("a-run-with-a-rather-long-name"), bench.path("b"));
    llara(&["report", &a, &b, "--output", &bench.path("both.html")]).json();

    for (report, figures, lines) in
        [("a-run-with-a-rather-long-name/report.html", 9, 7), ("both.html", 8, 14)]
    {
        let page = fs::read_to_string(bench.at(report)).unwrap();
        // Details that are closed are looked at as well.
        let page = page.replace("<details", "<details open");
        bench.write("measured.html", page.replace("</body>", &format!("{MEASURE}</body>")));
        for (width, dark) in [(1400, false), (1400, true), (500, false), (500, true)] {
            let seen = measure(&bench, &chromium, "measured.html", (width, dark));
            let what = format!("{report}, width {width}, dark {dark}: {seen:#}");
            assert_eq!(seen["scrollWidth"], seen["width"], "the page scrolls sideways, {what}");
            assert_eq!(seen["beyond"], serde_json::json!([]), "{what}");
            assert_eq!(seen["labels"], serde_json::json!([]), "labels are cut off, {what}");
            assert_eq!(seen["empty"], 0, "{what}");
            assert_eq!(seen["loaded"], serde_json::json!([]), "{what}");
            assert!(seen["figures"].as_u64() >= Some(figures), "{what}");
            assert!(seen["lines"].as_u64() >= Some(lines), "{what}");
            let background = brightness(&seen["background"]);
            assert_eq!(background < 0.3, dark, "{what}");
            assert!((brightness(&seen["text"]) - background).abs() > 0.6, "{what}");
            for line in seen["lineColors"].as_array().unwrap() {
                assert!((brightness(line) - background).abs() > 0.2, "{line}, {what}");
            }
        }
    }
}
