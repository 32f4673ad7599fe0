"use strict";
(() => {
  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  const read = () => { try { return localStorage.getItem("report-theme"); } catch { return null; } };
  const write = (theme) => { try { localStorage.setItem("report-theme", theme); } catch { /* not stored */ } };
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.firstElementChild.textContent = theme;
  };
  show(themes.includes(read()) ? read() : "system");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    show(next);
    write(next);
  });
})();
