// The page: one form, one job, followed by polling until it is closed.
// Whatever an answer holds was written by strangers: it becomes text, never markup, and never an address to follow.

const POLL_MIN_MS = 150;
const POLL_MAX_MS = 3_000;
const POLL_GROWTH = 1.6;
const ANSWER_WAIT_MS = 15_000;
const FOLLOW_MAX_MS = 15 * 60_000;

const ROWS_MAX = 64;
const DEPTH_MAX = 4;
const TEXT_MAX = 4_000;
const RAW_MAX = 1_000_000;
const FACTS_MAX = 200;

const JOB_ID = /^#job=([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$/i;
const ENDED = new Set(["Succeeded", "Failed", "TimedOut", "Skipped"]);
const CLOSED = new Set(["Completed", "Failed", "Cancelled"]);
const STATUSES = new Set([...ENDED, ...CLOSED, "Pending", "Processing", "Deferred"]);

const UNREACHABLE = "The service cannot be reached. Check that it is running, then try again.";
const STRANGE = "The service answered in a way that this page does not understand. Try again shortly.";

const LABELS = new Map(Object.entries({
  ip: "IP address", isp: "ISP", org: "Organisation", as: "Autonomous system", lat: "Latitude", lon: "Longitude",
  zip: "Postal code", region: "Region code", regionName: "Region", timezone: "Time zone",
  averageRoundtripMs: "Average round trip", minRoundtripMs: "Fastest round trip", maxRoundtripMs: "Slowest round trip",
  roundtripTimeMs: "Round trip", ttl: "TTL", results: "Echoes", packetLoss: "Packet loss",
  startAddress: "First address", endAddress: "Last address", cidr: "CIDR", ipVersion: "IP version",
  ldhName: "Name", unicodeName: "Name in Unicode", secureDNS: "DNSSEC signed", nameservers: "Name servers",
  registrarIanaId: "Registrar's IANA id", hostName: "Host name", queriedAtUtc: "Asked at (UTC)", raw: "Raw document",
}));

const byId = (id) => document.getElementById(id);
const form = byId("ask");
const descriptions = new Map();
const cards = new Map();
let following = new AbortController();

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// ---- Asking -------------------------------------------------------------------------------------------------------

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  clearErrors();
  const services = chosenServices();
  if (services !== null && services.length === 0) return showError("services", "Choose at least one service.");
  byId("submit").disabled = true;
  try {
    await submit(byId("target").value, services);
  } finally {
    byId("submit").disabled = false;
  }
});

async function submit(target, services) {
  const { status, body } = await ask("api/lookup", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "application/json" },
    body: JSON.stringify({ target, services }),
  });
  if (status === 202 && JOB_ID.test(`#job=${body?.jobId}`)) {
    location.hash = `#job=${body.jobId}`;
  } else if (status === 400) {
    showError("target", messageOf(body));
    byId("target").focus();
  } else {
    showError("form", status === null ? UNREACHABLE : messageOf(body));
  }
}

/** One exchange: status null = nobody answered; body null = it was not JSON. */
async function ask(path, options = {}) {
  const signal = AbortSignal.any([options.signal ?? new AbortController().signal, AbortSignal.timeout(ANSWER_WAIT_MS)]);
  try {
    const response = await fetch(path, { ...options, signal });
    const body = response.status === 304 ? null : await response.json().catch(() => null);
    return { status: response.status, headers: response.headers, body };
  } catch {
    return { status: null, headers: new Headers(), body: null };
  }
}

function messageOf(problem) {
  return typeof problem?.error === "string" && problem.error ? problem.error : STRANGE;
}

function showError(field, message) {
  byId(`${field}-error`).textContent = message;
  if (field === "target") byId("target").setAttribute("aria-invalid", "true");
}

function clearErrors() {
  for (const field of ["target", "services", "form"]) byId(`${field}-error`).textContent = "";
  byId("target").removeAttribute("aria-invalid");
}

async function listServices() {
  const { status, body } = await ask("api/lookup/services");
  const services = status === 200 && Array.isArray(body) ? body : (body?.services ?? []);
  if (status !== 200 || services.length === 0) {
    byId("choices").append(element("p", "quiet", "The list of services is not available right now; all of them will be asked."));
    return;
  }
  for (const { name, description } of services.slice(0, ROWS_MAX)) {
    descriptions.set(name, description);
    byId("choices").append(serviceChoice(String(name), String(description)));
  }
}

function serviceChoice(name, description) {
  const box = element("input");
  Object.assign(box, { type: "checkbox", name: "service", value: name, checked: true });
  return element("label", "choice", box, element("span", "", element("b", "", name), element("small", "", description)));
}

/** The ticked names; null (= all) when the list of services could not be read. */
function chosenServices() {
  const boxes = [...form.querySelectorAll("input[name=service]")];
  return boxes.length === 0 ? null : boxes.filter((box) => box.checked).map((box) => box.value);
}

// ---- Following ----------------------------------------------------------------------------------------------------

function followFragment() {
  following.abort();
  following = new AbortController();
  const jobId = JOB_ID.exec(location.hash)?.[1];
  byId("job").hidden = true;
  notice("");
  if (jobId) follow(jobId, following.signal);
}

/** Polls with If-None-Match: soon at first and after each piece of news, then ever more slowly, and not for ever. */
async function follow(jobId, signal) {
  const until = performance.now() + FOLLOW_MAX_MS;
  let etag = null;
  let waitMs = POLL_MIN_MS;
  while (!signal.aborted && performance.now() < until) {
    const headers = { Accept: "application/json", ...(etag && { "If-None-Match": etag }) };
    const answer = await ask(`api/lookup/${jobId}`, { headers, signal });
    if (signal.aborted) return;
    if (answer.status === 200 && Array.isArray(answer.body?.results)) {
      etag = answer.headers.get("ETag");
      waitMs = POLL_MIN_MS;
      notice("");
      showJob(jobId, answer.body);
      if (CLOSED.has(answer.body.status)) return;
    } else if (answer.status === 404) {
      return notice("There is no such job. It may have expired.");
    } else if (answer.status !== 304) {
      notice(`${whyNoAnswer(answer)} Still trying.`);
      waitMs = Math.max(waitMs, retryAfterMs(answer.headers));
    }
    await pause(waitMs, signal);
    waitMs = Math.min(waitMs * POLL_GROWTH, POLL_MAX_MS);
  }
  if (!signal.aborted) notice("The job has not ended yet.", { again: true });
}

function whyNoAnswer({ status, body }) {
  if (status === null) return "The service cannot be reached.";
  return status === 503 && typeof body?.error === "string" ? body.error : "The service gave no usable answer.";
}

function retryAfterMs(headers) {
  const seconds = Number(headers.get("Retry-After"));
  return Number.isFinite(seconds) ? Math.min(Math.max(seconds, 0) * 1_000, POLL_MAX_MS) : 0;
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

function notice(text, { again = false } = {}) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
  byId("again-line").hidden = !again;
}

// ---- Showing a job ------------------------------------------------------------------------------------------------

function showJob(jobId, job) {
  const isNew = byId("job-id").textContent !== jobId || byId("job").hidden;
  if (isNew) showNewJob(jobId, job);
  const results = job.results.slice(0, ROWS_MAX);
  showStatus(byId("job-status"), job.status);
  byId("job-progress").value = Number(job.completionPercentage) || 0;
  byId("job-progress").textContent = `${Number(job.completionPercentage) || 0} %`;
  setText(byId("job-facts"), factsOf(job));
  setText(byId("job-summary"), summaryOf(job, results));
  showWarnings(Array.isArray(job.warnings) ? job.warnings.slice(0, ROWS_MAX) : []);
  for (const result of results) showCard(result);
  showHistory();
}

function showNewJob(jobId, job) {
  cards.clear();
  byId("job-history").open = false;
  byId("cards").replaceChildren();
  byId("job-target").textContent = textOf(job.target);
  byId("job-id").textContent = jobId;
  byId("job-json").href = `api/lookup/${jobId}`;
  byId("job").hidden = false;
  document.title = `${textOf(job.target)} – Distributed Lookup`;
  if (!byId("target").value) byId("target").value = textOf(job.target);
}

/** Asked for only while it is unfolded, and again with each piece of news. */
async function showHistory() {
  const jobId = byId("job-id").textContent;
  if (!byId("job-history").open) return;
  const { status, body } = await ask(`api/lookup/${jobId}/history?limit=${FACTS_MAX}`, { signal: following.signal });
  if (byId("job-id").textContent !== jobId || following.signal.aborted) return;
  if (status === 200 && Array.isArray(body?.facts)) {
    byId("history").replaceChildren(...body.facts.slice(0, FACTS_MAX).map(factLine));
    setText(byId("history-note"), body.next ? "There is more." : "");
  } else {
    setText(byId("history-note"), status === null ? UNREACHABLE : messageOf(body));
  }
}

function factLine({ recordedAt, sentence }) {
  return element("li", "", element("time", "", instantOf(recordedAt, { timeStyle: "medium" })), element("span", "", textOf(sentence)));
}

function factsOf(job) {
  const kind = { IPAddress: "IP address", Domain: "Domain" }[job.targetType] ?? "";
  const took = Date.parse(job.completedAt) - Date.parse(job.createdAt);
  return [kind, `asked ${instantOf(job.createdAt)}`, Number.isFinite(took) ? `took ${durationOf(took)}` : ""]
    .filter(Boolean).join(" · ");
}

function summaryOf(job, results) {
  const count = (status) => results.filter((result) => result.status === status).length;
  const ended = results.filter((result) => ENDED.has(result.status)).length;
  if (!CLOSED.has(job.status)) return `${ended} of ${results.length} services have ended.`;
  const parts = [...ENDED].filter(count).map((status) => `${count(status)} ${words(status).toLowerCase()}`);
  return `${sentenceOf(job.status)} ${parts.join(", ")}.`;
}

function sentenceOf(status) {
  return { Completed: "Completed:", Failed: "No service had an answer:", Cancelled: "The job was cancelled:" }[status];
}

function showWarnings(warnings) {
  byId("job-warnings").hidden = warnings.length === 0;
  byId("job-warnings").replaceChildren(...warnings.map((warning) => element("li", "", textOf(warning))));
}

function showStatus(badge, status) {
  badge.dataset.status = STATUSES.has(status) ? status : "";
  setText(badge, words(textOf(status)));
}

/** Redrawn only when its result changed, so that what a reader unfolded stays open and focus stays where it is. */
function showCard(result) {
  const name = textOf(result.serviceType);
  const now = JSON.stringify(result);
  const card = cards.get(name) ?? newCard(name);
  if (card.shown === now) return;
  card.shown = now;
  showStatus(card.badge, result.status);
  setText(card.meta, metaOf(result));
  card.body.replaceChildren(...bodyOf(result));
}

function newCard(name) {
  const heading = element("h3", "", name);
  heading.id = `card-${cards.size}`;
  const badge = element("span", "status");
  const meta = element("p", "facts");
  const body = element("div", "body");
  const root = element("article", "card", element("header", "", heading, badge), meta, body);
  root.setAttribute("aria-labelledby", heading.id);
  byId("cards").append(root);
  const card = { badge, meta, body, shown: null };
  cards.set(name, card);
  return card;
}

function metaOf({ durationMs, attempt, completedAt, status }) {
  return [
    typeof durationMs === "number" ? durationOf(durationMs) : "",
    attempt && status !== "Skipped" ? `attempt ${attempt}` : "",
    completedAt ? `ended ${instantOf(completedAt, { timeStyle: "medium" })}` : "",
  ].filter(Boolean).join(" · ");
}

function bodyOf(result) {
  if (result.errorMessage) return [element("p", "message", textOf(result.errorMessage))];
  const data = parsedData(result.data);
  if (isObject(data)) return describe(data, 0);
  if (data !== null) return [element("p", "message", textOf(data))];
  if (result.status === "Succeeded") return [element("p", "quiet", "The answer is not at hand.")];
  return ENDED.has(result.status) ? [] : [element("p", "quiet", waitingFor(result))];
}

function waitingFor({ serviceType, status }) {
  if (status === "Deferred") return "May not ask right now; it will be asked again by itself.";
  return `${descriptions.get(serviceType) ?? "Waiting for the answer"} …`;
}

/** A service set to the older answers sends its data as JSON text. */
function parsedData(data) {
  if (typeof data !== "string") return data ?? null;
  try {
    return JSON.parse(data);
  } catch {
    return data;
  }
}

// ---- Showing data -------------------------------------------------------------------------------------------------

/** An object as a definition list of its plain values, followed by its parts and tables, and its raw document last. */
function describe(object, depth) {
  const list = element("dl");
  const parts = [];
  const foldedParts = [];
  const empty = [];
  for (const [key, value] of Object.entries(object).slice(0, ROWS_MAX)) {
    if (value === null || (Array.isArray(value) && value.length === 0)) empty.push(midSentence(labelOf(key)));
    else if (key === "raw") foldedParts.push(folded(key, value));
    else if (isObject(value) || (Array.isArray(value) && value.some(isObject))) parts.push(part(key, value, depth + 1));
    else list.append(element("div", "", element("dt", "", labelOf(key)), element("dd", "", plain(key, value))));
  }
  if (list.childElementCount) parts.unshift(list);
  if (empty.length) parts.push(element("p", "quiet", `No value: ${empty.join(", ")}.`));
  return [...parts, ...foldedParts];
}

function part(key, value, depth) {
  if (depth > DEPTH_MAX) return folded(key, value);
  const shown = isObject(value) ? describe(value, depth) : [tableOf(value)];
  return element("section", "part", element("h4", "", labelOf(key)), ...shown);
}

function tableOf(rows) {
  const kept = rows.slice(0, ROWS_MAX).map((row) => (isObject(row) ? row : { value: row }));
  const columns = [...new Set(kept.flatMap(Object.keys))].slice(0, 12);
  const head = element("tr", "", ...columns.map((key) => Object.assign(element("th", "", labelOf(key)), { scope: "col" })));
  const lines = kept.map((row) => element("tr", "", ...columns.map((key) => element("td", "", plain(key, row[key])))));
  const table = element("table", "", element("thead", "", head), element("tbody", "", ...lines));
  const more = rows.length > kept.length ? [element("p", "quiet", `and ${rows.length - kept.length} more`)] : [];
  return element("div", "scroll", table, ...more);
}

/** Written out only when it is opened: a registry's document may be long. */
function folded(key, value) {
  const text = element("pre");
  text.tabIndex = 0;
  const details = element("details", "", element("summary", "", labelOf(key)), text);
  details.addEventListener("toggle", () => { text.textContent ||= cut(JSON.stringify(value, null, 2), RAW_MAX); });
  return details;
}

function plain(key, value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return `${value}${key.endsWith("Ms") ? " ms" : ""}${key === "packetLoss" ? " %" : ""}`;
  if (Array.isArray(value)) {
    const more = value.length > ROWS_MAX ? ` and ${value.length - ROWS_MAX} more` : "";
    return value.slice(0, ROWS_MAX).map(textOf).join(", ") + more;
  }
  return textOf(value);
}

function textOf(value) {
  return cut(typeof value === "string" ? value : (JSON.stringify(value) ?? ""), TEXT_MAX);
}

function cut(text, max) {
  return text.length > max ? `${text.slice(0, max)} …` : text;
}

function labelOf(key) {
  return LABELS.get(key) ?? words(key);
}

/** "packetsSent" and "TimedOut" as words: "Packets sent", "Timed out". */
function words(name) {
  const spaced = cut(name, 80).replace(/([a-z0-9])([A-Z])/g, (_, before, after) => `${before} ${after.toLowerCase()}`);
  return spaced.charAt(0).toUpperCase() + spaced.slice(1);
}

/** "Postal code" as "postal code", and "ISP" as it is. */
function midSentence(label) {
  return /^[A-Z][a-z]/.test(label) ? label.charAt(0).toLowerCase() + label.slice(1) : label;
}

function durationOf(ms) {
  return ms < 1_000 ? `${Math.round(ms)} ms` : `${(ms / 1_000).toFixed(1)} s`;
}

function instantOf(text, style = { dateStyle: "medium", timeStyle: "medium" }) {
  const at = new Date(text);
  return Number.isNaN(at.getTime()) ? textOf(text) : at.toLocaleString(undefined, style);
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Touches the page only when the text is news, so that a screen reader is not told the same thing twice. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

window.addEventListener("hashchange", followFragment);
byId("again").addEventListener("click", followFragment);
byId("job-history").addEventListener("toggle", () => { byId("history").replaceChildren(); showHistory(); });
byId("target").addEventListener("input", clearErrors);
listServices();
followFragment();
