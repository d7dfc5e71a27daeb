"use strict";
// Draws the charts of a report. Names are only ever text: plotly reads some markup in labels, so
// they are escaped for it; everything else was written into the page as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const said = document.getElementById("said");
  const hidden = new Set();
  const withoutPlan = new Set();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const PLAIN = ["#5a86d8", "#e0602a", "#12a37a", "#cf6fae", "#d99a1c", "#5bb0e8", "#8a7de0"];
  const HEAT = [[0, "#2d2a63"], [0.25, "#2f6fa8"], [0.5, "#1fa587"], [0.75, "#b9cf3b"], [1, "#f7e05c"]];

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const escape = (text) => String(text)
    .replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "%&#123;");
  const short = (text, limit) => text.length <= limit ? text
    : text.slice(0, Math.ceil(limit * 0.6)) + "…" + text.slice(-Math.floor(limit * 0.3));
  const groupName = (place, limit) => escape(short(data.groups[place].name, limit));
  const number = (value) => Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 || value === 0
    ? String(+value.toPrecision(4)) : (+value).toExponential(2).replace("e+", "e");
  const stepTitle = { text: "step", standoff: 6, font: { size: 12 } };
  const element = (chart) => document.getElementById("chart-" + chart.id);

  const colourOf = (trace) => {
    if (trace.group !== undefined) return data.groups[trace.group].colour;
    return PLAIN[(trace.colour || 0) % PLAIN.length];
  };
  const isShown = (chart, trace) => !(trace.group !== undefined && hidden.has(trace.group))
    && !(trace.name === "planned" && trace.dash && withoutPlan.has(chart.id));
  const labelOf = (trace) => {
    const name = trace.name ? escape(short(trace.name, 40)) : "";
    if (trace.group === undefined) return name;
    return groupName(trace.group, 40) + (name && trace.dash ? " (" + name + ")" : "");
  };

  function axis(more) {
    return Object.assign({
      gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true,
      tickfont: { size: 12 }, fixedrange: narrow.matches,
    }, more);
  }

  // Decades with unlabelled lines between them, or, of less than two decades, also 2 and 5.
  function logAxis(chart) {
    const values = chart.traces.flatMap((trace) => trace.y).filter((value) => value > 0);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), 0);
    const many = high > 100 * low;
    return {
      type: "log", dtick: many ? Math.ceil(Math.log10(high / low) / 8) : "D2", tickformat: "~g",
      exponentformat: "power", minor: many ? { dtick: "D1", showgrid: false } : {},
    };
  }

  function layout(chart, more) {
    return Object.assign({
      margin: { l: 56, r: 12, t: 8, b: 38 }, showlegend: false, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--faint"), size: 13, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 }, namelength: 42 },
      dragmode: narrow.matches ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--ink") },
    }, more);
  }

  function drawLines(chart) {
    const unified = chart.traces.length <= 16;
    const traces = chart.traces.map((trace) => ({
      type: "scatter", mode: trace.markers ? "lines+markers" : "lines", x: trace.x, y: trace.y,
      name: labelOf(trace), visible: isShown(chart, trace), connectgaps: false,
      line: { color: colourOf(trace), width: trace.width || 1.5, dash: trace.dash || "solid" },
      marker: { size: 7, color: colourOf(trace) },
      hovertemplate: unified ? "%{y:.4~g}" : "step %{x}: %{y:.4~g}", opacity: trace.dash ? 0.75 : 1,
    }));
    const isWindow = (mark) => mark.kind === "thaw" || mark.kind === "freeze";
    const shapes = data.marks.map((mark) => ({
      type: "line", x0: mark.x, x1: mark.x, yref: "paper", y0: 0, y1: 1, layer: isWindow(mark) ? "below" : "above",
      line: { color: css(isWindow(mark) ? "--faint" : "--warn"), width: 1, dash: "dot" },
      opacity: isWindow(mark) ? 0.35 : 0.9,
    }));
    const named = data.marks.filter((mark) => !isWindow(mark));
    const annotations = (named.length <= 8 ? named : []).map((mark) => ({
      x: mark.x, y: 1, yref: "paper", yanchor: "top", xanchor: "left", showarrow: false,
      textangle: -90, text: escape(short(mark.kind, 28)), font: { size: 11, color: css("--warn") },
      hovertext: escape(short(mark.text, 120)), captureevents: false,
    }));
    const legend = chart.traces.every((trace) => trace.group === undefined) && chart.traces.length > 1;
    return Plotly.react(element(chart), traces, layout(chart, {
      hovermode: unified ? "x unified" : "closest", hoverdistance: unified ? -1 : 40,
      xaxis: axis({ title: stepTitle, rangemode: "tozero" }),
      yaxis: axis(chart.log ? logAxis(chart) : { type: "linear", rangemode: "tozero" }),
      shapes, annotations, showlegend: legend,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    }), options(chart));
  }

  function drawHeat(chart) {
    const names = chart.rows.map((name) => escape(short(name, narrow.matches ? 18 : 34)));
    const rows = chart.groups.map((place, row) => row).filter((row) => !hidden.has(chart.groups[row]));
    const hover = rows.map((row) => chart.z[row].map((value, column) =>
      escape(short(chart.rows[row], 60)) + "<br>steps " + chart.from[column] + " to " + chart.to[column]
      + (value === null ? "" : "<br>update / weight " + number(Math.pow(10, value)))));
    const known = chart.z.flat().filter((value) => value !== null);
    const low = Math.min(...known), high = Math.max(...known);
    const ticks = [];
    for (let power = Math.ceil(low); power <= Math.floor(high); power += 1) ticks.push(power);
    if (!ticks.length) ticks.push(low);
    const height = Math.max(narrow.matches ? 240 : 280, Math.min(900, 70 + 22 * rows.length));
    element(chart).style.height = height + "px";
    return Plotly.react(element(chart), [{
      type: "heatmap", x: chart.edges, y: rows.map((row) => row), z: rows.map((row) => chart.z[row]),
      text: hover, hovertemplate: "%{text}<extra></extra>", colorscale: HEAT, zmin: low, zmax: Math.max(high, low + 0.1),
      xgap: chart.x.length > 60 ? 0 : 1, ygap: rows.length > 40 ? 0 : 1, hoverongaps: false,
      colorbar: { thickness: 12, outlinewidth: 0, tickvals: ticks, ticktext: ticks.map((p) => "1e" + (+p.toFixed(1))), len: 1 },
    }], layout(chart, {
      height, margin: { l: 56, r: 12, t: 28, b: 38 }, xaxis: axis({ title: stepTitle, showgrid: false }),
      yaxis: axis({ autorange: "reversed", showgrid: false, tickvals: rows.length > 60 ? [] : rows, ticktext: rows.map((row) => names[row]), tickfont: { size: 11 } }),
    }), options(chart));
  }

  function options(chart) {
    return {
      responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover",
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
      toImageButtonOptions: { filename: "lamina-" + chart.id },
    };
  }

  const draw = (chart) => chart.kind === "heat" ? drawHeat(chart) : drawLines(chart);

  // Charts are drawn when they come near the screen: a page of twenty opens at once.
  const waiting = new Map(data.charts.map((chart) => [element(chart), chart]));
  const drawn = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      const chart = waiting.get(entry.target);
      drawn.add(chart);
      draw(chart);
    }
  }, { rootMargin: "600px" });
  waiting.forEach((_, place) => watcher.observe(place));
  const redraw = () => drawn.forEach(draw);
  dark.addEventListener("change", redraw);
  narrow.addEventListener("change", redraw);
  addEventListener("beforeprint", () => data.charts.forEach((chart) => { drawn.add(chart); draw(chart); }));

  // --- buttons ----------------------------------------------------------------------------------

  function pressed() {
    document.querySelectorAll("[data-group]").forEach((button) => {
      button.setAttribute("aria-pressed", String(!hidden.has(+button.dataset.group)));
    });
    document.querySelectorAll("[data-axis]").forEach((button) => {
      const chart = data.charts.find((each) => each.id === button.dataset.axis);
      button.setAttribute("aria-pressed", String((button.dataset.type === "log") === chart.log));
    });
    document.querySelectorAll("[data-planned]").forEach((button) => {
      button.setAttribute("aria-pressed", String(!withoutPlan.has(button.dataset.planned)));
    });
  }

  const toggle = (set, value) => { if (!set.delete(value)) set.add(value); };
  const everyGroup = () => data.groups.forEach((_, place) => hidden.add(place));

  const actions = {
    group: (value) => toggle(hidden, +value),
    all: (value) => { hidden.clear(); if (value === "0") everyGroup(); },
    only: (value) => { hidden.clear(); everyGroup(); value.split(" ").forEach((place) => hidden.delete(+place)); },
    planned: (value) => toggle(withoutPlan, value),
    axis: (value, button) => { data.charts.find((each) => each.id === value).log = button.dataset.type === "log"; },
    tree: (value) => {
      document.body.dataset.tree = value;
      document.querySelectorAll("[data-tree]").forEach((button) => {
        if (button !== document.body) button.setAttribute("aria-pressed", String(button.dataset.tree === value));
      });
    },
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    for (const [name, act] of Object.entries(actions)) {
      if (button.dataset[name] !== undefined) {
        act(button.dataset[name], button);
        pressed();
        if (name !== "tree") redraw();
      }
    }
  });
  // A double click shows one group alone, as plotly's own legend does.
  document.addEventListener("dblclick", (event) => {
    const button = event.target.closest("[data-group]");
    if (!button) return;
    actions.only(button.dataset.group);
    pressed();
    redraw();
  });

  // --- reading a chart with the arrow keys --------------------------------------------------------

  const reading = new Map();
  document.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const chart = waiting.get(event.target);
    if (move === undefined || !chart || !drawn.has(chart)) return;
    event.preventDefault();
    const shown = chart.kind === "heat" ? [] : chart.traces.filter((trace) => isShown(chart, trace));
    const steps = chart.kind === "heat" ? chart.x
      : [...new Set(shown.flatMap((trace) => trace.x))].sort((a, b) => a - b);
    if (!steps.length) return;
    const before = reading.has(chart) ? reading.get(chart) : -1;
    const place = Math.max(0, Math.min(steps.length - 1, before + move));
    reading.set(chart, place);
    const step = steps[place];
    if (chart.kind === "heat") {
      const rows = chart.rows.map((name, row) => [name, chart.z[row][place]])
        .filter((row) => row[1] !== null).slice(0, 8);
      said.textContent = "steps " + chart.from[place] + " to " + chart.to[place] + ": "
        + rows.map((row) => row[0] + " " + number(Math.pow(10, row[1]))).join(", ");
      return;
    }
    const values = shown.map((trace) => [trace, trace.y[trace.x.indexOf(step)]])
      .filter((row) => row[1] !== undefined && row[1] !== null).slice(0, 8);
    said.textContent = "step " + step + ": " + values.map(([trace, value]) =>
      (trace.group === undefined ? trace.name : data.groups[trace.group].name + " " + (trace.name || ""))
      + " " + number(value)).join(", ");
    if (!values.length) return;
    const curve = chart.traces.indexOf(values[0][0]);
    Plotly.Fx.hover(event.target, [{ curveNumber: curve, pointNumber: values[0][0].x.indexOf(step) }]);
  });

  pressed();
})();
