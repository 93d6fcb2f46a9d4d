// The page at "/docs": renders /openapi.json, with requests that can be sent from here.
import { byId, element, prose } from "./dom.js";
import { addThemeButton, call, send } from "./server.js";

/** @param {any} api @param {any} schema @returns {any} The schema that a reference names. */
function resolve(api, schema) {
  if (!schema) return {};
  if (!schema.$ref) return schema;
  return schema.$ref.split("/").slice(1).reduce((node, key) => node[key], api);
}

/** @returns {string} A schema's type in words. */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any";
}

/** @returns {string} The range of a number or a list, if it has one. */
function rangeOf(schema) {
  const bounds = [["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"], ["minItems", "at least"]];
  return bounds.flatMap(([name, sign]) => (schema[name] === undefined ? [] : [`${sign} ${schema[name]}`])).join(", ");
}

function fieldRow(name, field, required) {
  const inner = [field, ...(field.anyOf ?? [])].map(rangeOf).filter(Boolean)[0];
  const fallback = field.default === undefined ? "" : `default ${JSON.stringify(field.default)}`;
  const type = [typeOf(field), required ? "required" : fallback, inner].filter(Boolean).join(", ");
  return element(
    "tr",
    {},
    element("th", { scope: "row", className: "name" }, element("code", { textContent: name })),
    element("td", { textContent: type }),
    element("td", {}, ...prose(field.description ?? "")),
  );
}

/** A table of a schema's fields, and of the schemas that they refer to. */
function fields(api, schema, seen = new Set()) {
  const resolved = resolve(api, schema);
  const box = element("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": `Fields of ${resolved.title ?? "the body"}` });
  if (!resolved.properties) return box;
  const entries = Object.entries(resolved.properties);
  const rows = entries.map(([name, field]) => fieldRow(name, field, (resolved.required ?? []).includes(name)));
  box.append(element("table", {}, element("tbody", {}, ...rows)));
  for (const [, name] of JSON.stringify(entries).matchAll(/"#\/components\/schemas\/([\w-]+)"/g)) {
    if (seen.has(name)) continue;
    seen.add(name);
    box.append(element("h3", { textContent: name }), fields(api, { $ref: `#/components/schemas/${name}` }, seen));
  }
  return box;
}

/** A body that can be edited and sent. */
function trial(path, method, example) {
  const input = element("textarea", { rows: 12, value: JSON.stringify(example, null, 2), "aria-label": `Body of ${method} ${path}`, spellcheck: false });
  const button = element("button", { type: "button", className: "primary", textContent: "Send" });
  const output = element("pre", { hidden: true, tabIndex: 0, role: "status" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    const { status, text } = await send(path, method, input.value);
    output.textContent = `${status}\n${text}`;
    output.hidden = false;
    button.disabled = false;
  });
  return element("div", {}, input, element("div", { className: "row" }, button), output);
}

function details(summary, ...children) {
  return element("details", {}, element("summary", { textContent: summary }), ...children);
}

function json(value) {
  return element("pre", { tabIndex: 0, textContent: JSON.stringify(value, null, 2) });
}

function requestParts(api, path, method, content) {
  const example = content.example ?? resolve(api, content.schema).examples?.[0];
  const parts = [];
  if (example) {
    const body = JSON.stringify(example).replaceAll("'", "'\\''");
    const curl = `curl ${location.origin}${path} -H 'Content-Type: application/json' -d '${body}'`;
    parts.push(element("pre", { tabIndex: 0, textContent: curl }), details("Try it here", trial(path, method, example)));
  }
  return [...parts, details("Request fields", fields(api, content.schema))];
}

function route(api, path, method, operation) {
  const section = element(
    "section",
    { className: "box" },
    element("h2", {}, element("span", { className: "method", textContent: method }), element("code", { textContent: path })),
    ...(operation.description ?? operation.summary ?? "").split(/\n\s*\n/).map((text) => element("p", {}, ...prose(text))),
  );
  const content = operation.requestBody?.content["application/json"];
  if (content) section.append(...requestParts(api, path, method, content));
  else if (method === "GET" && !path.includes("{")) section.append(element("pre", { tabIndex: 0, textContent: `curl ${location.origin}${path}` }));
  const reply = operation.responses?.["200"]?.content?.["application/json"]?.schema;
  if (reply && resolve(api, reply).properties) {
    const example = resolve(api, reply).examples?.[0];
    if (example) section.append(details("A reply", json(example)));
    section.append(details("Reply fields", fields(api, reply)));
  }
  const errors = Object.entries(operation.responses ?? {}).filter(([status, one]) => status >= "400" && one.description);
  if (errors.length) {
    const lines = errors.map(([status, one]) => element("tr", {}, element("th", { scope: "row", textContent: status }), element("td", {}, ...prose(one.description))));
    section.append(details("Errors", element("table", {}, element("tbody", {}, ...lines))));
  }
  return section;
}

async function render() {
  addThemeButton();
  const main = byId("routes");
  try {
    const api = await call("/openapi.json");
    const sections = Object.entries(api.paths).flatMap(([path, operations]) =>
      Object.entries(operations).map(([method, operation]) => route(api, path, method.toUpperCase(), operation)),
    );
    main.replaceChildren(element("p", {}, ...prose(api.info.description)), ...sections);
  } catch (error) {
    main.replaceChildren(element("p", { className: "alarm", role: "alert", textContent: `The description could not be loaded: ${error.message}` }));
  }
}

render();
