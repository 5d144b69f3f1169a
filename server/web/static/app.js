// The page: its views, its key, its colors, and what the server says of itself.
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { Dashboard } from "./dashboard.js";
import { announce, byId, keep, notice, showText } from "./dom.js";
import { ReportView } from "./report.js";
import { own, setKey } from "./server.js";
import { offerModels, Settings, SettingsError } from "./settings.js";

const TITLES = { chat: "Chat", compare: "Compare", dashboard: "Dashboard", report: "Quantization report" };
const AGAIN = 2000; // milliseconds
const comparing = new URLSearchParams(location.search).has("compare"); // the policy of this URL lets it ask others

const settings = new Settings();
const chat = new Chat(settings, () => byId("model").value, failed);
const dashboard = new Dashboard(failed);
const report = new ReportView(failed);
const compare = comparing ? new Compare(settings, failed) : null;

/** Say what went wrong, or with null that all is well again; ask for a key where that is why. */
function failed(error) {
  if (error === null) notice("");
  else if (error.status === 401) askForKey();
  else if (!(error instanceof SettingsError)) notice(error.message);
}

/** Under the policy of comparing there is nothing else, and elsewhere no comparing. */
function viewNow() {
  const named = location.hash.slice(1);
  if (comparing) return "compare";
  return Object.hasOwn(TITLES, named) && named !== "compare" ? named : "chat";
}

function show() {
  const view = viewNow();
  for (const section of document.querySelectorAll("section[data-view]")) section.hidden = section.dataset.view !== view;
  byId("workbench").hidden = !["chat", "compare"].includes(view);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[view]} · octavo`;
  document.body.dataset.view = view;
  notice("");
  dashboard.run(view === "dashboard");
  if (view === "report") report.show();
  if (view === "chat") chat.follow(true);
}

/** Ask the server what it is, until it says so: it may be starting again. */
async function learn(isAgain = false) {
  try {
    offerModels(byId("model"), await own.modelNames());
    const info = await own.json("server_info");
    byId("welcome-model").textContent = byId("model").value;
    settings.learn(info);
    chat.learn(info);
    if (isAgain) failed(null);
    await compare?.connect();
  } catch (error) {
    failed(error);
    if (error.status === 0 || error.status >= 500) setTimeout(learn, AGAIN, true);
  }
}

function askForKey(message = "") {
  const dialog = byId("key-dialog");
  if (dialog.open && !message) return; // somebody types into it already
  showText(byId("key-error"), message);
  if (!dialog.open) dialog.showModal();
  byId("key").focus();
}

byId("key-button").addEventListener("click", () => askForKey());
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-forget").addEventListener("click", () => {
  setKey("");
  byId("key").value = "";
  byId("key-dialog").close();
  announce("The key is forgotten");
});
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  try {
    await own.modelNames();
  } catch (error) {
    askForKey(error.status === 401 ? "The server does not take this key." : error.message);
    return;
  }
  byId("key").value = "";
  byId("key-dialog").close();
  await learn();
  show();
});

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const tellTheme = () => byId("theme").setAttribute("aria-pressed", String(isDark()));
byId("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  keep("theme", theme, "localStorage");
  tellTheme();
  dashboard.recolor();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  tellTheme();
  dashboard.recolor();
});

byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
byId("model").addEventListener("change", () => {
  byId("welcome-model").textContent = byId("model").value;
});
addEventListener("hashchange", show);
tellTheme();
show();
learn();
