"""The release card as one self-contained page: no script, no other file, light or dark as the reader's system is."""

from html import escape
from typing import Any

from optimization import findings
from optimization.plot import kind_of, plot

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --line: #d9dee3; --paper: #fff; --band: #0a7d4b1f;
  --good: #0a7d4b; --bad: #b3371f; --blue: #2358c5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5af; --line: #343b42; --paper: #14171a;
  --band: #3fc48a2b; --good: #3fc48a; --bad: #ff8a70; --blue: #84acff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.1rem; margin: .5rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.winner td { font-weight: 600; } td.winner, td.passes { color: var(--good); }
td.refused, td.failed { color: var(--bad); }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .tick, svg .axis { fill: var(--soft); } .grid { stroke: var(--line); } .band { fill: var(--band); }
.mark, .span { stroke-width: 2; fill: var(--paper); stroke: var(--bad); }
.passes.mark, .passes.span, .winner.mark, .winner.span { stroke: var(--good); } .winner.mark { fill: var(--good); }
.reference.mark { stroke: var(--blue); }
svg .label.winner { font-weight: 700; } .span { opacity: .6; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
"""
VERDICTS = {"reference": "reference", "winner": "won", "passes": "passes", "refused": "refused", "failed": "not built"}
HEADINGS = ("Variant", "Gate", "On", "Accuracy %", "Loss, points (95 %)", "As Keras %", "p50 ms", "p99 ms")


def render(card: dict[str, Any], pictures: dict[int, bytes]) -> str:
    """A whole HTML document from a card's JSON and PNGs of the validation images that it names.

    Every name and sentence of the card is escaped.
    """
    gate, test = card["gate"], card["test"]
    measured = [row for row in card["rows"] if row["state"] == "measured"]
    batches = list(measured[0]["images_per_s"])
    heads = "".join(f"<th>{escape(h)}</th>" for h in (*HEADINGS, *(f"images/s at {b}" for b in batches), "KiB"))
    body = "".join(_table_row(row, batches) for row in card["rows"])
    reasons = _definitions([(row["variant"], row["why"]) for row in card["rows"] if "why" in row])
    title = f"{card['name']} version {card['version']}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}: release card</title><style>{STYLE}{findings.STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(_verdict(card))}</p>
<p class="soft">{escape(_tested(test, card["winner"]))}</p>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>
<h2>Accuracy against throughput</h2>
{plot(measured, gate["rank_batch"], gate["budget"])}
<p class="soft">The band is what the budget allows: {gate["budget"]:g} points under Keras. A vertical line is the 95 %
interval of a variant's loss, taken from Keras's accuracy; a variant passes when it does not reach below the band.</p>
<h2>Why</h2>{reasons}
{findings.findings(card["diagnosis"], pictures)}
<h2>How it was measured</h2>{_definitions(_facts(card))}
</body></html>
"""


def _definitions(pairs: list[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(text)}</dd>' for term, text in pairs)}</dl>"


def _table_row(row: dict[str, Any], batches: list[str]) -> str:
    kind = kind_of(row)
    cells = [f"<td>{escape(row['variant'])}</td>", f'<td class="{kind}">{VERDICTS[kind]}</td>']
    if kind == "failed":
        return f'<tr class="{kind}">{"".join(cells)}<td colspan="{len(HEADINGS) + len(batches) - 1}"></td></tr>'
    gate = row.get("gate")
    loss = f"{gate['loss']:.2f} ({gate['low']:.2f} to {gate['high']:.2f})" if gate else ""
    near = f"{100 * row['against_keras']['agreement']:.2f}" if gate else ""
    numbers = [escape(row["device"]), f"{100 * row['accuracy']:.2f}", loss, near,
               f"{row['latency_ms']['p50']:.2f}", f"{row['latency_ms']['p99']:.2f}",
               *(f"{row['images_per_s'][b]:,.0f}" for b in batches), f"{row['bytes'] / 1024:,.0f}"]
    return f'<tr class="{kind}">{"".join(cells)}{"".join(f"<td>{n}</td>" for n in numbers)}</tr>'


def _verdict(card: dict[str, Any]) -> str:
    alias = card["alias"]
    if card["winner"] is None:
        return "No variant passed the gate: the alias " + alias["alias"] + " was not moved."
    if not alias["moved"]:
        return f"{card['winner']} won, and {alias['alias']} was not moved: {alias['reason']}."
    return f"{card['winner']} was made {alias['alias']}, by this release."


def _tested(test: dict[str, Any], winner: str | None) -> str:
    if not test["images"]:
        return "The dataset has no test images."
    accuracy = {name: f"{100 * share:.2f} %" for name, share in test["accuracy"].items()}
    chosen = f"{winner} {accuracy[winner]}, " if winner else ""
    return f"On {test['images']:,} test images, which decided nothing: {chosen}Keras {accuracy['keras-fp32']}."


def _facts(card: dict[str, Any]) -> list[tuple[str, str]]:
    gate = card["gate"]
    versions = ", ".join(f"{tool} {number}" for tool, number in card["versions"].items())
    return [("When", card["created_at"]), ("Model", card["model"]), ("Dataset", card["dataset"]),
            ("Input", f"{card['size']} x {card['size']} RGB, {card['classes']} classes"),
            *(("Training", f"auto chose {why}") for why in (card.get("recipe") or {}).get("chosen") or ()),
            ("Device", f"{_gpu(card['gpu'])}{card['cpu']}, {card['threads']} thread(s)"),
            ("Gate", f"{gate['validation_images']:,} validation images, paired per image; {gate['method']}; "
                     f"budget {gate['budget']:g} points"),
            ("Choice", f"fastest at batch {gate['rank_batch']}; within {100 * gate['near']:g} % the more accurate"),
            ("Timing", f"sessions in turns, medians; p99 of {min(_calls(card))} calls or more at batch 1"),
            *_serving(card), ("Versions", versions)]


def _serving(card: dict[str, Any]) -> list[tuple[str, str]]:
    """How the winner is run by an API on that host; nothing on the cards of older versions."""
    found = next((row["serving"] for row in card["rows"] if row.get("winner") and "serving" in row), None)
    if found is None:
        return []
    missed = "" if found["meets_target"] else "; no choice was within SERVING_P99_MS, this one came nearest"
    return [("Serving", f"{card['winner']} with HTTP_PROCESSES={found.get('processes', 1)} on {found['threads']} "
                        f"thread(s) each, at most {found['batch']} images together: "
                        f"{found['images_per_s']:,.0f} images/s, p99 {found['p99_ms']:.1f} ms, the best of "
                        f"{len(found['tried'])} choices with 64 clients, decoding in it, HTTP not{missed}")]


def _gpu(gpu: dict[str, Any] | None) -> str:
    return f"{gpu['name']}, driver {gpu['driver']}, compute capability {gpu['capability']}; " if gpu else ""


def _calls(card: dict[str, Any]) -> list[int]:
    return [row["latency_ms"]["calls"] for row in card["rows"] if row["state"] == "measured"]
