"use strict";

const SMALL_PX = 256; // pictures of fewer pixels a side are shown with their pixels
const STEP_PX = 80; // that Shift and an arrow moves pictures of actual size
const at = (id) => document.getElementById(id);
const sides = { left: at("left"), right: at("right") };

let state; // what the server tells: pairs, rubric, who and where
let shown = -1; // number of the pair on the page; the number of pairs when all are done
let isBusy = true; // pictures are loading or a vote is being written: no key counts
let trail = []; // numbers of the pairs shown before this one
const skipped = new Set();
const drafts = new Map(); // scores given and not yet sent, by number

async function begin() {
  state = await ask("state");
  at("dimension").textContent = words(state.dimension);
  at("annotator").textContent = state.annotator;
  at("file").textContent = state.file;
  at("question").textContent = state.rubric.question;
  at("counts").replaceChildren(...state.rubric.counts.map((text) => element("li", { textContent: text })));
  at("ignore").textContent = state.rubric.ignore;
  at("scale").textContent = state.scale.map((name, index) => `${index + 1} ${name}`).join(", ");
  at("rubric").hidden = false;
  for (const side of ["left", "right"]) {
    const buttons = state.scale.map((name, index) => {
      const button = element("button", { type: "button", textContent: index + 1, title: name });
      button.setAttribute("aria-label", `${index + 1}, ${name}`);
      button.addEventListener("click", () => score(side, index + 1));
      return button;
    });
    sides[side].querySelector(".scores").replaceChildren(...buttons);
  }
  Object.entries(state.reasons).forEach(([reason, text], index) => {
    const button = element("button", { type: "button" });
    button.dataset.reason = reason;
    button.append(element("kbd", { textContent: index + 1 }), ` ${text}`);
    button.addEventListener("click", () => give("invalid", reason));
    at("reason-list").append(button);
  });
  await show(following(-1));
}

/** The next pair without a vote after `number`, those that were skipped last; the number of pairs when there is none. */
function following(number) {
  const open = state.pairs.map((pair, index) => index).filter((index) => !state.pairs[index].vote);
  const fresh = open.filter((index) => !skipped.has(index));
  const left = fresh.length ? fresh : open;
  return left.find((index) => index > number) ?? left[0] ?? state.pairs.length;
}

async function show(number, { trace = true } = {}) {
  setBusy(true);
  if (trace && shown >= 0) trail.push(shown);
  shown = number;
  const isDone = number === state.pairs.length;
  at("pair").hidden = isDone;
  at("done").hidden = !isDone;
  refresh();
  at("note").hidden = true;
  if (isDone) {
    setBusy(false);
    at("done").querySelector("h1").focus();
    return;
  }
  const pair = state.pairs[number];
  at("reason-list").querySelector("[data-reason=source]").hidden = !pair.num_sources;
  at("kind").textContent = pair.num_sources ? "instruction" : "prompt";
  at("prompt").textContent = pair.prompt;
  const sources = Array.from({ length: pair.num_sources }, (_, index) => {
    const name = pair.num_sources > 1 ? `source ${index + 1}` : "source";
    const figure = element("figure", { className: "card" });
    const image = element("img", { alt: name });
    const well = element("div", { className: "well" });
    well.append(image);
    figure.append(well, element("figcaption", { textContent: name }));
    return [figure, image, `source-${index}`];
  });
  at("sources").replaceChildren(...sources.map(([figure]) => figure));
  at("sources").style.setProperty("--sources", sources.length);
  const images = [...sources.map(([, image, name]) => [image, name]), ...Object.entries(sides).map(([name, side]) => [side.querySelector("img"), name])];
  try {
    await Promise.all(images.map(([image, name]) => load(image, `pictures/${number}/${name}`)));
  } catch {
    tell("A picture of this pair cannot be shown: it is broken, or the server has ended. A broken one is invalid (x).");
  }
  setBusy(false);
  window.scrollTo(0, 0);
  const coming = following(number);
  if (coming < state.pairs.length) for (const side of ["left", "right"]) new Image().src = `pictures/${coming}/${side}`; // no wait there
}

async function load(image, source) {
  image.classList.remove("pixelated");
  image.src = source;
  await image.decode();
  image.classList.toggle("pixelated", Math.max(image.naturalWidth, image.naturalHeight) < SMALL_PX);
}

/** Shows votes, scores and progress as they are. */
function refresh() {
  const numDone = state.pairs.filter((pair) => pair.vote).length;
  at("progress").max = state.pairs.length;
  at("progress").value = numDone;
  at("count").textContent = `${numDone} of ${state.pairs.length}`;
  at("back").disabled = !trail.length && shown <= 0;
  if (shown === state.pairs.length) return;
  const vote = state.pairs[shown].vote;
  for (const button of document.querySelectorAll("[data-label]")) press(button, vote?.label === button.dataset.label);
  press(at("invalid"), vote?.label === "invalid");
  at("next").querySelector("span").textContent = vote ? "Next" : "Skip";
  const scores = given();
  for (const side of ["left", "right"]) {
    sides[side].classList.toggle("chosen", vote?.label === side);
    sides[side].querySelectorAll(".scores button").forEach((button, index) => press(button, scores[side] === index + 1));
  }
}

/** The scores of the pair on the page: those not yet sent, or those of its vote. */
function given() {
  return drafts.get(shown) ?? state.pairs[shown].vote?.scores ?? {};
}

function score(side, value) {
  if (isBusy) return;
  const scores = { ...given() };
  if (scores[side] === value) delete scores[side];
  else scores[side] = value;
  drafts.set(shown, scores);
  refresh();
  say(scores[side] ? `${side} picture: ${value}, ${state.scale[value - 1]}. Counts with your vote.` : `${side} picture: no score.`);
}

async function give(label, reason = null) {
  if (isBusy) return;
  at("reasons").close();
  const pair = state.pairs[shown];
  const { left, right } = given();
  if (label !== "invalid" && (left === undefined) !== (right === undefined)) {
    const [missing, keys] = left === undefined ? ["left", "1 to 5"] : ["right", "6 to 0"];
    say(`Only one picture has a score: give the ${missing} one its own (${keys}), or press the score again to take it back.`);
    return;
  }
  const scores = label === "invalid" || left === undefined ? null : { left, right };
  setBusy(true);
  try {
    await ask("votes", { pair_id: pair.pair_id, label, scores, reason });
  } catch (error) {
    setBusy(false);
    tell(`Not saved: ${error.message} The vote is not lost: press its key again.`);
    return;
  }
  pair.vote = { label, scores, reason };
  drafts.delete(shown);
  skipped.delete(shown);
  const text = { left: "left is better", right: "right is better", tie: "tie", invalid: "invalid" }[label];
  say(`Saved: ${text}.`);
  await show(following(shown));
}

function next() {
  if (isBusy || shown === state.pairs.length) return;
  const isVoted = Boolean(state.pairs[shown].vote);
  if (!isVoted) skipped.add(shown);
  say(isVoted ? "" : "Skipped: it comes again.");
  const number = isVoted && shown + 1 < state.pairs.length ? shown + 1 : following(shown);
  if (number === shown) say("This is the only pair that has no vote yet.");
  else show(number);
}

function back() {
  if (isBusy) return;
  const number = trail.pop() ?? shown - 1;
  if (number < 0) return;
  say("Back. Another vote replaces the one that is marked.");
  show(number, { trace: false });
}

/** Pictures at their own size, moved together, or whole. */
function magnify() {
  const isOn = at("pair").classList.toggle("magnified");
  press(at("magnify"), isOn);
  say(isOn ? "Actual size: Shift and an arrow moves both pictures." : "");
}

/** Moves all pictures to where `leader` is, by its share of the way, for they may differ in size. */
function follow(leader) {
  for (const well of document.querySelectorAll(".well")) {
    for (const [place, whole, seen] of [["scrollTop", "scrollHeight", "clientHeight"], ["scrollLeft", "scrollWidth", "clientWidth"]]) {
      const target = (leader[place] / Math.max(1, leader[whole] - leader[seen])) * (well[whole] - well[seen]);
      if (well !== leader && Math.abs(well[place] - target) > 1) well[place] = target;
    }
  }
}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer. If darkroom label was ended, start it again and open the address that it prints.");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(`${answer.error}.`);
  return answer;
}

function pressed(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || !state) return;
  if (event.repeat && !event.shiftKey) return; // a key that is held down is one vote
  const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1]; // the place of the key: with Shift its character is another
  // Of keyboards without Latin letters the key's place counts.
  const key = /^Key[A-Z]$/.test(event.code) && !/^[a-z]$/i.test(event.key) ? event.code.at(-1).toLowerCase() : event.key;
  if (document.querySelector("dialog[open]")) {
    if (key === "?") at("keys").close();
    else if (at("reasons").open && digit) at("reason-list").querySelector(`:not([hidden]):nth-child(${digit})`)?.click();
    return;
  }
  if (event.shiftKey && event.key.startsWith("Arrow")) {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const well = sides.left.querySelector(".well");
    well.scrollBy(STEP_PX * x, STEP_PX * y);
    follow(well); // at once: an event of the other picture, still where it was, would pull this one back
    event.preventDefault();
    return;
  }
  const onPage = shown < state.pairs.length;
  const actions = {
    ArrowLeft: () => give("left"), ArrowRight: () => give("right"), "=": () => give("tie"), t: () => give("tie"),
    x: () => isBusy || at("reasons").showModal(), n: next, z: magnify, "?": () => at("keys").showModal(), Backspace: back,
  };
  let action = actions[key.length === 1 ? key.toLowerCase() : key];
  if (!onPage && key !== "Backspace" && key !== "?") action = undefined;
  else if (!action && digit && onPage) {
    const value = Number(digit) || 10;
    if (value > 5) action = () => score("right", value - 5);
    else action = () => score(event.shiftKey ? "right" : "left", value);
  }
  if (!action) return;
  event.preventDefault();
  action();
}

function setBusy(value) {
  isBusy = value;
  at("pair").setAttribute("aria-busy", value);
}

function say(text) { at("status").textContent = text; }
function tell(text) { at("note").textContent = text; at("note").hidden = false; }
function press(button, isPressed) { button.setAttribute("aria-pressed", isPressed); }
function words(name) { return name.replaceAll("_", " "); }
function element(name, properties) { return Object.assign(document.createElement(name), properties); }

document.addEventListener("keydown", pressed);
for (const button of document.querySelectorAll("[data-label]")) button.addEventListener("click", () => give(button.dataset.label));
for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
at("invalid").addEventListener("click", () => isBusy || at("reasons").showModal());
at("keys").addEventListener("click", (event) => event.target === at("keys") && at("keys").close());
at("help").addEventListener("click", () => at("keys").showModal());
at("magnify").addEventListener("click", magnify);
document.addEventListener("scroll", (event) => event.target.classList?.contains("well") && follow(event.target), true);
at("next").addEventListener("click", next);
at("back").addEventListener("click", back);
at("review").addEventListener("click", back);
begin().catch((error) => tell(`The page could not be opened: ${error.message}`));
