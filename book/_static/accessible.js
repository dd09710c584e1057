/* What the theme's pages lack for a keyboard and a screen reader. */
addEventListener("DOMContentLoaded", () => {
  // The sidebar is a landmark, a blank corner of a table is no heading, and a reference is an item of its list.
  const sidebar = document.getElementById("pst-primary-sidebar");
  sidebar?.setAttribute("role", "complementary");
  sidebar?.setAttribute("aria-label", "Book");
  // The arrow beside a chapter in the sidebar opens the list of the pages beneath it.
  for (const arrow of document.querySelectorAll(".toctree-l1 > details > summary")) {
    arrow.setAttribute("aria-label", `Pages beneath ${arrow.closest("li").querySelector("a").textContent.trim()}`);
  }
  for (const th of document.querySelectorAll("th")) {
    if (!th.textContent.trim()) th.replaceWith(document.createElement("td"));
  }
  for (const entry of document.querySelectorAll("[role='doc-biblioentry']")) entry.setAttribute("role", "listitem");

  // What scrolls sideways inside the page (a wide table, a long formula) can be reached and scrolled by keyboard, and
  // says what it is; what fits is no stop on the way.
  const kinds = {
    "Table, scrolls sideways": ".pst-scrollable-table-container, .indextable",
    "Formula, scrolls sideways": "div.math, mjx-container[display='true']",
    "Code, scrolls sideways": ".bd-article pre",
  };
  const article = document.querySelector(".bd-article");
  const reach = () => {
    for (const [label, selector] of Object.entries(kinds)) {
      for (const e of document.querySelectorAll(selector)) {
        const scrolls = e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX !== "visible";
        if (scrolls === (e.getAttribute("aria-label") === label)) continue;
        for (const [name, value] of [["tabindex", "0"], ["role", "group"], ["aria-label", label]]) {
          if (scrolls) e.setAttribute(name, value);
          else e.removeAttribute(name);
        }
      }
    }
  };
  if (article) new ResizeObserver(reach).observe(article);
  reach();
});
