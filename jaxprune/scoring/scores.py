"""Scores as a file: one number per unit, how it was made, and from which rows. One scoring run serves every budget.

A score file is a safetensors file: one float32 tensor per site under the site's name, `means:SITE` for what closed
units are replaced by, `variance:SITE` and `halves:SITE` for how far the scores depend on the examples, `signed:SITE`
for what the units' removal is predicted to lose, the keys of the examples as bytes under `rows`, and a JSON header
under the metadata key `jaxprune_scores`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.checkpoints.files import COUNT, parse_header, write_atomic
from jaxprune.checkpoints.tensors import Entry, TensorFile, is_sealed, model_digest, sealed, write_tensors
from jaxprune.models import Model, TaskHead
from jaxprune.scoring.attribution import Criterion, GradientActivation, IntegratedGradients
from jaxprune.scoring.criteria import Fisher, Gradient, LeaveOneOut, Random, Taylor, TopLayers
from jaxprune.scoring.objectives import name_of
from jaxprune.scoring.stability import TARGET, stability
from jaxprune.units import KINDS, UNITS, Gates, Params, check_sharing, widths

METADATA = "jaxprune_scores"
ROWS = "rows"
KEY_BYTES = 8  # of a row's key, see `row_key`
SMALL = 1e-3  # of the objective, such as a probability: below it a relative error means nothing
FORMAT = 5
# 1 has no variances or halves, 2 no signed attributions, 3 rows as JSON, 4 no checksum
_FORMATS = range(1, FORMAT + 1)
_EXTRAS = ("means", "variance", "halves", "signed")  # tensors beside the scores, as `means:3.ffn.neurons`
_SAME = ("criterion", "task", "split", "head", "model", "max_length", "prompt")  # what merged scores must share
_NAME = (str, None, bool, float)  # of a function, or another setting of a criterion
_VALUE = (float, None)
_STABILITY = {  # see `jaxprune.scoring.stability`
    **{"examples": COUNT, "halves": [COUNT], "target": float, "fractions": [float]},
    **{"reliability": _VALUE, "needed": (COUNT, None)},
    "kinds": {
        ...: {
            **{"units": COUNT, "spearman": _VALUE, "overall": _VALUE, "reliability": _VALUE},
            **{"needed": (COUNT, None), "overlap": [_VALUE], "chance": [_VALUE]},
        }
    },
}
_HEADER = {
    "format": _FORMATS,
    "criterion": {  # name and every setting, functions by name
        "name": str,
        **dict.fromkeys(("objective?", "labels?", "examples?", "tokens?"), _NAME),
        "start?": float,
        ...: object,
    },
    "task": str,
    "split": str,
    "head": str,
    "prompt?": ({...: object}, None),
    "examples": COUNT,  # how many were read; 0 for criteria that read none
    "cut_off?": COUNT,
    "truncated?": COUNT,  # examples whose texts were cut to max_length tokens, if there are any
    "largest": bool,  # whether scores are the largest over the examples, not their mean
    "keys": [object],  # the numbers of every random key that was used
    "model": str,  # digest of configuration and parameters
    "data": [str],  # digests of the examples
    "rows?": [re.compile("[0-9a-f]{16}")],  # of formats before 4: keys of the examples' texts, sorted
    "encoded?": str,  # digest of the examples in their order, as the model reads them
    "checksum?": str,  # of all tensors and the rest of the header
    "max_length": range(1, 2**31),  # tokens to which texts were cut
    "mean_length": (float, [float]),  # tokens per example, without padding; of a text-to-text model its answers' too
    # of integrated gradients, in the unit of the objective
    "completeness": (dict.fromkeys(("expected", "found", "error", "size"), float) | {"relative": (float, None)}, None),
    "objective?": str,  # what is attributed, by name
    "properties?": {
        "by_layer": bool,
        "per_cost?": bool,
        "meaning": (str, None),
        ...: object,
    },  # of the criterion, see `properties_of`
    "halves?": ([COUNT], None),  # the examples in each half; None: the scores have no halves
    "stability?": (_STABILITY, None),
    # the target of a run that stopped by itself, whether it was reached, and the most examples
    "until_stable?": {"target": float, "reached": bool, "most": COUNT},
    "versions": {...: object},
    ...: object,
}


@dataclass(frozen=True, eq=False)
class Scores:
    """One score per unit; higher is more needed."""

    values: Gates  # site name to [units] float32; selection leaves a missing site open
    header: Mapping[str, Any]  # how the scores were made
    means: Gates | None = None  # what closed units are replaced by: [units], of heads [heads, channels]; None is zero
    variance: Gates | None = None  # of a unit's score over the examples, [units]; a score's own is this by their number
    halves: Gates | None = None  # scores of two halves of the examples, [2, units]; None: not means over examples
    signed: Gates | None = None  # mean attributions with their signs, [units]; None: they are the scores, or not known
    rows: tuple[str, ...] = ()  # keys of the examples' texts, sorted; see `row_key`

    @property
    def properties(self) -> Mapping[str, Any]:
        """The facts about the criterion that selection and prediction need; see `properties_of`."""
        known = self.header.get("properties")
        return known or properties_of(_BEFORE.get(self.header["criterion"]["name"], _OTHER))


_USUAL = ("heads", "neurons")  # how files spell `UNITS`, whatever family the model is of


def describe(criterion: Any) -> dict[str, Any]:
    """The name and the settings of a criterion, functions by their names."""
    settings = {"name": type(criterion).__name__}
    for field in fields(criterion):
        value = getattr(criterion, field.name)
        if value != field.default or not field.metadata.get("if_changed"):
            settings[field.name] = _plain(_USUAL if value == UNITS else value)
    return settings


def properties_of(criterion: Criterion) -> dict[str, Any]:
    """The facts about a criterion that selection and prediction need: its `by_layer`, `per_cost` and `meaning`."""
    return {name: getattr(criterion, name) for name in ("by_layer", "per_cost", "meaning")}


# Files before format 4 hold nothing of the criterion but its name and settings.
_BEFORE: Mapping[str, Criterion] = {
    kind.__name__: kind()
    for kind in (GradientActivation, IntegratedGradients, Gradient, Taylor, Fisher, TopLayers, LeaveOneOut)
}
_OTHER = Random()  # like all others: no objective of its own


def objective_name(scores: Scores, head: TaskHead) -> str:
    """The name of the objective, such as `probability`; a function of the user's own by its name."""
    criterion = scores.header["criterion"]
    known = scores.header.get("objective") or criterion.get("objective")
    return known or name_of(_BEFORE.get(criterion["name"], _OTHER).objective_of(head))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else name_of(value)


def with_relative(completeness: Mapping[str, float]) -> dict[str, float | None]:
    """Completeness with its relative error; None where what was expected is too small for one.

    Args:
        completeness: Means over examples (and paths): `expected`, `found`, `error` (the size of their difference) and
            `size` (that of what was expected).
    """
    size = completeness["size"]
    return dict(completeness) | {"relative": completeness["error"] / size if size > SMALL else None}


def with_stability(scores: Scores, target: float = TARGET) -> Scores:
    """The scores with their stability in the header; None where they have no halves."""
    known = stability(scores.halves, scores.header.get("halves"), target=target)
    return replace(scores, header=dict(scores.header) | {"stability": None if known is None else known.to_json()})


def in_order(scores: Scores) -> Scores:
    """The scores with sites and header in the order of a file: those just made equal those that are read again."""
    parts: dict[str, Any] = {}
    for part in ("values", *_EXTRAS):
        sites = getattr(scores, part)
        parts[part] = None if sites is None else dict(sorted(sites.items()))
    return replace(scores, header=json.loads(json.dumps(dict(scores.header), sort_keys=True)), **parts)


def save_scores(path: str | Path, scores: Scores) -> Path:
    """Writes scores to a file, atomically; an existing file is replaced.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    tensors: dict[str, np.ndarray] = {name: np.asarray(value, np.float32) for name, value in scores.values.items()}
    for extra in _EXTRAS:
        sites: Gates = getattr(scores, extra) or {}
        tensors |= {f"{extra}:{name}": np.asarray(value, np.float32) for name, value in sites.items()}
    tensors[ROWS] = np.frombuffer(bytes.fromhex("".join(scores.rows)), np.uint8).reshape(-1, KEY_BYTES)
    header = sealed(dict(scores.header) | {"format": FORMAT}, tensors)
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    return write_atomic(path, partial(write_tensors, tensors=tensors, metadata={METADATA: text}))


def load_scores(path: str | Path) -> Scores:
    """Reads scores from a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, damaged, or no score file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; make one with `jaxprune score`, or with jp.save_scores.")
    with TensorFile(path) as file:
        if METADATA not in file.metadata:
            raise ValueError(f"{path} is a safetensors file, but holds no scores: its metadata has no {METADATA!r}.")
        problems, header = parse_header(file.metadata[METADATA], _HEADER)
        entries = {name: entry for name, entry in file.entries.items() if name != ROWS}
        problems += [
            f"{name} is {entry.dtype}, expected F32" for name, entry in entries.items() if entry.dtype != "F32"
        ]
        if header:
            problems += _wrong_shapes({name: entry.shape for name, entry in entries.items()}, header)
            problems += _wrong_rows(file.entries.get(ROWS), header)
        if not problems:
            arrays = {name: file.read(name) for name in sorted(entries)}
            keys = {ROWS: file.read(ROWS)} if ROWS in file.entries else {}
            if (header["format"] >= 5 or "checksum" in header) and not is_sealed(header, arrays | keys):
                problems.append("its checksum is another than that of its header and tensors")
            problems += [
                f"{name} holds NaN or infinity" for name, array in arrays.items() if not np.isfinite(array).all()
            ]
            problems += [
                f"{name} holds {array.min()}"
                for name, array in arrays.items()
                if name.startswith("variance:") and array.size and array.min() < 0
            ]
        if problems:
            raise ValueError(f"{path} cannot be used as scores: {'; '.join(problems)}. Score again.")
        rows = header.pop(ROWS) if ROWS in header else _keys(file.read(ROWS))
        header.pop("checksum", None)
    parts: dict[str, Gates] = {name: {} for name in ("", *_EXTRAS)}
    for name, array in arrays.items():
        extra, _, site = name.rpartition(":")
        parts[extra][site] = jnp.asarray(array)
    return Scores(parts[""], header, *(parts[extra] or None for extra in _EXTRAS), rows=tuple(rows))


def _keys(rows: np.ndarray) -> list[str]:
    text = rows.tobytes().hex()
    return [text[start : start + 2 * KEY_BYTES] for start in range(0, len(text), 2 * KEY_BYTES)]


def _wrong_rows(entry: Entry | None, header: Mapping[str, Any]) -> list[str]:
    """The problems of the keys of the rows: a tensor, or in formats before 4 a list in the header."""
    if header.get("format", 0) < 4:
        return [] if entry is None and ROWS in header else [f"its header has no {ROWS!r}"]
    if entry is None or entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[1] != KEY_BYTES:
        return [f"it has no tensor {ROWS!r} of type U8 with {KEY_BYTES} bytes for every row"]
    return [f"its header has {ROWS!r}, which is a tensor"] if ROWS in header else []


def _wrong_shapes(shapes: Mapping[str, tuple[int, ...]], header: Mapping[str, Any]) -> list[str]:
    """The problems of the tensors of a file, by their names and shapes."""
    values = {name: shape for name, shape in shapes.items() if ":" not in name}
    problems = [
        f"{name} has shape {list(shape)}, expected one axis" for name, shape in values.items() if len(shape) != 1
    ]
    for name in shapes.keys() - values.keys():
        if name.partition(":")[0] not in _EXTRAS:
            problems.append(f"{name} is neither scores nor one of {', '.join(f'{extra}:SITE' for extra in _EXTRAS)}")
    for extra, rows in (("variance", ()), ("halves", (2,)), ("signed", ())):
        given = {name.partition(":")[2]: shape for name, shape in shapes.items() if name.startswith(f"{extra}:")}
        expected = {name: (*rows, *shape) for name, shape in values.items()} if given else {}
        odd = [site for site in {**expected, **given} if given.get(site) != expected.get(site)]
        problems += [f"{extra}:{site} does not fit the scores of {site}" for site in odd]
        counts = header.get("halves")
        if given and extra == "halves" and not _are_counts(counts, header.get("examples")):
            problems.append(f"halves in its header is {counts!r}, expected two numbers that add up to its examples")
    return problems


def _are_counts(value: Any, total: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(count) is int and count >= 0 for count in value) and sum(value) == total


def merge(a: Scores, b: Scores) -> Scores:
    """The scores of the examples of both, as if they had been scored at once.

    Means are weighted by the numbers of examples, and so are those of the two halves and signed attributions; variances
    are those of all examples. What a file is too old to have is None. Of scores that are the largest over the examples,
    the larger one is taken.

    Raises:
        ValueError: If they differ in model, criterion, task, split, head, text length, prompt or closed values, share
            examples, or were made without examples.
    """
    problems = [
        f"{name} differs ({_short(a.header.get(name))} and {_short(b.header.get(name))})"
        for name in _SAME
        if a.header.get(name) != b.header.get(name)
    ]
    shared = set(a.rows) & set(b.rows)
    if shared:
        problems.append(f"{len(shared)} examples are in both")
    counts = a.header["examples"], b.header["examples"]
    if not all(counts):
        problems.append("scores made without examples have nothing to merge")
    if not _equal(a.means, b.means):
        problems.append("closed units have other means (give both the same: score(..., means=))")
    if _shapes(a.values) != _shapes(b.values):
        problems.append("they are of other sites or numbers of units")
    if problems:
        raise ValueError(f"these scores cannot be merged: {'; '.join(problems)}.")
    if a.header["largest"]:
        values = {name: jnp.maximum(value, b.values[name]) for name, value in a.values.items()}
    else:
        values = {name: _float32(_weighted(pair, counts)) for name, pair in _pairs(a.values, b.values).items()}
    signed = None
    if a.signed is not None and b.signed is not None:
        signed = {name: _float32(_weighted(pair, counts)) for name, pair in _pairs(a.signed, b.signed).items()}
    header = _merged_header(a.header, b.header, counts)
    rows = tuple(sorted(a.rows + b.rows))
    merged = Scores(values, header, a.means, _merged_variance(a, b), signed=signed, rows=rows)
    if a.halves is None or b.halves is None:
        return with_stability(merged)
    halves = {}
    for name, pair in _pairs(a.halves, b.halves).items():
        parts = zip(*pair, a.header["halves"], b.header["halves"], strict=True)
        halves[name] = _float32(np.stack([_weighted((x, y), (i, j)) if i + j else x for x, y, i, j in parts]))
    return with_stability(replace(merged, halves=halves))


def _merged_variance(a: Scores, b: Scores) -> Gates | None:
    """The variance over the examples of both, from their means and squared deviations (see `totals.add`)."""
    counts = a.header["examples"], b.header["examples"]
    one, other = _deviations(a), _deviations(b)
    if one is None or other is None:
        return None
    shift = counts[0] * counts[1] / sum(counts)
    return {
        name: _float32((one[name] + other[name] + shift * np.square(x - y)) / (sum(counts) - 1))
        for name, (x, y) in _pairs(a.values, b.values).items()
    }


def _deviations(scores: Scores) -> dict[str, np.ndarray] | None:
    """The sums of squared deviations from the mean, float64 `[units]`: 0 of one example; None if they are not known."""
    if scores.variance is not None:
        return {
            name: (scores.header["examples"] - 1) * np.asarray(value, np.float64)
            for name, value in scores.variance.items()
        }
    if scores.halves is not None and scores.header["examples"] == 1:
        return {name: np.zeros(value.shape) for name, value in scores.values.items()}
    return None


def _pairs(a: Gates, b: Gates) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (np.asarray(value, np.float64), np.asarray(b[name], np.float64)) for name, value in a.items()}


def _float32(array: np.ndarray) -> Array:
    return jnp.asarray(array, jnp.float32)


def check_scores(
    model: Model, params: Params, scores: Scores | Mapping[str, Any], *, digest: str | None = None
) -> None:
    """Refuses scores that do not belong to a model: of other sites or numbers of units, or of other weights.

    Args:
        params: The parameters; or their shapes, if `digest` is given.
        scores: The scores; those without a header do not say which weights they are of.
        digest: The `model_digest` of the model, if it is known.

    Raises:
        ValueError: If they do not, saying why.
    """
    values = scores.values if isinstance(scores, Scores) else scores
    check_sharing(model.axes, params, values)
    fitting_values(values, widths(model.axes, params, KINDS), "scores")
    scored = scores.header.get("model") if isinstance(scores, Scores) else None
    if scored and scored != (digest := digest or model_digest(model, params)):
        raise ValueError(
            f"these scores belong to another model: they were made with {scored[:12]}, this is {digest[:12]} "
            "(other weights, another type of them, or other task heads). Score this model first."
        )


def fitting_values(
    values: Mapping[str, Any], width: Mapping[str, int], what: str, expected: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Scores as float64 arrays.

    Args:
        values: Site name to `[units]`.
        width: The units of every site that there may be.
        what: The scores in the words of the error.
        expected: Sites that must have scores.

    Raises:
        ValueError: If they have other sites or numbers of units, or are not finite.
    """
    arrays = {name: np.asarray(value).astype(np.float64) for name, value in values.items()}
    problems = [f"{name} is not a site" for name in arrays if name not in width]
    problems += [f"{name} is missing" for name in expected if name not in arrays]
    problems += [
        f"{name} has shape {array.shape} for {width[name]} units"
        for name, array in arrays.items()
        if name in width and array.shape != (width[name],)
    ]
    problems += [f"{name} holds NaN or infinity" for name, array in arrays.items() if not np.isfinite(array).all()]
    if problems:
        raise ValueError(f"the {what} cannot be used with these parameters: {some(problems)}. Score this model first.")
    return arrays


def some(problems: Sequence[str]) -> str:
    """The first few problems, in one line."""
    return "; ".join(problems[:6]) + (f" and {len(problems) - 6} more" if len(problems) > 6 else "")


def check_same_model(scores: Mapping[str, Scores]) -> None:
    """Refuses scores that were not made with one model, at the same sites.

    Args:
        scores: At least one, by the names of their files.

    Raises:
        ValueError: Naming the first file and one that differs.
    """
    (first, one), *others = scores.items()
    for name, other in others:
        models = one.header["model"], other.header["model"]
        if models[0] != models[1]:
            raise ValueError(
                f"{first} and {name} hold scores of different models ({models[0][:12]} and {models[1][:12]}): score "
                "one model for both."
            )
        shapes = _shapes(one.values), _shapes(other.values)
        if problems := sorted({site for site, _ in shapes[0].items() ^ shapes[1].items()}):
            raise ValueError(
                f"{first} and {name} hold scores of other sites or numbers of units ({', '.join(problems[:6])}): score "
                "units of the same kinds for both."
            )


def _merged_header(a: Mapping[str, Any], b: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    completeness = a["completeness"]
    if completeness is not None:
        pairs = {name: (completeness[name], b["completeness"][name]) for name in completeness if name != "relative"}
        completeness = with_relative({name: float(_weighted(pair, counts)) for name, pair in pairs.items()})
    one, other = a.get("halves"), b.get("halves")
    shared = {name: value for name, value in a.items() if name not in ("until_stable", "encoded")}
    if truncated := a.get("truncated", 0) + b.get("truncated", 0):
        shared["truncated"] = truncated
    return shared | {
        "format": max(a["format"], b["format"]),
        "halves": None if one is None or other is None else np.add(one, other).tolist(),
        "examples": sum(counts),
        "keys": a["keys"] + [key for key in b["keys"] if key not in a["keys"]],
        "data": sorted({*a["data"], *b["data"]}),
        "mean_length": _weighted([np.asarray(a["mean_length"]), np.asarray(b["mean_length"])], counts).tolist(),
        "completeness": completeness,
        "versions": b["versions"] | {n: _either(v, b["versions"].get(n, v)) for n, v in a["versions"].items()},
    }


def _either(a: str, b: str) -> str:
    return a if a == b else f"{a}, {b}"


def _weighted(pair: Sequence[Any], counts: Sequence[int]) -> Any:
    return (counts[0] * pair[0] + counts[1] * pair[1]) / sum(counts)


def _shapes(values: Gates) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}


def _equal(a: Gates | None, b: Gates | None) -> bool:
    a, b = a or {}, b or {}
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
