"""Looks at a model layer by layer, compares the scores of several tasks, and sweeps over criteria, seeds and budgets.

Scores are compared kind by kind: one head costs as much as many neurons, so their scores have no common scale.

A sweep scores once per task, criterion and seed. Its results are written after every combination, so a sweep that was
killed resumes, to the same bits. If all layers keep the same fraction, pruned models are tested as they would be saved:
few widths occur, each is compiled once. If all units compete, every model has its own widths; then the dense model is
tested with closed gates, which computes the same.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations as pairs_of
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checkpoints.files import differences, file_stem, read_json, write_atomic
from jaxprune.checkpoints.gates import kept_units
from jaxprune.checkpoints.tensors import is_sealed, model_digest, sealed, versions
from jaxprune.compaction import compact
from jaxprune.data.batches import digest_rows
from jaxprune.data.tasks import Rows, Task
from jaxprune.evaluation.evaluate import Evaluation, evaluate, fitting_head
from jaxprune.models import Model, order_sites
from jaxprune.models.cost import Length, cache, elements, matmul_flops, parameters, unit_costs, usual_length
from jaxprune.pruning.budgets import NAMES, Flops, Rules
from jaxprune.pruning.prune import Watch, score_once
from jaxprune.pruning.selection import check_record, check_selection, select, select_units, settings_of
from jaxprune.scoring.attribution import Criterion
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import Scores, check_scores, describe
from jaxprune.scoring.stability import FRACTIONS, chance, jaccard, joined, spearman
from jaxprune.units import KINDS, UNITS, Gates, Intervention, Params, Site, sites, widths


class Group(NamedTuple):
    """Units that are compared with one another: those of one kind, of one layer or of all."""

    layer: str | None  # "3" or "decoder 3"; None: all layers
    kind: str
    sites: tuple[str, ...]


def compare(scores: Mapping[str, Scores], fractions: Sequence[float] = FRACTIONS) -> dict[str, Any]:
    """Compares scores of one model, pair by pair; what is returned is JSON.

    Args:
        scores: At least two, by their names, of the same sites; see `check_same_model`.
        fractions: Of the units that are kept, for the overlap; as a budget of `Units` keeps them.

    Returns:
        `fractions`; `groups`: per layer and kind, then per kind for all layers (`layer` is None), the number of units
        and the overlap by chance at each fraction; `pairs`: the two names, and per group `spearman` and `overlap` at
        each fraction; `mean`: the same, its mean over the pairs. What is not defined is None.

    Raises:
        ValueError: If a fraction is out of range.
    """
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"fractions must lie in (0, 1], got {fraction}.")
    values = {
        name: {site: np.asarray(value, np.float64) for site, value in each.values.items()}
        for name, each in scores.items()
    }
    gates = {name: [select_units(each, fraction) for fraction in fractions] for name, each in values.items()}
    first = next(iter(values))
    groups = grouped(values[first])

    def agreement(a: str, b: str, group: Group) -> dict[str, Any]:
        overlap = [jaccard(*pair, group.sites) for pair in zip(gates[a], gates[b], strict=True)]
        return {"spearman": spearman(*(joined(values[name], group.sites) for name in (a, b))), "overlap": overlap}

    def by_chance(group: Group) -> dict[str, Any]:
        units = {site: len(values[first][site]) for site in group.sites}
        counts = [[(units[site], int(np.asarray(each[site]).sum())) for site in group.sites] for each in gates[first]]
        return {"units": sum(units.values()), "chance": list(map(chance, counts))}

    pairs = [{"names": [a, b], "groups": [agreement(a, b, group) for group in groups]} for a, b in pairs_of(values, 2)]
    by_group = list(zip(*(pair["groups"] for pair in pairs), strict=True))
    return {
        "fractions": list(fractions),
        "groups": [{"layer": group.layer, "kind": group.kind, **by_chance(group)} for group in groups],
        "pairs": pairs,
        "mean": [
            {
                "spearman": _mean_of(each["spearman"] for each in results),
                "overlap": [_mean_of(column) for column in zip(*(each["overlap"] for each in results), strict=True)],
            }
            for results in by_group
        ],
    }


def grouped(values: Mapping[str, Any]) -> list[Group]:
    """The groups of some sites: layer by layer, heads before neurons, and then each kind of all layers.

    Heads of self- and of cross-attention in one layer of a decoder count together.
    """
    sites = order_sites(values)
    layers = [*dict.fromkeys(site.layer_name for site in sites), None]
    groups = [
        Group(
            layer if layer is None else layer.replace(".", " "),
            kind,
            tuple(site.name for site in sites if site.kind == kind and layer in (None, site.layer_name)),
        )
        for layer in layers
        for kind in UNITS
    ]
    return [group for group in groups if group.sites]


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


class SiteUnits(NamedTuple):
    """The units of a site."""

    site: Site
    had: int  # before pruning
    left: np.ndarray  # indices of those that stay, among those it had
    scores: np.ndarray | None  # of those that stay


def inspect(
    model: Model, params: Params, *, pruning: Mapping[str, Any] | None = None, scores: Scores | None = None
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Counts what a model has in every layer; needs neither a tokenizer nor data.

    Args:
        model: The model, pruned or not.
        params: Its parameters.
        pruning: The record of its pruning, if it was pruned.
        scores: Scores of this model, or of the one that it was pruned from.

    Returns:
        A record of plain values: `layers` and `total`, each with the units of every kind as `[those that stay, those it
        had]` (channels only where the scores or the record name some), the parameters of heads and neurons, their share
        of the FLOPs of all layers, and with scores the means by kind and the share of all scores, by size. And by kind
        per layer the ranks in [0, 1] of the units it had, among all of the kind; 1 without scores, NaN if removed.

    Raises:
        ValueError: If the scores belong to another model, or the record does not fit the parameters.
    """
    recorded = {} if pruning is None else pruning.get("sites", {})
    check_record(pruning or {})
    named = {name.rpartition(".")[2] for name in (*recorded, *({} if scores is None else scores.values))}
    named |= {site.kind for site in sites(model.axes, params)}
    kinds = tuple(kind for kind in KINDS if kind in named)
    units = _units(model, params, pruning, scores, kinds)
    length = _length(model, pruning, scores)
    flops = unit_costs(model, params, matmul_flops(model, length))  # those of channels are their heads'
    sizes = unit_costs(model, params, elements)

    def cost(group: Sequence[SiteUnits], costs: Mapping[str, float]) -> float:
        return sum(len(each.left) * costs.get(each.site.name, 0.0) for each in group)

    def size(group: Sequence[SiteUnits]) -> float:
        return sum(float(np.abs(each.scores).sum()) for each in group if each.scores is not None)

    total_flops, total_size = cost(units, flops), size(units)

    def row(name: str, group: Sequence[SiteUnits]) -> dict[str, Any]:
        by_kind = {kind: [each for each in group if each.site.kind == kind] for kind in kinds}
        return {
            "layer": name,
            **{kind: [sum(len(x.left) for x in each), sum(x.had for x in each)] for kind, each in by_kind.items()},
            "parameters": round(cost(group, sizes)),
            "flops_share": cost(group, flops) / total_flops if total_flops else None,
            "mean_scores": {kind: _mean(each) for kind, each in by_kind.items()},
            "score_share": size(group) / total_size if total_size else None,
        }

    names = dict.fromkeys(each.site.layer_name for each in units)
    layers = {name: [each for each in units if each.site.layer_name == name] for name in names}
    record = {
        "flops": total_flops,
        **({"cache": cache(model, params)} if model.causal else {}),
        "length": length,
        "kinds": list(kinds),
        "layers": [row(name.replace(".", " "), group) for name, group in layers.items()],
        "total": row("all", units),
    }
    return record, {kind: _ranks(list(layers.values()), kind) for kind in kinds}


def _units(
    model: Model, params: Params, pruning: Mapping[str, Any] | None, scores: Scores | None, kinds: Sequence[str]
) -> list[SiteUnits]:
    """The units of every site of some kinds, with their scores."""
    values: Mapping[str, Any] = {} if scores is None else scores.values
    recorded, made_with = {}, None
    if pruning is not None:
        recorded, about = pruning.get("sites", {}), pruning.get("scores")
        made_with = about.get("model") if isinstance(about, Mapping) else None
    of_dense = scores is not None and made_with is not None and scores.header["model"] == made_with
    if scores is not None and not of_dense:
        check_scores(model, params, scores)
    units, width = [], widths(model.axes, params, kinds)
    for site in sites(model.axes, params, kinds):
        here, stored = width[site.name], recorded.get(site.name)
        had, left = (here, np.arange(here)) if stored is None else kept_units(site.name, stored)
        value = None if site.name not in values else np.asarray(values[site.name], np.float64)
        if len(left) != here or (of_dense and value is not None and len(value) != had):
            raise ValueError(
                f"{site.name} has {here} units, but pruning.json or the scores say {len(left)} of {had}: "
                "the files of the model are not of one save."
            )
        units.append(SiteUnits(site, had, left, value[left] if of_dense and value is not None else value))
    return units


def _length(model: Model, pruning: Mapping[str, Any] | None, scores: Scores | None) -> Length:
    """Tokens per example: as scored, as pruned for, or the usual number."""
    pruned = None if pruning is None else pruning.get("settings", {}).get("length")
    return (scores.header["mean_length"] if scores is not None else pruned) or usual_length(model)


def _mean(units: Sequence[SiteUnits]) -> float | None:
    values = [each.scores for each in units if each.scores is not None and each.scores.size]
    return float(np.concatenate(values).mean()) if values else None


def _ranks(layers: Sequence[Sequence[SiteUnits]], kind: str) -> list[np.ndarray]:
    """Per layer the ranks of the units it had among all of the kind."""
    of_kind = [[each for each in group if each.site.kind == kind] for group in layers]
    scores = [each.scores for group in of_kind for each in group if each.scores is not None]
    ordered = np.sort(np.concatenate(scores)) if scores else np.zeros(0)
    ranks = []
    for group in of_kind:
        strips = [np.full(each.had, np.nan) for each in group]
        for strip, each in zip(strips, group, strict=True):
            places = None if each.scores is None else np.searchsorted(ordered, each.scores)
            strip[each.left] = 1.0 if places is None else places / max(len(ordered) - 1, 1)
        ranks.append(np.concatenate(strips) if strips else np.zeros(0))
    return ranks


RESULTS = "results.json"
TABLE = "results.csv"
SCORES = "scores"  # the folder of the score files


@dataclass(frozen=True, kw_only=True)
class Sweeping:
    """The settings of a sweep; see `sweep`."""

    criteria: Mapping[str, Criterion]  # by their names in the results
    budgets: Sequence[float]  # fractions of the FLOPs that may stay
    seeds: int = 3  # draws of the calibration rows; criteria that no seed changes have one
    examples: int = 128  # calibration rows to score with
    length: Length | None = None  # tokens of an example; None: the mean of those scored
    rules: Rules = Rules()  # how units are chosen within a budget; criteria that rank layers let all layers compete
    rows: Rows = Rows(split="test")  # what is tested; choices belong to `dev`
    head: str | None = None

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}.")


class Combination(NamedTuple):
    """One task to prune for, one criterion, one draw of its rows and one budget."""

    task: str
    criterion: str
    seed: int
    flops: float  # fraction of the FLOPs that may stay


def combinations(tasks: Iterable[str], sweeping: Sweeping) -> list[Combination]:
    """All combinations in the order of the results."""
    return [
        Combination(task, name, seed, budget)
        for task in tasks
        for name, criterion in sweeping.criteria.items()
        for seed in range(sweeping.seeds if criterion.seeded else 1)
        for budget in sweeping.budgets
    ]


def sweep(
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    sweeping: Sweeping,
    folder: Path,
    *,
    about: Mapping[str, Any] | None = None,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a model in every combination, tests it, and writes the results as JSON and as a table.

    Args:
        model: The architecture.
        params: The dense parameters.
        tasks: What to prune for; every task is also what is tested.
        sweeping: What is compared.
        folder: Folder for the results. A sweep with the same settings that is there resumes.
        about: What the results say beside their settings, such as the name of the model.
        watch: Shows the progress.

    Returns:
        What the JSON file holds: the settings, and one row per combination.

    Raises:
        ValueError: If a setting is wrong, or the folder holds another sweep; the error says what differs.
    """
    stems = {task.name: file_stem(task.name) for task in tasks}
    if len(set(stems.values())) < len(tasks):
        given = ", ".join(task.name for task in tasks)
        raise ValueError(f"tasks must differ in their names, in those of files too; got {given}.")
    for task in tasks:
        task.rows(sweeping.rows.split or "test")
        fitting_head(model, task, sweeping.head)
    plan = combinations(stems, sweeping)
    head = {"command": "sweep", **(about or {}), "settings": _settings(model, params, tasks, sweeping)}
    results = _Results.open(folder, head, plan)
    bar = watch.open("sweeping")
    bar(len(results.rows), len(plan))

    def test(
        params: Params, task: Task, what: str, scores: Scores | None = None, gates: Gates | None = None
    ) -> Evaluation:
        rows, closed = sweeping.rows, Intervention()
        if scores is not None:
            rows = replace(rows, exclude=scores.rows)
            closed = Intervention(gates, scores.means) if gates is not None else closed

        def progress(done: int, total: int) -> None:
            bar(len(results.rows), len(plan), f"{task.name}, {what}, batch {done} of {total}")

        return evaluate(model, params, task, rows=rows, head=sweeping.head, intervention=closed, progress=progress)

    for task in tasks:
        missing = [one for one in plan if one.task == task.name and one not in results.rows]
        dense = test(params, task, "dense") if missing else None
        for name, seed in dict.fromkeys((one.criterion, one.seed) for one in missing):
            criterion, rows = (
                sweeping.criteria[name],
                replace(sweeping.rows, split=None, examples=sweeping.examples, key=seed),
            )
            scoring = Scoring(criterion=criterion, rows=rows, head=sweeping.head)
            file = folder / SCORES / f"{stems[task.name]}.{name}.{seed}.safetensors"
            scores = score_once(model, params, task, scoring, file, watch)
            rules = sweeping.rules if criterion.by_layer else replace(sweeping.rules, allocation="global")
            rules = rules.decided(scores.properties)
            length = scores.header["mean_length"] if sweeping.length is None else sweeping.length
            for one in (one for one in missing if (one.criterion, one.seed) == (name, seed)):
                gates, what = (
                    select(model, params, scores, Flops(one.flops, length=length), rules=rules),
                    f"{name}, seed {seed}",
                )
                if rules.allocation == "per_layer":
                    result = test(compact(model, params, gates, scores.means), task, what, scores)
                else:
                    result = test(params, task, what, scores, gates)
                results.add(one, {**fractions_left(model, params, gates, length), **_measured(result, dense)})
                bar(len(results.rows), len(plan))
    return results.record()


def check_budgets(model: Model, params: Params, sweeping: Sweeping) -> None:
    """Refuses budgets that cannot be reached, before any row is read."""
    for budget in sweeping.budgets:
        check_selection(
            model, params, Flops(budget, length=sweeping.length), sweeping.rules, widths(model.axes, params)
        )


def fractions_left(model: Model, params: Params, gates: Gates, length: Length) -> dict[str, float]:
    """The fractions of FLOPs, units and parameters (embeddings included) that a compacted model would have."""
    had = {name: len(gate) for name, gate in gates.items()}
    left = {name: int(np.count_nonzero(np.asarray(gate))) for name, gate in gates.items()}

    def total(costs: Mapping[str, float], units: Mapping[str, int]) -> float:
        return sum(costs[name] * units[name] for name in had)

    flops, sizes = (unit_costs(model, params, measure, KINDS) for measure in (matmul_flops(model, length), elements))
    every = parameters(params)
    return {
        "flops_kept": total(flops, left) / total(flops, had),
        "units_kept": sum(left.values()) / sum(had.values()),
        "parameters_kept": (every - total(sizes, had) + total(sizes, left)) / every,
    }


def _measured(result: Evaluation, dense: Evaluation | None) -> dict[str, Any]:
    metric, value = result.primary
    facts = {"metric": metric, "value": value, "n": result.n, "chance": result.chance}
    return facts | {"dense": None if dense is None else dense[metric]}


def _settings(model: Model, params: Params, tasks: Sequence[Task], sweeping: Sweeping) -> dict[str, Any]:
    """All that the results depend on, as JSON holds it."""
    rows, rules = sweeping.rows, sweeping.rules.decided(None)
    split = rows.split or "test"
    return {
        "model": model_digest(model, params),
        "tasks": {
            task.name: {
                "head": fitting_head(model, task, sweeping.head),
                "calibration": digest_rows(model, task, Rows(max_length=rows.max_length)),
                split: digest_rows(model, task, rows, split),
            }
            for task in tasks
        },
        "criteria": {name: describe(criterion) for name, criterion in sweeping.criteria.items()},
        "selection": dict.fromkeys(NAMES) | settings_of(None, rules) | {"length": sweeping.length},
        "split": split,
        "limit": rows.examples,
        "batch_size": rows.batch_size,
        "max_length": rows.max_length,
        "versions": versions(),
        "budgets": list(sweeping.budgets),
        "seeds": sweeping.seeds,
        "examples": sweeping.examples,
    }


@dataclass(frozen=True)
class _Results:
    """The results so far, and the files that hold them."""

    folder: Path
    head: Mapping[str, Any]  # what the files say beside the rows
    plan: Sequence[Combination]
    rows: dict[Combination, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, head: Mapping[str, Any], plan: Sequence[Combination]) -> _Results:
        """The results of an earlier run with the same settings, or none.

        Raises:
            ValueError: If the folder holds something else.
        """
        file, head = folder / RESULTS, json.loads(json.dumps(head))
        results = cls(folder, head, plan)
        if not file.exists():
            return results
        earlier = read_json(file)
        if earlier.get("command") != "sweep" or not isinstance(earlier.get("settings"), dict):
            raise ValueError(f"{file} holds no sweep: choose another folder.")
        if other := differences(earlier["settings"], head["settings"]):
            raise ValueError(f"{folder} holds another sweep: {other}. Choose another folder.")
        if not is_sealed(earlier, {}):
            raise ValueError(f"{file} was edited or is damaged, its checksum is another: remove it to start again.")
        try:
            results.rows.update(
                {Combination(*(row[name] for name in Combination._fields)): row for row in earlier["rows"]}
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): remove it to start again.") from error
        return results

    def add(self, one: Combination, facts: Mapping[str, Any]) -> None:
        """Writes one more row to the files, which afterwards are the old ones or the new ones."""
        self.rows[one] = {**one._asdict(), **facts}
        record, table = self.record(), io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[one]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(record["rows"])
        write_atomic(self.folder / TABLE, table.getvalue().encode())
        text = json.dumps(sealed(record, {}), indent=1, allow_nan=False) + "\n"
        write_atomic(self.folder / RESULTS, text.encode())

    def record(self) -> dict[str, Any]:
        """The content of the JSON file: rows in the order of the plan."""
        return {**self.head, "rows": [self.rows[one] for one in self.plan if one in self.rows]}
