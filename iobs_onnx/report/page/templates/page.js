"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Light or dark: the system decides until the button is pressed.
  const dark = () => (root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  document.querySelector(".theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    drawMask();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawMask());

  // What a mark of a figure stands for.
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (mark) => {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const left = at.left + at.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    const above = at.top - tip.offsetHeight - 8;
    tip.style.top = `${above > 60 ? above : at.bottom + 8}px`;
  };
  all("[data-tip]").forEach((mark) => {
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => show(mark));
    mark.addEventListener("blur", hide);
  });
  addEventListener("scroll", hide, { passive: true });

  // Search and sort.
  const search = document.getElementById("search");
  const rows = all("#sites tbody tr");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    });
    document.getElementById("count").textContent = `${shown} of ${rows.length}`;
  };
  if (search) {
    search.addEventListener("input", filter);
    filter();
  }
  all("#sites th button").forEach((button) => button.addEventListener("click", () => {
    const head = button.closest("th");
    const column = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    all("#sites th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => {
      const cell = row.children[column];
      return "v" in cell.dataset ? Number(cell.dataset.v || NaN) : cell.textContent.trim();
    };
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (typeof x === "string") return (up ? 1 : -1) * x.localeCompare(y, undefined, { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return (up ? 1 : -1) * (x - y);
    };
    [...rows].sort(compare).forEach((row) => row.parentNode.append(row));
  }));

  // The mask of one site.
  const data = document.getElementById("masks-data");
  const masks = data ? JSON.parse(data.textContent) : [];
  const pick = document.getElementById("mask-site");
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const paint = (id, [height, width], group, border, cell) => {
    const canvas = document.getElementById(id);
    const size = Math.max(8, Math.floor(1024 / width));
    const left = (x) => x * size + (group ? Math.floor(x / group) * 6 : 0);
    canvas.width = left(width - 1) + size;
    canvas.height = height * size;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = getComputedStyle(root).getPropertyValue("--accent");
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        context.globalAlpha = cell(y * width + x);
        context.fillRect(left(x), y * size, size - border, size - border);
      }
    }
  };
  const drawMask = () => {
    if (!pick || !masks.length) return;
    const { mask, group } = masks[pick.selectedIndex];
    const [corner, density] = [bytes(mask.corner), bytes(mask.density)];
    paint("corner", mask.corner_shape, group, 2, (i) => ((corner[i >> 3] >> (7 - (i & 7))) & 1 ? 1 : 0.08));
    paint("density", mask.density_shape, 0, 0, (i) => density[i] / 255);
    document.getElementById("corner-text").textContent =
      `Top left corner, ${mask.corner_shape.join(" × ")} of ${mask.shape.join(" × ")} weights: filled = kept.`;
    const range = [Math.min(...density), Math.max(...density)].map((v) => `${Math.round(v / 2.55)} %`);
    document.getElementById("density-text").textContent =
      `The whole mask in ${mask.density_shape.join(" × ")} cells: from ${range[0]} (palest) to ${range[1]} kept.`;
  };
  if (pick) pick.addEventListener("change", drawMask);
  const follow = () => {
    const found = /^#site-(\d+)$/.exec(location.hash);
    if (!found) return;
    if (search && search.value) {
      search.value = "";
      filter();
    }
    if (pick) {
      pick.selectedIndex = masks.findIndex((item) => item.row === Number(found[1]));
      drawMask();
    }
  };
  addEventListener("hashchange", follow);
  follow();
  drawMask();
})();
