// The panel of settings: what of it goes into a request, and what is wrong with it.
import { byId, el, keep, kept, showText } from "./dom.js";

const NUMBERS = [
  "temperature", "max_tokens", "top_p", "top_k", "min_p", "seed",
  "frequency_penalty", "presence_penalty", "repetition_penalty",
];
const USUAL = { temperature: 1, top_p: 1, top_k: "all", min_p: 0, repetition_penalty: 1 };
const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, year: { type: "integer" } },
  required: ["name", "year"],
  additionalProperties: false,
};
const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city now",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

/** A setting that can't be sent; the message names it. */
export class SettingsError extends Error {}

export class Settings {
  constructor() {
    this.form = byId("settings");
    this.fields = this.form.elements;
    this.restore(kept("settings", {}));
    this.form.addEventListener("input", () => this.changed());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    byId("reset").addEventListener("click", () => {
      this.form.reset();
      this.changed();
    });
    byId("sample-tool").addEventListener("click", () => {
      this.fields.tools.value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
      this.changed();
    });
    if (matchMedia("(max-width: 60rem)").matches) byId("settings-fold").open = false;
  }

  restore(values) {
    for (const field of this.fields) {
      if (!(field.name in values)) continue;
      if (field.type === "checkbox") field.checked = values[field.name];
      else field.value = values[field.name];
    }
    this.show();
  }

  changed() {
    const named = [...this.fields].filter((field) => field.name);
    keep("settings", Object.fromEntries(named.map((f) => [f.name, f.type === "checkbox" ? f.checked : f.value])));
    this.complain("");
    this.show();
  }

  show() {
    const wantsSchema = this.fields.format.value === "json_schema";
    byId("schema-field").hidden = !wantsSchema;
    if (wantsSchema && !this.fields.schema.value) this.fields.schema.value = JSON.stringify(EXAMPLE_SCHEMA, null, 2);
  }

  /** What the server says of itself: its defaults, and what its model can do. */
  learn(info) {
    for (const [name, usual] of Object.entries(USUAL)) {
      this.fields[name].placeholder = info.default_sampling_params?.[name] ?? usual;
    }
    this.fields.max_tokens.placeholder = "no limit";
    byId("effort-field").hidden = !info.reasoning;
    if (info.can_chat === false) byId("system-field").hidden = true;
    if (info.tool_calls === null) {
      byId("tools-hint").textContent =
        "How this model writes calls is not known, so the server refuses tools; octavo serve --tool-call-parser names it.";
    }
  }

  /** The system prompt as a conversation begins with it: one message, or none. */
  get systemMessages() {
    const content = this.fields.system.value.trim();
    return content ? [{ role: "system", content }] : [];
  }

  complain(message) {
    showText(byId("settings-error"), message);
    if (message) byId("settings-fold").open = true;
  }

  /** The fields of a request, without messages and model. Raises SettingsError, and shows what it says. */
  body({ isChat = true } = {}) {
    try {
      return this.made(isChat);
    } catch (error) {
      if (error instanceof SettingsError) this.complain(error.message);
      throw error;
    }
  }

  made(isChat) {
    const body = {};
    for (const name of NUMBERS) {
      const field = this.fields[name];
      if (!field.validity.valid) throw new SettingsError(`${labelOf(field)}: ${field.validationMessage}`);
      if (field.value !== "") body[name] = Number(field.value);
    }
    const stops = this.fields.stop.value.split("\n").filter((line) => line !== "");
    if (stops.length) body.stop = stops;
    if (this.fields.logprobs.checked) Object.assign(body, isChat ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 });
    const format = this.fields.format.value;
    if (format === "json_object") body.response_format = { type: format };
    if (format === "json_schema") {
      const schema = parsed(this.fields.schema, "object");
      body.response_format = { type: format, json_schema: { name: "answer", schema, strict: true } };
    }
    return isChat ? { ...body, ...this.conversing() } : body;
  }

  conversing() {
    const body = {};
    const effort = this.fields.reasoning_effort.value;
    if (effort && !byId("effort-field").hidden) body.reasoning_effort = effort;
    if (this.fields.tools.value.trim()) {
      const tools = parsed(this.fields.tools, "array");
      if (tools.length) body.tools = tools.map((tool) => (tool.type ? tool : { type: "function", function: tool }));
      if (tools.length && this.fields.tool_choice.value) body.tool_choice = this.fields.tool_choice.value;
    }
    return body;
  }
}

function labelOf(field) {
  return field.closest("label").firstChild.textContent.trim();
}

function parsed(field, kind) {
  let value;
  try {
    value = JSON.parse(field.value);
  } catch (error) {
    throw new SettingsError(`${labelOf(field)}: ${error.message}`);
  }
  const is = Array.isArray(value) ? "array" : typeof value;
  if (is !== kind || value === null) throw new SettingsError(`${labelOf(field)}: a JSON ${kind} belongs here`);
  return value;
}

/** Fill a select with the names of models, and keep its choice where it is still there. */
export function offerModels(select, names) {
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}
