// SPDX-License-Identifier: Apache-2.0
(() => {
  const box = document.getElementById("browser");
  if (!box) return;
  const PAGE = 50;
  const all = document.getElementById("all-answers");
  const entries = [...box.querySelectorAll(".entry")];
  const search = document.getElementById("filter-text");
  const selects = [...box.querySelectorAll("select[data-filter]")];
  const differs = document.getElementById("filter-differs");
  const found = document.getElementById("found");
  const moreLine = document.getElementById("more-line");
  let texts = null;
  let matching = entries;
  let shown = PAGE;

  // Text is gathered at the first search only: with thousands of items it takes a moment.
  const textOf = (place) => {
    texts ??= entries.map((entry) => entry.textContent.toLowerCase());
    return texts[place];
  };
  const holds = (entry, name, wanted) => {
    const own = entry.dataset[name] ?? "";
    if (wanted === "*") return own !== "";
    return name === "labels" || name === "turns" ? own.split("|").includes(wanted) : own === wanted;
  };

  const draw = () => {
    const visible = new Set(matching.slice(0, shown));
    for (const entry of entries) entry.hidden = !visible.has(entry);
    const left = matching.length - visible.size;
    found.textContent = `${matching.length.toLocaleString("en")} of ${entries.length.toLocaleString("en")} items${left ? `, ${visible.size} shown` : ""}`;
    moreLine.hidden = left === 0;
  };
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = selects.filter((one) => one.value).map((one) => [one.dataset.filter, one.value]);
    matching = entries.filter(
      (entry, place) =>
        wanted.every(([name, value]) => holds(entry, name, value)) &&
        !(differs?.checked && !("differs" in entry.dataset)) &&
        words.every((word) => textOf(place).includes(word)),
    );
    shown = PAGE;
    draw();
  };
  const clear = () => {
    search.value = "";
    for (const one of selects) one.value = "";
    if (differs) differs.checked = false;
  };

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 120);
  });
  for (const one of selects) one.addEventListener("change", apply);
  differs?.addEventListener("change", apply);
  document.getElementById("clear-filters").addEventListener("click", () => {
    clear();
    apply();
    search.focus();
  });
  for (const [name, open] of [["open-shown", true], ["close-shown", false]]) {
    document.getElementById(name).addEventListener("click", () => {
      for (const entry of matching.slice(0, shown)) entry.open = open;
    });
  }
  document.getElementById("more").addEventListener("click", () => {
    const next = matching[shown];
    shown += PAGE;
    draw();
    next?.querySelector("summary").focus();
  });
  for (const link of document.querySelectorAll("a[data-turn]")) {
    link.addEventListener("click", () => {
      clear();
      document.getElementById("filter-turns").value = link.dataset.turn;
      apply();
    });
  }
  // A link to one item shows it, whatever the filters say.
  const follow = () => {
    const entry = entries.find((one) => `#${one.id}` === location.hash);
    if (!entry) return;
    clear();
    apply();
    matching = [entry, ...entries.filter((one) => one !== entry)];
    draw();
    entry.open = true;
    entry.scrollIntoView();
    entry.querySelector("summary").focus({ preventScroll: true });
  };
  addEventListener("hashchange", follow);

  for (const part of box.querySelectorAll(".filters, .tools")) part.hidden = false;
  all.open = true;
  all.classList.add("led");
  apply();
  follow();
})();
