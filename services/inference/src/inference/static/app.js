// The page: it talks to the same routes as every other client, and shows text from the server as text only.
const $ = id => document.getElementById(id);
const ENDED = ["succeeded", "failed", "cancelled"];

function el(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

async function call(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? `${path} answered ${response.status}`);
  return body;
}

// A button that does one thing; what goes wrong is said at the window's lower edge.
const button = (textContent, act) => el("button", {type: "button", textContent, onclick: async event => {
  event.target.disabled = true;
  event.target.blur();
  $("trouble").textContent = "";
  await act().catch(error => { $("trouble").textContent = error.message; });
  event.target.disabled = false;
  refresh();
}});

const post = (path, value) => call(path, {method: "POST", body: JSON.stringify(value), headers: {"Content-Type": "application/json"}});

// A new model

function upload(file) {  // fetch tells no progress of what it sends
  const id = "u-" + [...crypto.getRandomValues(new Uint8Array(8))].map(b => b.toString(16).padStart(2, "0")).join("");
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", `/v1/uploads/${id}?filename=${encodeURIComponent(file.name)}`);
    request.upload.onprogress = e => { $("sent").value = e.loaded / e.total; };
    request.onerror = () => reject(new Error("the upload broke off: send it again"));
    request.onload = () => {
      const body = JSON.parse(request.responseText);
      request.status < 300 ? resolve(body) : reject(new Error(body.error.message));
    };
    request.send(file);
  });
}

$("pipeline").addEventListener("submit", async event => {
  event.preventDefault();
  const form = event.target, {source, file, dataset, recipe, epochs, name} = form.elements, start = form.querySelector("button");
  start.disabled = true;
  $("said").className = "";
  try {
    const body = {source: "cifar10", train: {recipe: recipe.value}};
    if (source.value === "upload") {
      if (!file.files.length) throw new Error("choose an archive first: a zip or tar with one folder a class");
      $("sent").hidden = false;
      $("said").textContent = `sending ${file.files[0].name}`;
      body.source = `upload:${(await upload(file.files[0])).id}`;
    }
    if (source.value === "dataset") {
      if (!dataset.value) throw new Error("there is no dataset yet: send an archive, or take CIFAR-10");
      body.source = `dataset:${dataset.value}`;
    }
    if (epochs.value) body.train.epochs = Number(epochs.value);
    if (name.value) body.name = name.value;
    const accepted = await post("/v1/pipelines", body);
    $("said").textContent = `${accepted.pipeline} is accepted: ${accepted.name}`;
  } catch (error) {
    $("said").className = "bad";
    $("said").textContent = error.message;
  }
  $("sent").hidden = true;
  start.disabled = false;
  refresh();
});
for (const [name, source] of [["file", "upload"], ["dataset", "dataset"]])
  $("pipeline").elements[name].addEventListener("change", () => { $("pipeline").elements.source.value = source; });

// Jobs

const seconds = s => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
const number = v => typeof v === "number" ? String(Number(v.toPrecision(4))) : v;

function jobItem(job) {
  const p = ["running", "queued", "waiting"].includes(job.state) ? job.progress : null, over = ENDED.includes(job.state);
  const metrics = Object.entries(p?.metrics ?? {}).map(([k, v]) => `${k} ${number(v)}`).join(", ");
  const says = job.error?.message ?? [p?.stage, p?.percent != null ? `${p.percent} %` : "", p?.eta_s != null ? `${seconds(p.eta_s)} left` : "",
    metrics].filter(Boolean).join(" · ");
  const bar = el("progress", {max: 100, ariaLabel: `${job.kind} of ${job.job.name}`});
  if (job.state !== "running") bar.value = job.state === "succeeded" ? 100 : 0;
  else if (p?.percent != null) bar.value = p.percent;
  const cancel = button(job.cancel_asked ? "cancelling" : "cancel", () => call(`/v1/jobs/${job.id}/cancel`, {method: "POST"}));
  cancel.disabled = job.cancel_asked;
  const again = button("try again", () => call(`/v1/jobs/${job.id}/retry`, {method: "POST"}));
  return el("li", {}, el("div", {className: "row"}, el("b", {textContent: job.kind}), el("span", {textContent: job.job.name}),
    el("span", {textContent: job.state, className: job.state === "failed" ? "bad" : "soft"}),
    el("small", {textContent: says, className: job.error ? "bad" : ""}), ...table(job),
    ...(job.attempts.length ? [el("a", {href: `/v1/jobs/${job.id}/log`, textContent: "log"})] : []),
    ...(over ? [el("small", {textContent: job.id}), ...(job.state === "succeeded" ? [] : [again])] : [cancel])), bar);
}

function table(job) {
  if (job.kind !== "predict" || job.state !== "succeeded") return [];
  const right = job.result.accuracy == null ? "" : `, ${number(100 * job.result.accuracy)} % as labelled`;
  return [el("small", {textContent: `${job.result.images} images${right}`}),
    el("a", {href: `/v1/predictions/${job.job.predictions_id}/predictions.parquet`, textContent: "table"})];
}

// Models

function modelItem(model, shadow) {
  const rows = Object.entries(model.aliases).map(([alias, to]) => el("div", {className: "row"},
    el("span", {textContent: `${alias} → version ${to.version}, ${to.variant}`}),
    el("small", {textContent: to.manifest_sha256.slice(0, 12)}),
    el("a", {href: `/v1/cards/${to.model}.html`, textContent: "release card"}),
    el("a", {href: `/v1/models/${encodeURIComponent(model.name)}/versions/${to.version}/variants/${to.variant}.zip`, textContent: "download"}),
    ...(to.previous ? [button(`back to version ${to.previous.version}, ${to.previous.variant}`,
      () => call(`/v1/models/${encodeURIComponent(model.name)}/aliases/${alias}/rollback`, {method: "POST"}))] : [])));
  return el("li", {}, el("b", {textContent: model.name}), ` ${Object.keys(model.versions).length} version(s)`, ...rows, ...(shadow ? [shadowItem(shadow)] : []));
}

const percent = share => `${(100 * share).toFixed(2)} %`;

function shadowItem(shadow) {
  const {production, candidate} = shadow.run_ms, differ = shadow.confusion.filter(c => c.production !== c.candidate).slice(0, 6);
  const says = shadow.mirrored ? [`candidate disagrees on ${percent(shadow.rate)} (${shadow.interval.map(percent).join(" to ")}) of ${shadow.mirrored} live images`,
    `p50 ${number(candidate.p50)} ms, production ${number(production.p50)} ms`] : shadow.share ? ["no live image was mirrored yet"] : ["SHADOW_SHARE is 0: live images are not mirrored"];
  if (shadow.dropped) says.push(`${shadow.dropped} dropped`);
  if (shadow.failed) says.push(`${shadow.failed} failed`);
  const head = el("tr", {}, ...["production says", "candidate says", "images"].map(textContent => el("th", {textContent, scope: "col"})));
  const rows = differ.map(c => el("tr", {}, el("td", {textContent: c.production}), el("td", {textContent: c.candidate}),
    el("td", {}, el("progress", {max: differ[0].images, value: c.images, ariaLabel: `${c.production} as ${c.candidate}`}), ` ${c.images}`)));
  return el("div", {}, el("small", {textContent: says.join(" · ")}), ...(rows.length ? [el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))] : []));
}

// Trying it

async function predict(file) {
  const name = $("model").value, began = performance.now();
  const image = el("img", {src: URL.createObjectURL(file), alt: file.name});
  $("answer").replaceChildren(image);
  try {
    if (!name) throw new Error("no model is promoted yet: start one");
    const headers = {"Content-Type": file.type || "application/octet-stream"};
    const answer = await call(`/v1/models/${encodeURIComponent(name)}/predict`, {method: "POST", body: file, headers});
    const took = performance.now() - began;
    if ($("every").checked) return await compare(file, name, answer, headers);
    for (const {label, probability} of answer.predictions[0].top)
      $("answer").append(el("div", {}, el("span", {textContent: label, title: label}), el("progress", {max: 1, value: probability, ariaLabel: label}),
        `${(100 * probability).toFixed(1)} %`));
    $("answer").append(el("small", {textContent: `version ${answer.version}, ${answer.variant} on ${answer.device}, ${took.toFixed(0)} ms`}));
  } catch (error) {
    $("answer").append(el("p", {className: "bad", textContent: error.message}));
  }
}

// Every variant of the version that answered, on the same image.
async function compare(file, name, first, headers) {
  const model = `/v1/models/${encodeURIComponent(name)}`, {versions} = await call(model), rows = [];
  const label = first.predictions[0].top[0].label;
  for (const {variant} of versions.find(v => v.version === first.version).variants) {
    const began = performance.now(), place = `version=${first.version}&variant=${variant}&top_k=1`;
    const found = await call(`${model}/predict?${place}`, {method: "POST", body: file, headers}).catch(error => ({error}));
    const top = found.predictions?.[0].top[0];
    const cells = top ? [variant, top.label, `${(100 * top.probability).toFixed(1)} %`, `${(performance.now() - began).toFixed(0)} ms`]
      : [variant, found.error.message, "", ""];
    rows.push(el("tr", {className: top?.label === label ? "" : "bad"}, ...cells.map(textContent => el("td", {textContent}))));
  }
  const head = el("tr", {}, ...["variant", "label", "probability", "took"].map(textContent => el("th", {textContent, scope: "col"})));
  $("answer").append(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

$("image").addEventListener("change", event => event.target.files.length && predict(event.target.files[0]));
for (const type of ["dragenter", "dragover", "dragleave", "drop"])
  $("drop").addEventListener(type, event => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragenter" || type === "dragover");
    if (type === "drop" && event.dataTransfer.files.length) predict(event.dataTransfer.files[0]);
  });

// Datasets

const SHOWN = "train";  // the split of which some images are shown

async function remove(path) {
  const response = await fetch(path, {method: "DELETE"});
  if (!response.ok) throw new Error((await response.json()).error.message);
}

function datasetItem({id, name, summary}) {
  const images = Object.entries(summary.images).map(([split, n]) => `${n} ${split}`), shown = Math.min(8, summary.images[SHOWN]);
  const says = [images.join(", "), `${summary.classes} classes`, `${summary.size} pixels`, ...(summary.skipped ? [`${summary.skipped} files skipped`] : [])];
  const examples = Array.from({length: shown}, (_, i) => el("img", {loading: "lazy", width: 48, height: 48, alt: `an image of ${name}`,
    src: `/v1/datasets/${id}/images/${SHOWN}/${Math.floor(i * summary.images[SHOWN] / shown)}`}));
  return el("li", {}, el("div", {className: "row"}, el("b", {textContent: name}), el("small", {textContent: id}), el("small", {textContent: says.join(" · ")}),
    button("delete", () => remove(`/v1/datasets/${id}`))), el("div", {className: "thumbs"}, ...examples));
}

function showDatasets(datasets) {  // only when they have changed: their images would be fetched again
  const ids = datasets.map(d => d.id).join();
  if ($("datasets").dataset.ids === ids) return;
  $("datasets").dataset.ids = ids;
  $("datasets").replaceChildren(...(datasets.length ? datasets.map(datasetItem) : [el("li", {className: "soft", textContent: "none yet"})]));
  $("pipeline").elements.dataset.replaceChildren(...datasets.map(({id, name}) => el("option", {value: id, textContent: `${name} (${id})`})));
}

// Keeping it fresh

// Whether somebody is about to press a button in a list: it stays. A link that was followed keeps nothing.
const pressed = id => document.activeElement.tagName === "BUTTON" && $(id).contains(document.activeElement);
let turns = 0, trouble = [];

async function refresh() {
  try {
    if (turns++ % 5 === 0) ({trouble} = await call("/v1/system"));
    const [{jobs}, {models}, {datasets}, ready] = await Promise.all([call("/v1/jobs?limit=12"), call("/v1/models"),
      call("/v1/datasets"), fetch("/readyz").then(r => r.json())]);
    showDatasets(datasets);
    if (!pressed("jobs"))
      $("jobs").replaceChildren(...(jobs.length ? jobs.map(jobItem) : [el("li", {className: "soft", textContent: "none yet"})]));
    const shadows = await Promise.all(models.map(({name, aliases}) => aliases.candidate && aliases.production ?
      call(`/v1/models/${encodeURIComponent(name)}/shadow`) : null));
    if (!pressed("models")) $("models").replaceChildren(...(models.length ? models.map((model, i) => modelItem(model, shadows[i])) : [el("li", {className: "soft", textContent: "none yet"})]));
    const names = [...new Set(ready.models.filter(m => m.alias === "production").map(m => m.name))];
    if (names.join() !== [...$("model").options].map(o => o.value).join())
      $("model").replaceChildren(...names.map(name => el("option", {textContent: name, value: name})));
    $("ready").textContent = [ready.ready ? `serving ${new Set(ready.models.map(model => model.name)).size}` : "no model yet",
      ...(ready.refused.length ? [`${ready.refused.length} refused`] : []), ...trouble].join(", ");
  } catch {
    $("ready").textContent = "the API does not answer";
  }
}

refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 1000);
