// What is under the pointer is read out beside it, and a run is hidden by its button. The page is whole without either.
"use strict";
const tip = document.getElementById("tip"), hidden = new Set();
const number = (value, percent) => {
  if (percent) return (100 * value).toFixed(1) + "%";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size > 0 && size < 1e-3 ? value.toExponential(2) : value.toPrecision(4);
};
const nearest = (points, x) => {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (points[mid][0] < x) low = mid + 1; else high = mid;
  }
  return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
};
const row = (run, name, value) => {
  const line = document.createElement("div"), left = document.createElement("span"), right = document.createElement("b");
  if (run !== null) {
    const dot = document.createElement("i");
    dot.className = "dot";
    line.className = "c" + run;
    left.append(dot);
  }
  left.append(name);
  right.append(value);
  line.append(left, right);
  return line;
};
for (const figure of document.querySelectorAll("figure")) {
  const source = figure.querySelector("script");
  if (!source) continue;
  const data = JSON.parse(source.textContent);
  for (const svg of figure.querySelectorAll("svg")) {
    const axis = svg.parentNode.className.slice(3), {x, lines} = data.axes[axis];
    const [left, top, right, bottom] = [58, 24, 546, 256];
    const cursor = document.createElementNS(svg.namespaceURI, "path");
    cursor.setAttribute("class", "cursor");
    const leave = () => { tip.hidden = true; cursor.remove(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) * 560 / box.width;
      const shown = lines.filter(line => line[2].length && !hidden.has(line[0]));
      if (at < left - 6 || at > right + 6 || !shown.length) return leave();
      const wanted = x[0] + (x[1] - x[0]) * (at - left) / (right - left);
      const found = shown.map(line => [line, nearest(line[2], wanted)]);
      const here = found.map(one => one[1][0]).reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
      const place = left + (right - left) * (here - x[0]) / (x[1] - x[0]);
      cursor.setAttribute("d", `M${place} ${top}V${bottom}`);
      svg.append(cursor);
      const close = (x[1] - x[0]) / 25;
      const title = axis === "step" ? here.toLocaleString("en") : +here.toFixed(2);
      tip.replaceChildren(row(null, data.names[axis], title));
      for (const [line, point] of found)
        if (Math.abs(point[0] - here) <= close)
          tip.append(row(line[0], [data.runs[line[0]], data.words[line[1]]].filter(Boolean).join(", "), number(point[1], data.percent)));
      tip.hidden = false;
      const beyond = event.pageX + 16 + tip.offsetWidth > window.scrollX + document.documentElement.clientWidth;
      tip.style.left = Math.max(4, beyond ? event.pageX - 16 - tip.offsetWidth : event.pageX + 16) + "px";
      tip.style.top = event.pageY + 14 + "px";
    });
  }
}
for (const chip of document.querySelectorAll(".chip"))
  chip.addEventListener("click", () => {
    const run = +chip.dataset.run, on = chip.getAttribute("aria-pressed") === "false";
    chip.setAttribute("aria-pressed", on);
    if (on) hidden.delete(run); else hidden.add(run);
    for (const part of document.querySelectorAll(".r" + run)) part.style.display = on ? "" : "none";
  });
