"""What was diagnosed of a classifier, as parts of the card's page: classes, calibration, images to look at."""

import base64
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

SIDE = 96  # pixels of an image on the page
PLOT, MARGIN = 260, 44

STYLE = """
.shots { display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; } .shots figure { margin: 0; width: 8.5rem; }
.shots img { width: 6rem; height: 6rem; image-rendering: pixelated; border-radius: 4px; display: block; }
.shots figcaption { font-size: .85rem; overflow-wrap: anywhere; } svg.reliability { max-width: 26rem; }
svg.reliability rect { fill: var(--blue); opacity: .75; } svg.reliability .ideal { stroke: var(--soft);
  stroke-dasharray: 4 4; } svg.interval { width: 12rem; height: 14px; } svg.interval .track { stroke: var(--line);
  stroke-width: 6; } svg.interval .range { stroke: var(--blue); stroke-width: 6; }
svg.interval circle { fill: var(--ink); }
"""


def findings(found: dict[str, Any], pictures: dict[int, bytes]) -> str:
    """HTML of a diagnosis (`diagnosis.diagnose` with `of`, the Variant); pictures: PNGs of the images that it names."""
    suspected = found["label_errors"]["suspected"]
    sections = [
        f"<h2>Classes</h2>{_classes(found['per_class'])}",
        f'<h2>Calibration</h2>{_reliability(found["calibration"])}<p class="soft">{escape(_calibrated(found))}</p>',
        "<h2>The most confident mistakes</h2>",
        _gallery(found["mistakes"], pictures) or "<p>None on the validation images.</p>",
        "<h2>Labels to look at</h2>",
        f'<p class="soft">{_doubtful(suspected, found["calibration"]["images"])}</p>',
        _gallery(found["label_errors"]["images"], pictures)]
    return "".join(sections)


def thumbnail(image: np.ndarray) -> bytes:
    """PNG of uint8 [S, S, 3], at most 96 pixels wide."""
    picture = Image.fromarray(image)
    if len(image) > SIDE:
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    out = BytesIO()
    picture.save(out, "png")
    return out.getvalue()


def _classes(rows: list[dict[str, Any]]) -> str:
    """The worst recall first."""
    cells = []
    for row in sorted(rows, key=lambda r: 2.0 if r["recall"] is None else r["recall"]):
        known = row["recall"] is not None
        span = "no images"
        if known:
            span = f"{100 * row['recall']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        precision = "never found" if row["precision"] is None else f"{100 * row['precision']:.1f}"
        cells.append(f"<tr><td>{escape(row['label'])}</td><td>{_interval(row) if known else ''}</td>"
                     f"<td>{span}</td><td>{precision}</td><td>{row['images']:,}</td></tr>")
    return ('<div class="wide"><table><thead><tr><th>Class</th><th></th><th>Recall % (95 %)</th><th>Precision %</th>'
            f"<th>Images</th></tr></thead><tbody>{''.join(cells)}</tbody></table></div>")


def _interval(row: dict[str, Any]) -> str:
    def x(share: float) -> str:
        return f"{4 + 192 * share:.1f}"

    return ('<svg class="interval" viewBox="0 0 200 14" aria-hidden="true">'
            f'<line class="track" x1="{x(0)}" x2="{x(1)}" y1="7" y2="7"/>'
            f'<line class="range" x1="{x(row["low"])}" x2="{x(row["high"])}" y1="7" y2="7"/>'
            f'<circle cx="{x(row["recall"])}" cy="7" r="4"/></svg>')


def _reliability(known: dict[str, Any]) -> str:
    """Accuracy of each bin of confidence, beside the diagonal on which it should lie; wide bars are bins of many."""
    size, most = PLOT + 2 * MARGIN, max(n for n, _, _ in known["bins"])

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + PLOT * x, MARGIN + PLOT * (1 - y)

    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    parts = [f'<svg class="reliability" viewBox="0 0 {size} {size}" role="img" '
             'aria-label="Accuracy against confidence">',
             f'<line class="ideal" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>']
    for images, sure, share in known["bins"]:
        (x, y), width = at(sure, share), 3 + 11 * (images / most) ** 0.5
        said = f"{images:,} images: confidence {100 * sure:.1f} %, accuracy {100 * share:.1f} %"
        parts.append(f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{y0 - y:.1f}">'
                     f"<title>{said}</title></rect>")
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(tick, tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y0 + 18:.1f}" text-anchor="middle">{100 * tick:g}</text>'
                     f'<text class="tick" x="{x0 - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:g}</text>')
    middle = size / 2
    parts.append(f'<text class="axis" x="{middle}" y="{size - 8}" text-anchor="middle">confidence, %</text>'
                 f'<text class="axis" text-anchor="middle" transform="translate(12 {middle}) rotate(-90)">accuracy, %'
                 "</text></svg>")
    return "".join(parts)


def _calibrated(found: dict[str, Any]) -> str:
    known = found["calibration"]
    t = known["temperature"]
    leaning = "overconfident" if t > 1.02 else "underconfident" if t < 0.98 else "about as right as it is confident"
    said = (f"{found['of']} on the {known['images']:,} validation images: expected calibration error "
            f"{100 * known['ece']:.2f} points, {leaning}.")
    if known.get("ece_scaled", 1.0) < known["ece"]:
        said += (f" Logits divided by a temperature of {t:.2f} would leave {100 * known['ece_scaled']:.2f} points, "
                 "measured on images that the temperature was not fitted to.")
    elif "ece_scaled" in known:
        said += " No temperature was found that improves it on images that it was not fitted to."
    return said


def _doubtful(suspected: int, images: int) -> str:
    if not suspected:
        return "No label looks wrong."
    return (f"{suspected:,} of {images:,} validation images have a label that may be wrong, by confident learning: the "
            "model scores another class as high as that class usually is. Those whose label it believes the least in "
            "come first. The weaker the model, the more of these are its own mistakes.")


def _gallery(entries: list[dict[str, Any]], pictures: dict[int, bytes]) -> str:
    shots = []
    for e in entries:
        said = f"{e['label']}, answered {e['found']} with {100 * e['confidence']:.1f} %"
        data = base64.b64encode(pictures[e["image"]]).decode()
        shots.append(f'<figure><img src="data:image/png;base64,{data}" alt="{escape(said)}"><figcaption>'
                     f'<b>{escape(e["label"])}</b><br>answered {escape(e["found"])}, {100 * e["confidence"]:.1f} %<br>'
                     f'<span class="soft">validation {e["image"]}</span></figcaption></figure>')
    return f'<div class="shots">{"".join(shots)}</div>' if shots else ""
