// Cards of completions: which token is pointed at, what the colours show, in which order the cards stand.
// Model text reaches the page as text content only.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const signed = (value, digits) => value === null ? "not a number" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  let current = null;

  function fillTip(token, numbers, index) {
    const step = numbers.steps[index];
    const rows = [
      ["process reward", signed(numbers.rewards[index], 4)],
      ["log-prob, PRM", signed(numbers.prm[index], 3)],
      ["log-prob, reference", signed(numbers.reference[index], 3)],
      [`step ${step + 1} of ${numbers.stepRewards.length}`, signed(numbers.stepRewards[step], 4)],
    ];
    const name = document.createElement("b");
    name.textContent = token.textContent.trim() === "" ? `"${token.textContent}"` : token.textContent;
    const table = document.createElement("table");
    for (const row of rows) {
      const tr = table.insertRow();
      for (const text of row) tr.insertCell().textContent = text;
    }
    tip.replaceChildren(name, table);
  }

  function placeTip(token) {
    tip.hidden = false;
    const at = token.getClientRects()[0] || token.getBoundingClientRect();
    const below = at.bottom + 6 + tip.offsetHeight < innerHeight;
    tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, below ? at.bottom + 6 : at.top - tip.offsetHeight - 6)}px`;
  }

  function leave() {
    if (!current) return;
    current.classList.remove("at");
    current.closest(".card").querySelector(".cursor").setAttribute("visibility", "hidden");
    current = null;
    tip.hidden = true;
  }

  function enter(token) {
    if (token === current) return;
    leave();
    const card = token.closest(".card");
    const numbers = data.cards[card.dataset.index];
    const index = card.tokens.indexOf(token);
    current = token;
    token.classList.add("at");
    const cursor = card.querySelector(".cursor");
    const width = card.querySelector(".spark").viewBox.baseVal.width;
    const x = (index + 1) / numbers.rewards.length * width;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    fillTip(token, numbers, index);
    placeTip(token);
  }

  for (const card of document.querySelectorAll(".card")) {
    card.tokens = [...card.querySelectorAll(".token")];
    if (!card.tokens.length) continue;
    // One stop of the tab key for a completion; the arrows go on from there
    card.tokens.forEach((token, i) => { token.tabIndex = i ? -1 : 0; });
    const of = (event) => event.target.closest(".token");
    card.addEventListener("pointerover", (event) => of(event) ? enter(of(event)) : leave());
    card.addEventListener("pointerleave", leave);
    card.addEventListener("focusin", (event) => of(event) && enter(of(event)));
    card.addEventListener("focusout", leave);
    card.addEventListener("click", (event) => of(event) && of(event).focus({ preventScroll: true }));
    card.addEventListener("keydown", (event) => {
      const last = card.tokens.length - 1;
      const from = card.tokens.indexOf(of(event));
      if (from < 0) return;
      const to = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from - 1, ArrowUp: from - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = card.tokens[Math.max(0, Math.min(last, to))];
      card.tokens[from].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") leave(); });
  addEventListener("scroll", () => current && placeTip(current), { passive: true, capture: true });

  const buttons = [...document.querySelectorAll("[data-set-colour]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      document.body.dataset.colour = button.dataset.setColour;
      for (const other of buttons) other.setAttribute("aria-pressed", other.dataset.setColour === button.dataset.setColour);
    });
  }

  const order = document.getElementById("order");
  order?.addEventListener("change", () => {
    const sign = { given: 0, high: -1, low: 1 }[order.value];
    for (const grid of document.querySelectorAll(".grid")) {
      const cards = [...grid.children];
      cards.sort((a, b) => sign * (a.dataset.q - b.dataset.q) || a.dataset.index - b.dataset.index);
      grid.append(...cards);
    }
  });
})();
