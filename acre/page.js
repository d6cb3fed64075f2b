"use strict";
// n and p go through the passages in the order of the text; a click on the map goes to
// the nearest one; a box on the map shows what part of the text is on the screen.
(() => {
  const passages = [...document.querySelectorAll(".passage")];
  const map = document.querySelector(".map svg");
  const links = [...map.querySelectorAll("a")];
  const box = map.querySelector(".seen");
  const marks = [...document.querySelectorAll("[data-at]")];
  const total = Number(map.dataset.total);
  let now = -1;

  const choose = (index) => {
    for (const list of [passages, links]) {
      if (list[now]) list[now].classList.remove("now");
      if (list[index]) list[index].classList.add("now");
    }
    now = index;
  };

  const go = (index) => {
    const passage = passages[index];
    if (!passage) return;
    location.replace("#" + passage.id); // no entry in the history
    choose(index);
    passage.focus({ preventScroll: true });
  };

  const onScreen = (element) => {
    const { top, bottom } = element.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  };

  // From the chosen passage while it is on the screen, else from where the reader is.
  const step = (by) => {
    if (passages[now] && onScreen(passages[now])) return go(now + by);
    const below = passages.findIndex((p) => p.getBoundingClientRect().bottom > 0);
    const first = below < 0 ? passages.length : below;
    go(by > 0 ? first : first - 1);
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "n") step(1);
    if (event.key === "p") step(-1);
  });

  map.addEventListener("click", (event) => {
    event.preventDefault();
    const { top, height } = map.getBoundingClientRect();
    const at = ((event.clientY - top) / height) * total;
    const distance = (p) => Math.abs(Number(p.dataset.at) - at);
    let best = 0;
    passages.forEach((p, i) => { if (distance(p) < distance(passages[best])) best = i; });
    go(best);
  });

  const followHash = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (!target) return;
    const hidden = target.closest("details");
    if (hidden) hidden.open = true;
    const index = passages.indexOf(target);
    if (index >= 0) choose(index);
  };

  // The place in the text at a height of the screen, straight between known places.
  const placeAt = (y) => {
    let low = 0;
    let high = marks.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (marks[middle].getBoundingClientRect().top > y) high = middle;
      else low = middle + 1;
    }
    if (low === 0) return 0;
    const edge = (i) => marks[i].getBoundingClientRect().top;
    const end = low < marks.length ? edge(low)
      : document.getElementById("text").getBoundingClientRect().bottom;
    const from = Number(marks[low - 1].dataset.at);
    const to = low < marks.length ? Number(marks[low].dataset.at) : total;
    const part = (y - edge(low - 1)) / Math.max(end - edge(low - 1), 1);
    return from + Math.min(Math.max(part, 0), 1) * (to - from);
  };

  let waiting = false;
  const follow = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const [from, to] = [placeAt(0), placeAt(innerHeight)];
      box.setAttribute("y", (1000 * from) / total);
      box.setAttribute("height", Math.max((1000 * (to - from)) / total, 2));
    });
  };

  addEventListener("hashchange", followHash);
  addEventListener("scroll", follow, { passive: true });
  addEventListener("resize", follow);
  document.addEventListener("toggle", follow, true);
  followHash();
  follow();
})();
