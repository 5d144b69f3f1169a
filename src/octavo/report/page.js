// Draws the charts of a page: their configurations stand in #charts, their colors in the style sheet.
(() => {
  const configs = JSON.parse(document.getElementById("charts").textContent);
  const drawn = [];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const tooltip = {
    callbacks: {
      label: (item) => {
        const point = item.raw;
        const number = (value) => Number(value.toPrecision(4)).toLocaleString("en-US");
        const range = point.yMin === undefined ? "" : ` (${number(point.yMin)} to ${number(point.yMax)})`;
        const label = point.label ? `, ${point.label}` : "";
        return `${item.dataset.label}${label}: ${number(point.y)}${range}`;
      },
    },
  };

  function colored(config) {
    const copy = structuredClone(config);
    const ink = color("--soft");
    const line = color("--line");
    for (const axis of Object.values(copy.options.scales)) {
      axis.grid = { color: line };
      axis.ticks = { color: ink, maxRotation: 0, autoSkipPadding: 12 };
      axis.title.color = ink;
    }
    copy.options.plugins.legend.labels.color = color("--ink");
    copy.options.plugins.tooltip = tooltip;
    for (const dataset of copy.data.datasets) {
      const own = dataset.color === "limit" ? color("--limit") : color(`--series-${dataset.color % 6}`);
      dataset.borderColor = dataset.backgroundColor = own;
      dataset.errorBarColor = dataset.errorBarWhiskerColor = own;
      dataset.errorBarLineWidth = dataset.errorBarWhiskerLineWidth = 1;
      dataset.errorBarWhiskerSize = 5;
      dataset.borderWidth = 2;
    }
    return copy;
  }

  function draw() {
    while (drawn.length) drawn.pop().destroy();
    document.querySelectorAll("canvas[data-chart]").forEach((canvas) => {
      drawn.push(new Chart(canvas, colored(configs[Number(canvas.dataset.chart)])));
    });
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
