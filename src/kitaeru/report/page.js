"use strict";
// Without this script the page is complete; it adds a tooltip on curves and a button that copies the recipe.
for (const figure of document.querySelectorAll(".chart")) {
  const plot = figure.querySelector(".plot");
  const chart = JSON.parse(figure.dataset.chart);
  let rule, tip;
  const nearest = (places, x) => {
    let low = 0, high = places.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (places[middle] < x) low = middle; else high = middle;
    }
    return x - places[low] < places[high] - x ? low : high;
  };
  const hide = () => { if (tip) { tip.remove(); rule.remove(); tip = rule = null; } };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const x = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const found = chart.curves.map((curve) => ({ curve, i: nearest(curve.at, x) }));
    const first = found.reduce((a, b) =>
      Math.abs(b.curve.at[b.i] - x) < Math.abs(a.curve.at[a.i] - x) ? b : a);
    const at = first.curve.at[first.i];
    if (!tip) {
      rule = plot.appendChild(document.createElement("div"));
      rule.className = "rule";
      tip = plot.appendChild(document.createElement("div"));
      tip.className = "tip";
    }
    rule.style.left = `${100 * at}%`;
    tip.textContent = `${chart.x} ${first.curve.step[first.i].toLocaleString("en")}`;
    for (const { curve, i } of found) {
      // A curve with few points speaks only near one of them.
      if (Math.abs(curve.at[i] - at) > 0.012) continue;
      const line = tip.appendChild(document.createElement("div"));
      line.textContent = chart.curves.length > 1 ? `${curve.name} ` : "";
      line.appendChild(document.createElement("b")).textContent = curve.text[i];
    }
    const right = at * box.width + 12 + tip.offsetWidth > box.width;
    tip.style.left = right ? `${Math.max(0, at * box.width - 12 - tip.offsetWidth)}px` : `${at * box.width + 12}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
for (const holder of document.querySelectorAll(".recipe")) {
  const button = holder.appendChild(document.createElement("button"));
  button.type = "button";
  button.className = "copy";
  button.textContent = holder.dataset.copy;
  button.addEventListener("click", async () => {
    const text = holder.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(holder.querySelector("pre"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = holder.dataset.copied;
    setTimeout(() => { button.textContent = holder.dataset.copy; }, 1500);
  });
}
