"""Rounds keep the laws of one round, say which units of the dense model stay, and go on where they were stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import chosen
from commands import Place, place, record_of, run, write_rows
from test_likelihood import ANSWERS
from test_selection import kept, random_scores
from tiny import tiny_batch, tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import read_pruning, recorded_gates
from jaxprune.checkpoints.tensors import model_digest, params_digest
from jaxprune.cli.options import RowOptions
from jaxprune.cli.pruning import PruneCommand
from jaxprune.compaction import compact
from jaxprune.data.tasks import Rows, load_task
from jaxprune.models import Model
from jaxprune.models.cost import memory
from jaxprune.pruning.budgets import Budget, Flops, Latency, Memory, Rules, Units
from jaxprune.pruning.prune import Pruning, geometric, prune, prune_in_rounds, units_left
from jaxprune.pruning.recoveries import BiasCompensation, Recovery
from jaxprune.pruning.selection import Values, per_layer_l2, select
from jaxprune.scoring.attribution import GradientActivation
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import Scores, load_scores
from jaxprune.units import Params, flatten, open_gates, widths

__all__ = ["place"]  # a fixture

QUICK = ("--criterion", "magnitude", "--no-evaluate", "--measure", "0", "--recover", "none")
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multiples": {"multiple_of": {"neurons": 8}},
    "floors": {"floor": {"heads": 2, "neurons": 3}, "multiple_of": {"neurons": 4}},
    "protected": {"protect": (0,)},
}


@pytest.fixture(scope="module", params=["bert", "t5"])
def dense(request: pytest.FixtureRequest) -> tuple[Model, Params]:
    return tiny_model(request.param, neurons=30)


def at(model: Model, budget: str, fraction: float) -> dict[str, Any]:
    """A budget as `select` takes it; a text-to-text model has two lengths."""
    return {budget: fraction} | (
        {"length": (11.5, 3.0) if len(model.stacks) > 1 else 11.5} if budget == "flops" else {}
    )


def anew(model: Model, seed: int) -> Callable[[Params], Values]:
    """Other scores in every round."""
    counts = iter(range(1000 * seed, 1000 * (seed + 1)))
    return lambda small: random_scores(model, small, next(counts))


def assert_same(one: Params, other: Params) -> None:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(np.asarray(other[path]), np.asarray(array), err_msg=str(path))


# the mathematics


def test_budgets_fall_by_the_same_share():
    assert geometric(3, 0.125) == (0.5, 0.25, 0.125)
    assert geometric(1, 0.3) == (0.3,) and geometric(7, 0.3)[-1] == 0.3
    np.testing.assert_allclose(geometric(2, 40.0, 1000.0), (200.0, 40.0), rtol=1e-12)


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_one_round_is_select_and_compact(dense, allocation):
    model, params = dense
    scores = random_scores(model, params, 0)
    rules = {**at(model, "flops", 0.4), "allocation": allocation, "normalise": per_layer_l2}
    (only,) = prune_in_rounds(model, params, lambda _: scores, rounds=1, **chosen(**rules))
    gates = select(model, params, scores, **chosen(**rules))
    assert only.gates.keys() == gates.keys()
    for name, gate in gates.items():
        np.testing.assert_array_equal(only.gates[name], gate)
    assert_same(only.params, compact(model, params, gates))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("budget", ["units", "parameters", "flops"])
def test_rounds_give_the_widths_of_one_round(dense, budget, rules):
    """The sites where only the budget decides how many units stay."""
    model, params = dense
    settings = {**at(model, budget, 0.55), **RULES[rules]}
    wanted = {
        n: int(g.sum()) for n, g in select(model, params, random_scores(model, params, 9), **chosen(**settings)).items()
    }
    for rounds in (2, 5):
        *_, last = prune_in_rounds(model, params, anew(model, rounds), rounds=rounds, **chosen(**settings))
        assert {name: int(gate.sum()) for name, gate in last.gates.items()} == wanted


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("budget", ["units", "parameters", "flops"])
def test_rounds_stay_within_the_budget_and_short_of_it_by_less_than_a_block(dense, budget, rules):
    model, params = dense
    settings = {**at(model, budget, 0.55), **RULES[rules], "allocation": "global"}
    multiple, floor, whole = (RULES[rules].get(name, {}) for name in ("multiple_of", "floor", "protect"))
    costs = chosen(**settings)["budget"].unit_costs(model, params)
    for seed in range(5):
        for found in prune_in_rounds(model, params, anew(model, seed), rounds=4, **chosen(**settings)):
            total = sum(len(gate) * costs[name] for name, gate in found.gates.items())
            spent = sum(int(gate.sum()) * costs[name] for name, gate in found.gates.items())
            largest = max(costs[name] * multiple.get(name.rpartition(".")[2], 1) for name in found.gates)
            assert found.budget - largest / total < spent / total <= found.budget + 1e-9
            if budget == "units" and not multiple:
                assert spent == int(found.budget * total + 1e-9)
            for name, gate in found.gates.items():
                own, kind = int(gate.sum()), name.rpartition(".")[2]
                assert own == len(gate) or own % multiple.get(kind, 1) == 0
                assert own == len(gate) or (own >= floor.get(kind, 0) and not (whole and "0." in name))


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_gates_are_of_the_units_of_the_dense_model(dense, allocation):
    model, params = dense
    before = open_gates(model, params)
    for found in prune_in_rounds(
        model, params, anew(model, 3), Units(0.2), rules=Rules(allocation=allocation), rounds=9
    ):
        assert_same(found.params, compact(model, params, found.gates))
        for name, gate in found.gates.items():
            assert set(kept(found.gates)[name]) <= set(kept(before)[name])  # what is gone stays away
            assert set(np.unique(gate)) <= {0.0, 1.0} and gate.dtype == np.float32
        before = found.gates


@pytest.mark.parametrize("kinds", [("heads", "neurons"), ("channels", "query_channels", "neurons")])
@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_scores_that_do_not_change_select_what_one_round_selects(dense, allocation, kinds):
    model, params = dense
    random = np.random.default_rng(0)
    scores = {name: random.standard_normal(n) for name, n in widths(model.axes, params, kinds).items()}
    name = "encoder.0.ffn.neurons" if len(model.stacks) > 1 else "0.ffn.neurons"
    scores[name] -= 10.0  # all of it goes where all compete, in the first round
    settings = {**at(model, "parameters", 0.3), "allocation": allocation}
    left: dict[str, Any] = {}
    for found in prune_in_rounds(model, params, lambda _: units_left(scores, left), rounds=4, **chosen(**settings)):
        left.update(found.gates)
    assert allocation == "per_layer" or not left[name].any()
    assert kept(left) == kept(select(model, params, scores, **chosen(**settings)))
    assert_same(found.params, compact(model, params, left))


def test_sites_without_scores_stay_whole(dense):
    model, params = dense

    def neurons(small: Params) -> Values:
        return {n: v for n, v in random_scores(model, small, len(flatten(small))).items() if n.endswith("neurons")}

    *_, last = prune_in_rounds(model, params, neurons, Units(0.6), rules=Rules(normalise=per_layer_l2), rounds=3)
    assert all(gate.all() for name, gate in last.gates.items() if name.endswith("heads"))
    assert not all(gate.all() for gate in last.gates.values())


def test_units_that_are_gone_belong_to_no_norm(dense):
    """Scores of a site that are divided by their norm are those of the units that are left."""
    model, params = dense
    seen = []

    def normalise(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append({name: len(value) for name, value in scores.items()})
        return per_layer_l2(scores)

    steps = prune_in_rounds(model, params, anew(model, 0), Units(0.5), rules=Rules(normalise=normalise), rounds=3)
    left = [widths(model.axes, params), *(widths(model.axes, found.params) for found in steps)]
    assert seen == left[:3]


def test_memory_in_bytes_begins_with_all_of_it(dense):
    model, params = dense
    whole = memory(params)
    found = list(prune_in_rounds(model, params, anew(model, 0), Memory(bytes=0.81 * whole), rounds=2))
    np.testing.assert_allclose([own.budget for own in found], [0.9 * whole, 0.81 * whole])
    assert [memory(own.params) <= own.budget for own in found] == [True, True]


def test_any_round_may_be_gone_on_from(dense):
    model, params = dense

    def score(small: Params) -> Values:
        return random_scores(model, small, sum(widths(model.axes, small).values()))

    whole = list(prune_in_rounds(model, params, score, Units(0.3), rounds=3))
    assert [found.number for found in whole] == [1, 2, 3]
    for after in whole:
        rest = list(prune_in_rounds(model, params, score, Units(0.3), rounds=3, after=after))
        assert [found.number for found in rest] == [found.number for found in whole[after.number :]]
        for one, other in zip(whole[after.number :], rest, strict=True):
            assert_same(one.params, other.params)


def test_every_round_is_repaired(dense):
    model, params = dense
    seen: list[Params] = []

    def halve(small: Params) -> tuple[Params, Any]:
        seen.append(small)
        return jax.tree.map(lambda array: array / 2, small), len(seen)

    found = list(prune_in_rounds(model, params, anew(model, 0), Units(0.5), rounds=2, repair=halve))
    assert [own.recovery for own in found] == [1, 2]
    assert_same(seen[0], compact(model, params, found[0].gates))
    quarter = jax.tree.map(lambda array: array / 4, compact(model, params, found[1].gates))
    assert_same(found[1].params, quarter)  # halves are exact


def test_units_are_replaced_by_the_means_of_the_round_in_which_they_went():
    model, params = tiny_model()
    random = np.random.default_rng(0)
    means: dict[int, dict[str, Any]] = {}

    def score(small: Params) -> Scores:
        found = {name: random.standard_normal((n, 4) if "heads" in name else n) for name, n in sizes(small).items()}
        own = {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
        means[len(means)] = own
        return Scores(random_scores(model, small, len(means)), {}, own)  # pyright: ignore[reportArgumentType]

    def sizes(small: Params) -> dict[str, int]:
        return widths(model.axes, small)

    first, last = prune_in_rounds(model, params, score, Units(0.4), rounds=2)
    went: dict[str, Any] = {name: np.array(value) for name, value in means[0].items()}  # those that stay do not count
    for name, value in means[1].items():
        went[name][np.flatnonzero(first.gates[name])] = value
    batch = tiny_batch(model)
    wanted = np.asarray(model.apply(params, batch, last.gates, means=went).logits)
    found = np.asarray(model.apply(last.params, batch).logits)
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # sums in another order


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rounds": 0, "units": 0.5}, ValueError, "rounds must be at least 1, got 0"),
        ({"rounds": True, "units": 0.5}, TypeError, "rounds must be a whole number, got True"),
        ({"rounds": 2, "latency": 0.5}, ValueError, "a budget of latency is met in one round"),
        ({"rounds": 2, "latency_seconds": 0.5}, ValueError, "a budget of latency is met in one round"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_scored(dense, settings, error, message):
    def never(_: Params) -> Values:
        raise AssertionError

    with pytest.raises(error, match=message):
        prune_in_rounds(dense[0], dense[1], never, **chosen(**settings), rounds=settings["rounds"])


def test_scores_must_be_of_what_is_left(dense):
    model, params = dense
    scores = random_scores(model, params, 0)
    steps = prune_in_rounds(model, params, lambda _: scores, Units(0.5), rounds=2)
    next(steps)
    with pytest.raises(ValueError, match="Score this model first"):
        next(steps)


# the command


class Silent:
    """A watch that remembers, and stops a command at a line as Ctrl-C does."""

    def __init__(self, stop: str = "nowhere"):
        self.stop, self.labels = stop, []

    def open(self, label: str) -> Callable[..., None]:
        self.say(label)
        return lambda done, total, note="": None

    def say(self, message: Any) -> None:
        self.labels.append(str(message))
        if self.stop in self.labels[-1]:
            raise KeyboardInterrupt


SCORING = Scoring(criterion=GradientActivation(), rows=Rows(examples=16, batch_size=8))
THIRD = Flops(0.3)


def commanded(
    place: Place, output: Path, watch: Silent, budget: Budget = THIRD, overwrite: bool = False, **changes: Any
) -> dict[str, Any]:
    settings = {
        "scoring": SCORING,
        "rules": Rules(multiple_of={"neurons": 2}),
        "recovery": Recovery(rows=Rows(examples=24)),
        "rounds": 3,
        "recover_each_round": True,
    }
    job = PruneCommand(str(place.model), output, (), Rows(split="test", examples=10), (), overwrite)
    return job.run(budget, Pruning(**settings | changes), lambda _: [load_task("mood", data=place.data)], watch)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(place: Place) -> tuple[Path, dict[str, Any]]:
    output = place.folder / "whole"
    return output, commanded(place, output, Silent())


def test_one_round_in_the_command_is_none(place, tmp_path):
    rows = ("--task", "mood", "--data", place.data, *QUICK, "--flops", 0.4)
    for name, more in {"plain": (), "one": ("--rounds", 1)}.items():
        record = record_of("prune", place.model, *rows, *more, "-o", tmp_path / name)
        assert "rounds" not in record
    assert contents(tmp_path / "plain") == contents(tmp_path / "one")
    assert (tmp_path / "plain.scores.safetensors").read_bytes() == (tmp_path / "one.scores.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "finished"),
    [
        ("round 2 of 3, scoring mood", 1),
        ("round 2 of 3, recovering", 1),
        ("round 3 of 3, scoring mood", 2),
        ("round 3 of 3: ", 2),
        ("testing after", 2),
    ],
)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(place, whole, tmp_path, stop, finished):
    out, rest = tmp_path / "small", tmp_path / "small.rounds"
    with pytest.raises(KeyboardInterrupt):
        commanded(place, out, Silent(stop))
    assert not out.exists() and rest.is_dir()
    model, left = load(rest, dtype=None)
    found = read_pruning(rest)
    assert len(found["rounds"]) == finished
    assert widths(model.axes, left) == {name: int(gate.sum()) for name, gate in recorded_gates(found).items()}

    watch = Silent()
    commanded(place, out, watch)
    assert f"round {finished} of 3: {rest}, of an earlier run with the same settings" in watch.labels
    assert not any(label.startswith(f"round {finished} of 3, ") for label in watch.labels)
    assert contents(out) == contents(whole[0])
    assert {entry.name for entry in tmp_path.iterdir()} == {"small", "small.scores.safetensors"}


def test_rounds_that_were_edited_are_refused(place, tmp_path):
    out, rest = tmp_path / "small", tmp_path / "small.rounds"
    with pytest.raises(KeyboardInterrupt):
        commanded(place, out, Silent("round 2 of 3, recovering"))
    record = json.loads((rest / "pruning.json").read_text())
    first = record["rounds"][0]
    edits: list[tuple[dict[str, Any], str]] = [
        ({"rounds": [first | {"budget": 0.9}]}, "checksum"),
        ({"rounds": [first, first, first]}, "checksum"),
        ({"rounds": [{}]}, r"rounds\[0\].round is missing"),
        ({"rounds": 5}, "rounds is 5, expected a list"),
        ({"checksum": None}, "checksum is None"),
    ]
    for changes, message in edits:
        (rest / "pruning.json").write_text(json.dumps(record | changes))
        with pytest.raises(ValueError, match=rf"small\.rounds is damaged \(.*{message}"):
            commanded(place, out, Silent())
    for text, message in (('{"run": {}, "run": {}}', "names twice"), ('{"run": {"a": NaN}}', "NaN"), ("{", "not JSON")):
        (rest / "pruning.json").write_text(text)
        with pytest.raises(ValueError, match=rf"pruning\.json is damaged \(.*{message}"):
            commanded(place, out, Silent())
    (rest / "pruning.json").write_text(json.dumps(record))
    model, params = load(rest, dtype=None)
    whole = (rest / "pruning.json").read_text()
    save(rest, model, jax.tree.map(lambda array: array * 2, params), pruning=record, overwrite=True)
    (rest / "pruning.json").write_text(whole)
    with pytest.raises(ValueError, match="checksum"):
        commanded(place, out, Silent())


def test_another_command_does_not_go_on_from_it(place, whole, tmp_path):
    out = tmp_path / "small"
    with pytest.raises(KeyboardInterrupt):
        commanded(place, out, Silent("round 2 of 3, recovering"))
    others: list[tuple[str, dict[str, Any]]] = [
        ("flops", {"budget": Flops(0.4)}),
        ("rounds", {"rounds": 4}),
        ("key", {"scoring": Scoring(criterion=GradientActivation(), rows=Rows(examples=16, batch_size=8, key=1))}),
        ("recovery", {"recovery": None, "recover_each_round": False}),
    ]
    for name, changes in others:
        with pytest.raises(ValueError, match=rf"small\.rounds was begun with other settings \((.*; )?{name}"):
            commanded(place, out, Silent(), **changes)
    watch = Silent()
    commanded(place, out, watch, overwrite=True)  # the same command goes on nevertheless
    assert any("round 1 of 3: " in label and "earlier" in label for label in watch.labels)
    assert contents(out) == contents(whole[0])
    with pytest.raises(KeyboardInterrupt):
        commanded(place, out, Silent("round 2 of 3, recovering"), overwrite=True)
    watch = Silent("round 1 of 2: ")
    with pytest.raises(KeyboardInterrupt):
        commanded(
            place, out, watch, overwrite=True, recovery=None, recover_each_round=False, rounds=2
        )  # another one starts anew
    assert not any("small.rounds" in label for label in watch.labels)
    assert not (tmp_path / "small.rounds").exists() and contents(out) == contents(whole[0])


def test_a_folder_that_is_in_the_way_is_refused(place, tmp_path):
    model, params = load(place.model)
    save(tmp_path / "small.rounds", model, params)
    (tmp_path / "other.rounds").mkdir()
    (tmp_path / "other.rounds" / "mine").touch()
    for name, message in {
        "small": "in.*rounds is a model and not",
        "other": "not a folder that jaxprune saved",
    }.items():
        with pytest.raises(FileExistsError, match=message):
            commanded(place, tmp_path / name, Silent(), overwrite=True)
    assert load(tmp_path / "small.rounds") and (tmp_path / "other.rounds" / "mine").exists()


def test_the_record_names_the_rounds(place, whole):
    out, record = whole
    rounds = record["rounds"]
    pruning = read_pruning(out)
    assert pruning["rounds"] == json.loads(json.dumps(rounds)) and "run" not in pruning
    assert [own["round"] for own in rounds] == [1, 2, 3]
    assert [own["budget"] for own in rounds] == list(geometric(3, 0.3))
    assert all(own["kept"]["flops"] <= own["budget"] for own in rounds)
    assert rounds[-1]["units"] == record["after"]["units"] and record["kept"]["flops"] == rounds[-1]["kept"]["flops"]
    assert record["recovery"] == rounds[-1]["recovery"] and all(own["recovery"]["modules"] for own in rounds)
    assert record["selection"]["rounds"] == 3 and record["selection"]["flops"] == 0.3
    model, params = load(place.model)
    scores = load_scores(record["scores"])  # those of the dense model serve other budgets, as always
    assert scores.header["model"] == rounds[0]["model"] == model_digest(model, params)
    assert rounds[0]["scores"] == pruning["digests"]["scores"] == params_digest(dict(scores.values))
    assert len({own["model"] for own in rounds}) == len({own["scores"] for own in rounds}) == 3
    gates = recorded_gates(pruning)
    assert pruning["digests"]["gates"] == rounds[-1]["gates"] == params_digest(gates)
    assert widths(model.axes, load(out)[1]) == {name: int(gate.sum()) for name, gate in gates.items()}
    card = (out / "README.md").read_text()
    assert "## Rounds" in card and f"| 2 | {rounds[1]['budget']} | {rounds[1]['units']} |" in card
    assert "rounds 3" in card and "repaired after each" in " ".join(card.split())
    assert run("inspect", out, "--scores", record["scores"]).exit_code == 0


def test_the_recorded_gates_make_the_model_that_was_not_repaired(place, tmp_path):
    rows = ("--task", "mood", "--data", place.data, *QUICK)
    record_of(
        "prune", place.model, *rows, "--units", 0.4, "--allocation=global", "--rounds", 2, "-o", tmp_path / "small"
    )
    model, params = load(place.model)
    assert_same(load(tmp_path / "small")[1], compact(model, params, recorded_gates(read_pruning(tmp_path / "small"))))


def test_repaired_once_in_the_end(place, tmp_path):
    rows = ("--task", "mood", "--data", place.data, "--limit", 10, "--measure", "0", "--batch-size", 8)
    how = ("--criterion", "gradient-activation", "--examples", 16, "--flops", 0.3, "--multiple-of", "neurons=2")
    mended = ("--recover", "reconstruct", "--recover-examples", 24, "--rounds", 3)
    result = run("prune", place.model, *rows, *how, *mended, "-o", tmp_path / "small")
    assert result.exit_code == 0, result.stderr
    found = read_pruning(tmp_path / "small")
    counts = [own["units"] for own in found["rounds"]]
    stderr, stdout = (" ".join(text.split()) for text in (result.stderr, result.stdout))
    for number in (1, 2, 3):
        assert f"round {number} of 3, scoring mood: 2 of 2" in stderr
        assert f"round {number} of 3: {counts[number - 1]} units are left" in stderr
    assert stderr.count("recovering: ") == 1
    assert "3 rounds left {}, {} and {} units".format(*counts) in stdout and "repaired after the last" in stdout
    assert [own["recovery"] for own in found["rounds"]] == [None] * 3 and found["recovery"]["examples"] == 24


@pytest.mark.slow
def test_a_text_to_text_model_in_rounds(tmp_path):
    model, _ = tiny_model("t5", layers=1)
    save(tmp_path / "model", replace(model, source=ANSWERS), model.initialise(jax.random.key(0)))
    for i, (split, rows) in enumerate({"train": 240, "validation": 8, "test": 8}.items()):
        write_rows(tmp_path / "data" / "mood" / f"{split}.jsonl", ("bad", "good"), rows, i)
    (tmp_path / "prompt.yaml").write_text('template: "mood : {sentence} ?"\nwords: [bad, very good]\n')
    rules, scoring = Rules(multiple_of={"neurons": 8}), replace(SCORING, rows=Rows(examples=8, batch_size=8))
    pruning = Pruning(scoring=scoring, rules=rules, recovery=None, rounds=2)
    options = RowOptions(data=tmp_path / "data", prompt=str(tmp_path / "prompt.yaml"))
    source, out = str(tmp_path / "model"), tmp_path / "small"

    def command(output: Path, watch: Silent) -> dict[str, Any]:
        job = PruneCommand(source, output, (), None, (), False)
        return job.run(Flops(0.4), pruning, lambda _: [options.load("mood", watch)], watch)

    with pytest.raises(KeyboardInterrupt):
        command(out, Silent("round 2 of 2, scoring"))
    record = command(out, Silent())
    command(tmp_path / "whole", Silent())
    assert contents(out) == contents(tmp_path / "whole")
    assert record["kept"]["flops"] <= 0.4
    model, params = load(source)
    assert_same(load(out)[1], compact(model, params, recorded_gates(read_pruning(out))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rounds": 2, "report_loss": True}, "rounds make several"),
        ({"rounds": 2, "recovery": None, "recover_each_round": True}, "recover_each_round is for a recovery"),
        ({"recover_each_round": True}, "recover_each_round is for a recovery in several rounds"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**settings)


def test_what_rounds_cannot_do_is_refused_before_anything_is_scored(place):
    model, params = load(place.model)
    mood, topic = (load_task(name, data=place.data) for name in ("mood", "topic"))
    values: Any = random_scores(model, params, 0)
    rounds, scores = Pruning(rounds=2), Scores(values, {"task": "mood", "criterion": {"name": "Random"}})
    cases: list[tuple[Any, Budget, dict[str, Any], str]] = [
        ([mood, topic], Units(0.5), {}, "need one task to score in each.*2 tasks are pruned for in one"),
        (mood, Units(0.5), {"scores": scores}, "and no scores: scores are of the dense model alone"),
        (mood, Latency(0.5), {}, "a budget of latency is met in one round"),
        ([], Units(0.5), {}, "nothing to score with"),
    ]
    for tasks, budget, given, message in cases:
        with pytest.raises(ValueError, match=message):
            prune(model, params, tasks, budget, rounds, watch=Silent(""), **given)


def test_a_recovery_that_the_model_has_no_biases_for_is_refused_before_anything_is_scored(place, tmp_path):
    model, params = tiny_model("t5", layers=1)
    (tmp_path / "prompt.yaml").write_text('template: "mood : {sentence} ?"\nwords: [bad, very good]\n')
    task = RowOptions(data=place.data, prompt=str(tmp_path / "prompt.yaml")).load("mood", Silent())
    for rounds in (1, 2):
        how = Pruning(rounds=rounds, recovery=Recovery(method=BiasCompensation()))
        with pytest.raises(ValueError, match="bias"):
            prune(replace(model, source=ANSWERS), params, task, Units(0.5), how, watch=Silent(""))


def test_rounds_of_score_files_are_bad_input_in_one_line(place, whole, tmp_path):
    scores = whole[1]["scores"]
    result = run("prune", place.model, "--scores", scores, "--units", 0.5, "--rounds", 2, "-o", tmp_path / "new")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("jaxprune: error: 2 rounds need one task to score in each, and no scores")
    assert list(tmp_path.iterdir()) == []
