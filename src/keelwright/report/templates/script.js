// SPDX-License-Identifier: Apache-2.0
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    tell();
  });
  system.addEventListener("change", tell);
  theme.hidden = false;
  tell();

  for (const button of document.querySelectorAll("[data-fold]")) {
    const folds = [...(button.closest("section") ?? document).querySelectorAll("details.fold")];
    button.hidden = folds.length === 0;
    button.addEventListener("click", () => folds.forEach((fold) => (fold.open = button.dataset.fold === "open")));
  }

  const copy = document.getElementById("copy");
  if (copy) {
    const command = document.getElementById("command-text");
    const said = document.getElementById("copied");
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command.textContent);
        said.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(command);
        said.textContent = "Selected: copy it with the keyboard";
      }
    });
  }

  // Paper cannot be clicked: tables of values open for printing. Folded answers stay as the reader left them.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.data:not([open])")];
    opened.forEach((one) => (one.open = true));
  });
  addEventListener("afterprint", () => {
    opened.forEach((one) => (one.open = false));
    opened = [];
  });
})();
