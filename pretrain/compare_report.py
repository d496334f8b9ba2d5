"""A comparison in words and rows: what the terminal's tables and compare.md have in common. From the JSON document alone.

`rows`, `crossing_rows` and `interval_rows` are cells of text; `findings` are sentences, each true of the document it is made from;
`markdown` is the whole report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MATCHED = 0.01
"""Two quantities agree when they differ by at most this share of the first run's."""
QUANTITIES = ("total parameters", "matmul parameters", "tokens", "hardware FLOPs", "model FLOPs")
FEW_DOCUMENTS = 30

Row = tuple[str, list[str]]
Cell = Callable[[dict[str, Any]], str]
_CURVES = {"validation": "validation loss", "training": "smoothed training loss"}


def rows(document: dict[str, Any]) -> list[Row]:
    """(what, a cell for each run), by section; a section's name has no cells. What no run has is left out."""
    filled = [(what, [cell(run) for run in document["runs"]] if cell else []) for what, cell in _lines(document)]
    told = [(what, cells) for what, cells in filled if not cells or any(cells)]
    return [row for row, (_, after) in zip(told, [*told[1:], ("", [])], strict=True) if row[1] or after]


def _lines(document: dict[str, Any]) -> list[tuple[str, Cell | None]]:
    """What each row says of a run; None makes a heading."""
    runs, documents = document["runs"], document["documents"]
    losses = documents["losses"] if documents is not None else {}
    against = {pair["run"]: pair["quantities"] for pair in document["matched"]}
    kinds = [kind for kind in runs[0]["parameters"] if any(run["parameters"][kind] for run in runs)]
    return [
        ("kind", lambda run: run["kind"]),
        ("steps", lambda run: f"{run['step']:,}" if run["finished"] else f"{run['step']:,} of {run['total_steps']:,}"),
        ("", lambda run: "" if run["finished"] else "unfinished"),
        ("Loss, nats a token", None),
        ("training, last record", lambda run: f"{run['training']['loss']:.4f}"),
        ("training, smoothed", lambda run: f"{run['training']['smoothed']:.4f}"),
        ("validation, own depth", lambda run: _told(run["validation"], "loss", ".4f")),
        ("  own depth", lambda run: _told(run["validation"], "depth", "")),
        ("  recorded at step", lambda run: _told(run["validation"], "step", ",") if _behind(run) else ""),
        *((f"  at depth {depth}", _at_depth(depth)) for depth in _depths(runs)),
        ("whole validation split", lambda run: _told(losses.get(run["name"]), "loss", ".4f")),
        ("  checkpoint of step", lambda run: _told(losses.get(run["name"]), "step", ",")),
        ("Solver, or loops", None),
        ("iterations, first window", lambda run: _told(run["solver_iterations"], "first", ".2f")),
        ("iterations, last window", lambda run: _told(run["solver_iterations"], "last", ".2f")),
        ("iterations, validation", _used),
        ("||y* - y0|| / ||y0||", lambda run: _told(run["validation"], "proposal_distance", ".3f")),
        ("converged, validation", lambda run: _told(run["validation"], "converged", ".1%")),
        ("Parameters", None),
        *((kind.replace("_", " "), _parameters(kind)) for kind in kinds),
        ("Spent", None),
        ("tokens", lambda run: f"{run['tokens']:,}"),
        ("FLOPs, hardware", lambda run: f"{run['flops']['hardware']:.4g}"),
        ("FLOPs, model", lambda run: f"{run['flops']['model']:.4g}"),
        ("seconds of steps", lambda run: f"{run['seconds']:,.0f}"),
        ("peak memory, one rank", lambda run: f"{run['memory_bytes'] / 2**30:.2f} GiB"),
        ("steps skipped", lambda run: f"{run['skipped_steps'] or ''}"),
        ("times resumed", lambda run: f"{len(run['starts'][1:]) or ''}"),
        ("How", None),
        ("seed", lambda run: str(run["seed"])),
        ("precision", lambda run: run["precision"]),
        ("tensor, pipeline, data", _ranks),
        ("ZeRO", lambda run: str(run["layout"]["zero"])),
        ("Over the first run", None),
        *((name, _over(name, against)) for name in QUANTITIES),
    ]


def crossing_rows(document: dict[str, Any], curve: str) -> list[list[str]]:
    """[run, reaches, loss, tokens, ratio, FLOPs, ratio, seconds, ratio] of every ordered pair."""
    found = []
    for pair in document["crossings"]:
        if pair["curve"] == curve:
            cells = [pair["run"], pair["reaches"], f"{pair['loss']:.4f}"]
            if pair["reached"]:
                mark = "<= " if pair["earlier"] else ""
                for axis, shape in (("tokens", ",.0f"), ("flops", ".3g"), ("seconds", ",.0f")):
                    cells += [f"{mark}{pair[axis]:{shape}}", f"{mark}{pair['ratios'][axis]:.3f}"]
            else:
                cells += ["never", ""] * 3
            found.append(cells)
    return found


def interval_rows(document: dict[str, Any]) -> list[list[str]]:
    """[run, minus, difference, low, high]: nats a token."""
    return [
        [pair["run"], pair["minus"], *(f"{pair[key]:+.4f}" for key in ("difference", "low", "high"))]
        for pair in document["documents"]["differences"]
    ]


def findings(document: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    runs = document["runs"]
    told = [
        f"{run['name']} is unfinished: it stands at step {run['step']:,} of {run['total_steps']:,} and is compared at what it reached; "
        "its learning-rate schedule has not ended."
        for run in runs
        if not run["finished"]
    ]
    told += [f"{run['name']} has no validation loss on record yet." for run in runs if run["validation"] is None]
    told.append(" ".join(_matched(pair) for pair in document["matched"]))
    told += [said for run in runs[1:] if (said := _crossed(document, run["name"], runs[0]["name"]))]
    told += _differences(document["documents"]) if document["documents"] is not None else []
    told += [said for run in runs if (said := _internalised(run))]
    for key, what in (("mask_documents", "data.mask_documents"), ("precision", "train.precision")):
        if len({run[key] for run in runs}) > 1:
            told.append(f"{what} differs: " + ", ".join(f"{run['name']} {str(run[key]).lower()}" for run in runs) + ".")
    told.append(
        "No interval here holds what another seed of training would change. Losses before a run's end are those of a learning rate that "
        "has not come down yet. Seconds compare machines as much as models."
    )
    return told


def markdown(document: dict[str, Any]) -> str:
    """compare.md."""
    runs, data, smoothing = document["runs"], document["data"], document["smoothing"]
    parts = [f"# {' against '.join(_label(run) for run in runs)}", "\n".join(f"- {said}" for said in document["findings"])]
    body = [[what, *cells] if cells else [f"**{what}**", *[""] * len(runs)] for what, cells in rows(document)]
    parts.append(_table(["", *(_label(run) for run in runs)], body))
    parts.append(
        f"Validation: {data['validation_documents']:,} documents, {data['validation_tokens']:,} tokens in windows of "
        f"{data['sequence_length']:,} (index {data['validation_index_sha256'][:12]}, tokenizer {data['tokenizer_fingerprint'][:12]}). "
        + smoothing_note(smoothing)
    )
    for curve, name in _CURVES.items():
        if cells := crossing_rows(document, curve):
            head = ["run", "reaches the loss of", "loss", "tokens", "ratio", "FLOPs", "ratio", "seconds", "ratio"]
            parts += [f"## Where a run reaches another's final {name}", _table(head, cells), RATIO_NOTE]
    if document["documents"] is not None:
        head = ["run", "minus", "nats a token", "from", "to"]
        parts += [
            "## Differences on the whole validation split",
            _table(head, interval_rows(document)),
            interval_note(document["documents"]),
        ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in document["plots"]]
    return "\n\n".join(parts) + "\n"


RATIO_NOTE = (
    "Straight between records, the first time at or below that loss; <=: already there at the first record. Ratio: over what the other "
    "run had spent at its own last record. FLOPs are hardware FLOPs."
)


def smoothing_note(smoothing: dict[str, Any]) -> str:
    """How training losses are smoothed."""
    counts = sorted(set(smoothing["records"].values()))
    records = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"Smoothed training losses are means of the recorded losses in the last {smoothing['window_tokens']:,.0f} tokens, the same window "
        f"for every run ({records} records at the end)."
    )


def interval_note(documents: dict[str, Any]) -> str:
    """What the intervals are."""
    return (
        f"{documents['level']:.0%} intervals: paired bootstrap over {documents['documents']:,} documents ({documents['tokens']:,} "
        f"predicted tokens), {documents['resamples']:,} resamples, seed {documents['seed']}; newest checkpoints, each at its own depth."
    )


def _matched(pair: dict[str, Any]) -> str:
    same = [name for name, found in pair["quantities"].items() if found["matched"]]
    other = [f"{name} ({found['ratio']:.3f} times)" for name, found in pair["quantities"].items() if not found["matched"]]
    return (
        f"{pair['run']} against {pair['against']}: matched within {MATCHED:.0%}: {_listed(same) or 'nothing'}; "
        f"not matched: {_listed(other) or 'nothing'}."
    )


def _crossed(document: dict[str, Any], run: str, first: str) -> str:
    """Both directions of a pair, on validation loss."""
    pairs = {(pair["run"], pair["reaches"]): pair for pair in document["crossings"] if pair["curve"] == "validation"}
    return " ".join(_reaches(pairs[key]) for key in ((run, first), (first, run)) if key in pairs)


def _reaches(pair: dict[str, Any]) -> str:
    what = f"{pair['run']} {{}} the final validation loss of {pair['reaches']} ({pair['loss']:.4f})"
    if not pair["reached"]:
        return what.format("never reaches") + "."
    ratios, at_most = pair["ratios"], "at most " if pair["earlier"] else ""
    return (
        f"{what.format('reaches')} after {at_most}{pair['tokens']:,.0f} tokens: {at_most}{ratios['tokens']:.3f} times its tokens, "
        f"{ratios['flops']:.3f} times its FLOPs, {ratios['seconds']:.3f} times its seconds."
    )


def _differences(documents: dict[str, Any]) -> list[str]:
    told = []
    for pair in documents["differences"]:
        sides = "lower" if pair["high"] < 0 else "higher" if pair["low"] > 0 else "not told apart by these documents"
        said = f"{sides} than" if sides in ("lower", "higher") else f"{sides} from"
        told.append(
            f"On the whole validation split the loss of {pair['run']} is {said} that of {pair['minus']}: {pair['difference']:+.4f} nats a "
            f"token, {documents['level']:.0%} interval {pair['low']:+.4f} to {pair['high']:+.4f} over {documents['documents']:,} documents."
        )
    if documents["documents"] < FEW_DOCUMENTS:
        told.append(f"{documents['documents']} documents are few: below {FEW_DOCUMENTS} these intervals are too narrow.")
    return told


def _internalised(run: dict[str, Any]) -> str:
    """How far the shallow depths are behind the run's own, where it has any."""
    validation = run["validation"]
    shallow = [depth for depth in ("0", "1") if validation and depth in validation["by_depth"] and depth != validation["depth"]]
    if not shallow:
        return ""
    gaps = _listed([f"{validation['by_depth'][depth] - validation['loss']:+.4f} nats at T = {depth}" for depth in shallow])
    return f"{run['name']}, against its own depth ({validation['depth']}): {gaps}."


def _label(run: dict[str, Any]) -> str:
    return run["name"] if run["finished"] else f"{run['name']} (unfinished)"


def _depths(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Every depth a run was validated at, but where all have one alone."""
    told = [list(run["validation"]["by_depth"]) for run in runs if run["validation"]]
    return list(dict.fromkeys(depth for depths in told for depth in depths)) if any(len(depths) > 1 for depths in told) else []


def _behind(run: dict[str, Any]) -> bool:
    """Whether the last validation is of an earlier step than the last record."""
    return bool(run["validation"]) and run["validation"]["step"] != run["step"]


def _at_depth(depth: str) -> Cell:
    return lambda run: _told((run["validation"] or {}).get("by_depth"), depth, ".4f")


def _parameters(kind: str) -> Cell:
    return lambda run: f"{run['parameters'][kind]:,}"


def _over(name: str, against: dict[str, Any]) -> Cell:
    return lambda run: _agreement(against[run["name"]][name]) if run["name"] in against else "1"


def _used(run: dict[str, Any]) -> str:
    validation = run["validation"] or {}
    return _told(validation.get("iterations"), str(validation.get("depth")), ".2f")


def _told(found: dict[str, Any] | None, key: str, shape: str) -> str:
    return "" if not found or found.get(key) is None else f"{found[key]:{shape}}"


def _ranks(run: dict[str, Any]) -> str:
    layout = run["layout"]
    return f"{layout['tensor']} x {layout['pipeline']} x {'?' if layout['data'] is None else layout['data']}"


def _agreement(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.3f} {'matched' if found['matched'] else 'not'}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the bars of norms are escaped."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
