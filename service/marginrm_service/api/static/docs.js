"use strict";
// The page at "/docs": renders /openapi.json, with examples that can be sent from here.

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function resolve(document_, schema) {
  if (!schema) return {};
  if (!schema.$ref) return schema;
  return schema.$ref.split("/").slice(1).reduce((node, key) => node[key], document_);
}

function typeOf(document_, schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map((one) => typeOf(document_, one)).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(document_, schema.items || {})}`;
  return schema.type || "any";
}

function fields(document_, schema, seen = new Set()) {
  const resolved = resolve(document_, schema);
  const box = element("div");
  if (!resolved.properties) return box;
  const body = element("tbody");
  const inner = [];
  for (const [name, field] of Object.entries(resolved.properties)) {
    const required = (resolved.required || []).includes(name);
    const fallback = field.default === undefined ? "" : `, default ${JSON.stringify(field.default)}`;
    const type = typeOf(document_, field);
    body.append(
      element(
        "tr",
        {},
        element("td", {}, element("code", { textContent: name })),
        element("td", { textContent: `${type}${required ? ", required" : fallback}` }),
        element("td", { textContent: field.description || "" }),
      ),
    );
    for (const match of JSON.stringify(field).matchAll(/"#\/components\/schemas\/(\w+)"/g)) {
      if (!seen.has(match[1])) {
        seen.add(match[1]);
        inner.push(match[1]);
      }
    }
  }
  box.append(element("table", {}, body));
  for (const name of inner) {
    box.append(element("h3", { textContent: name }));
    box.append(fields(document_, { $ref: `#/components/schemas/${name}` }, seen));
  }
  return box;
}

function trial(path, method, example) {
  const input = element("textarea", { rows: 12, value: JSON.stringify(example, null, 2), ariaLabel: "Request body" });
  const button = element("button", { type: "button", textContent: "Send" });
  const output = element("pre", { hidden: true });
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const headers = { "Content-Type": "application/json" };
      const response = await fetch(path, { method, headers, body: input.value });
      output.textContent = `${response.status}\n${JSON.stringify(await response.json(), null, 2)}`;
    } catch (error) {
      output.textContent = error.message;
    }
    output.hidden = false;
    button.disabled = false;
  });
  return element("div", {}, input, button, output);
}

function details(summary, ...children) {
  return element("details", {}, element("summary", { textContent: summary }), ...children);
}

function route(document_, path, method, operation) {
  const section = element(
    "section",
    {},
    element(
      "h2",
      {},
      element("span", { className: "method", textContent: method.toUpperCase() }),
      element("code", { textContent: path }),
    ),
    element("p", { textContent: operation.description || operation.summary || "" }),
  );
  const request = operation.requestBody?.content["application/json"]?.schema;
  if (request) {
    const example = resolve(document_, request).examples?.[0];
    if (example) {
      const curl = `curl ${location.origin}${path} -H 'Content-Type: application/json' -d '${JSON.stringify(example)}'`;
      section.append(element("pre", { textContent: curl }), details("Try it here", trial(path, method.toUpperCase(), example)));
    }
    section.append(details("Request fields", fields(document_, request)));
  }
  const answer = operation.responses?.["200"]?.content?.["application/json"]?.schema;
  if (answer && resolve(document_, answer).properties) {
    const example = resolve(document_, answer).examples?.[0];
    if (example) section.append(details("An answer", element("pre", { textContent: JSON.stringify(example, null, 2) })));
    section.append(details("Answer fields", fields(document_, answer)));
  }
  const errors = Object.entries(operation.responses || {}).filter(([status, one]) => status >= "400" && one.description);
  if (errors.length) {
    const lines = errors.map(([status, one]) => element("tr", {}, element("td", { textContent: status }), element("td", { textContent: one.description })));
    section.append(details("Errors", element("table", {}, element("tbody", {}, ...lines))));
  }
  return section;
}

async function render() {
  const main = document.getElementById("routes");
  try {
    const document_ = await (await fetch("/openapi.json")).json();
    const sections = Object.entries(document_.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => route(document_, path, method, operation)),
    );
    main.replaceChildren(element("p", { textContent: document_.info.description }), ...sections);
  } catch (error) {
    main.textContent = `The description could not be loaded: ${error.message}`;
  }
}

render();
