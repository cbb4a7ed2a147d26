"""Rank correlation and overlap as worked out by hand, chance as drawn at random, and the command that shows them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commands import Place, place, record_of, run
from tiny import tiny_model

from jaxprune.models import order_sites
from jaxprune.pruning.budgets import Units
from jaxprune.pruning.inspection import compare, grouped
from jaxprune.pruning.selection import select, select_units
from jaxprune.scoring.scores import Scores, load_scores, save_scores
from jaxprune.scoring.stability import chance, jaccard, spearman
from jaxprune.units import site_of, sites, widths

__all__ = ["place"]  # a fixture


@pytest.fixture(scope="module")
def scored(place: Place) -> dict[str, Path]:
    files = {}
    for name, task, seed in (("mood", "mood", 1), ("topic", "topic", 2), ("third", "topic", 3)):
        files[name] = place.folder / f"{name}.safetensors"
        rows = ("--task", task, "--data", place.data, "--criterion", "random", "--seed", seed, "-o", files[name])
        assert run("score", place.model, *rows).exit_code == 0
    other = load_scores(files["mood"])
    files["other"] = save_scores(
        place.folder / "other.safetensors", Scores(other.values, {**other.header, "model": "f" * 64})
    )
    heads = {name: value for name, value in other.values.items() if name.endswith("heads")}
    files["heads"] = save_scores(place.folder / "heads.safetensors", Scores(heads, other.header))
    return files


# numbers by hand


def test_rank_correlation_by_hand():
    """Differences of ranks 0, 1, -1, 0: 1 - 6 * 2 / (4 * 15) = 0.8."""
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, 0.5, 0.3, 9.0])) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, -1.0])) == -1.0


def test_equal_scores_share_their_mean_rank():
    """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4, less 2.5: products 2.25 + 0 + 0 + 2.25, squares 4.5 and 5."""
    found = spearman(np.array([0.0, 7.0, 7.0, 8.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("values", [[5.0, 5.0, 5.0], [5.0], []])
def test_scores_that_do_not_rank_have_no_correlation(values):
    a = np.array(values)
    assert spearman(a, np.arange(len(a), dtype=float)) is None
    assert spearman(np.arange(len(a), dtype=float), a) is None


def test_overlap_by_hand():
    """Site x: units 1 and 2 against 2 and 3; site y: the same unit. 1 + 1 of 3 + 1."""
    a = {"0.attention.heads": jnp.asarray([0.0, 1, 1, 0]), "1.attention.heads": jnp.asarray([1.0, 0])}
    b = {"0.attention.heads": jnp.asarray([0.0, 0, 1, 1]), "1.attention.heads": jnp.asarray([1.0, 0])}
    assert jaccard(a, b, list(a)) == 2 / 4
    assert jaccard(a, b, ["0.attention.heads"]) == 1 / 3
    closed = {name: jnp.zeros_like(gate) for name, gate in a.items()}
    assert jaccard(closed, closed, list(a)) is None


def test_chance_by_hand():
    """Two of four: none, one or two in common with probability 1/6, 4/6, 1/6; overlap 0, 1/3, 1."""
    assert chance([(4, 2)]) == pytest.approx(4 / 6 * 1 / 3 + 1 / 6)
    assert chance([(4, 4)]) == pytest.approx(1.0)
    assert chance([(4, 1), (2, 1)]) == pytest.approx(3 / 8 * (0 / 4) + (3 / 8 + 1 / 8) * (1 / 3) + 1 / 8 * 1)
    assert chance([(4, 0)]) is chance([]) is None


def test_chance_is_the_mean_over_all_choices():
    sizes = ((5, 2), (4, 3))
    chosen = [
        {("a", unit) for unit in first} | {("b", unit) for unit in second}
        for first in combinations(range(5), 2)
        for second in combinations(range(4), 3)
    ]
    found = [len(own & other) / len(own | other) for own in chosen for other in chosen]
    assert chance(sizes) == pytest.approx(sum(found) / len(found))


@pytest.mark.parametrize("fraction", [0.7, 0.5, 0.3])
def test_chance_of_many_units_is_known(fraction):
    units = 3000
    assert chance([(units, round(fraction * units))] * 24) == pytest.approx(fraction / (2 - fraction), abs=1e-4)


# laws


def random_scores(seed: int, model_type: str = "bert") -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    model, params = tiny_model(model_type)
    return {name: random.standard_normal(units) for name, units in widths(model.axes, params).items()}


def made(values: dict[str, Any]) -> Scores:
    return Scores({name: jnp.asarray(value, jnp.float32) for name, value in values.items()}, {})


@pytest.mark.parametrize("model_type", ["bert", "t5"])
@pytest.mark.parametrize("fraction", [1.0, 0.7, 0.5, 1 / 3, 0.05])
def test_kept_units_are_those_that_selection_keeps(model_type, fraction):
    model, params = tiny_model(model_type)
    scores = random_scores(0, model_type)
    shuffled = {name: scores[name] for name in sorted(scores)}  # as a file holds them
    found, wanted = select_units(shuffled, fraction), select(model, params, scores, Units(fraction))
    assert list(found) == list(wanted)
    for name, gate in wanted.items():
        np.testing.assert_array_equal(found[name], gate)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "t5"])
def test_a_site_is_known_by_its_name(model_type):
    model, params = tiny_model(model_type, layers=11)
    own = sites(model.axes, params)
    assert [site_of(site.name) for site in own] == list(own)
    assert order_sites(sorted(site.name for site in own)) == own


@pytest.mark.parametrize("name", ["", "3.ffn", "3.ffn.layers", "ffn.heads", "3.heads", "a.b.3.ffn.heads", "3..heads"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="not the name of a site"):
        site_of(name)


def test_a_comparison_is_symmetric_and_one_on_itself():
    a, b = made(random_scores(1)), made(random_scores(2))
    one, other = compare({"a": a, "b": b}), compare({"b": b, "a": a})
    assert one["pairs"][0]["groups"] == other["pairs"][0]["groups"] == one["mean"]
    assert one["groups"] == other["groups"]
    for group in compare({"a": a, "b": a})["mean"]:
        assert group == {"spearman": 1.0, "overlap": [1.0] * 3}


def test_a_comparison_holds_every_layer_and_all():
    values = [random_scores(seed) for seed in (1, 2)]
    a, b = ({name: value.astype(np.float32) for name, value in own.items()} for own in values)
    found = compare({"a": made(a), "b": made(b)}, (0.5,))
    assert [(group["layer"], group["kind"], group["units"]) for group in found["groups"]] == [
        ("0", "heads", 4), ("0", "neurons", 32), ("1", "heads", 4), ("1", "neurons", 32),
        (None, "heads", 8), (None, "neurons", 64),
    ]  # fmt: skip
    (pair,) = found["pairs"]
    best = [set(np.argsort(-own["1.ffn.neurons"])[:16]) for own in (a, b)]
    assert pair["groups"][3]["overlap"] == [len(best[0] & best[1]) / len(best[0] | best[1])]
    every = [np.concatenate([own["0.ffn.neurons"], own["1.ffn.neurons"]]) for own in (a, b)]
    assert pair["groups"][5]["spearman"] == spearman(*every)
    assert found["groups"][0]["chance"] == [chance([(4, 2)])]
    assert found["groups"][4]["chance"] == [chance([(4, 2)] * 2)]


def test_heads_of_a_decoder_layer_count_together():
    groups = grouped(random_scores(0, "t5"))
    assert [group.layer for group in groups[:4]] == ["encoder 0", "encoder 0", "encoder 1", "encoder 1"]
    own = next(group for group in groups if group.layer == "decoder 1" and group.kind == "heads")
    assert own.sites == ("decoder.1.attention.heads", "decoder.1.cross.heads")


def test_random_scores_overlap_by_chance():
    """The mean over 40 pairs; its standard error is about 0.007."""
    found = [
        compare({"a": made(random_scores(seed)), "b": made(random_scores(seed + 1000))}, (0.5,)) for seed in range(40)
    ]
    overlap = np.mean([own["mean"][5]["overlap"][0] for own in found])
    assert overlap == pytest.approx(found[0]["groups"][5]["chance"][0], abs=0.03)


def test_nothing_kept_has_no_overlap():
    found = compare({"a": made(random_scores(1)), "b": made(random_scores(2))}, (0.01,))
    assert all(group["overlap"] == [None] for group in found["mean"])
    assert all(group["chance"] == [None] for group in found["groups"])


# the command


def test_the_command_shows_what_the_library_finds(scored):
    files = [scored[name] for name in ("mood", "topic", "third")]
    record = record_of("compare", *files, "--fractions", "0.5,0.25")
    names: list[str] = ["mood", "topic", "third"]  # two are of one task: files by their names
    loaded = dict(zip(names, map(load_scores, files), strict=True))
    wanted = compare(loaded, (0.5, 0.25))
    assert {name: record[name] for name in wanted} == wanted
    assert [file["name"] for file in record["files"]] == names
    assert [file["task"] for file in record["files"]] == ["mood", "topic", "topic"]
    assert record["model"] == loaded["mood"].header["model"]
    assert [pair["names"] for pair in record["pairs"]] == [["mood", "topic"], ["mood", "third"], ["topic", "third"]]


def test_tables(scored, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    two = run("compare", scored["mood"], scored["topic"])
    assert two.exit_code == 0, two.stderr
    (pair,) = record_of("compare", scored["mood"], scored["topic"])["pairs"]
    cells = [f"{value:.2f}" for own in pair["groups"][2:4] for value in (own["spearman"], *own["overlap"])]
    assert re.search(rf"^ *1 +{' +'.join(cells)} *$", two.stdout, re.MULTILINE), two.stdout
    assert "mood, topic" in two.stdout and "all layers" not in two.stdout
    assert re.search(r"chance, all +0\.\d\d +0\.\d\d +0\.\d\d", two.stdout)
    assert "Jaccard" in two.stdout and max(map(len, two.stdout.splitlines())) <= 80
    three = run("compare", scored["mood"], scored["topic"], scored["third"])
    assert "mood, third" in three.stdout and "mean of 3 pairs" in three.stdout


@pytest.mark.parametrize(
    ("files", "ending", "dark"),
    [
        (("mood", "topic"), "png", ()),
        (("mood", "topic", "third"), "svg", ("--dark",)),
        (("heads", "mood_heads"), "png", ()),
    ],
)
def test_pictures(scored, tmp_path, files, ending, dark):
    scores = load_scores(scored["heads"])
    scored = scored | {"mood_heads": save_scores(tmp_path / "mood_heads.safetensors", scores)}
    out, again = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    named = [scored[name] for name in files]
    record = record_of("compare", *named, "-o", out, "--fractions", "0.5,0.01", *dark)
    assert record["picture"] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert run("compare", *named, "-o", again, "--fractions", "0.5,0.01", *dark).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    assert run("compare", *named, "-o", out).exit_code == 2  # it is there already
    assert run("compare", *named, "-o", out, "--overwrite").exit_code == 0


BAD: dict[str, tuple[Sequence[str], str]] = {
    "one file": (("{mood}",), "two or more score files, got .*mood.safetensors"),
    "no file": ((), "Missing argument"),
    "the same file twice": (("{mood}", "{topic}", "{mood}"), "mood.safetensors is named twice"),
    "another model": (
        ("{mood}", "{other}"),
        "mood.safetensors and .*other.safetensors hold scores of different models",
    ),
    "other sites": (("{mood}", "{heads}"), r"other sites or numbers of units \(0.ffn.neurons, 1.ffn.neurons\)"),
    "misspelt path": (("{mood}", "{mood}s"), "mood.safetensorss is no file"),
    "no score file": (("{mood}", "{model}/model.safetensors"), "holds no scores"),
    "nothing kept": (("{mood}", "{topic}", "--fractions", "0.5,0"), r"must lie in \(0, 1\], got 0"),
    "more than all": (
        ("{mood}", "{topic}", "--fractions", "1.5"),
        "--fractions takes fractions in 0 to 1 .*'1.5'",
    ),
    "no number": (("{mood}", "{topic}", "--fractions", "half"), "--fractions takes fractions"),
    "not finite": (("{mood}", "{topic}", "--fractions", "nan"), "--fractions takes fractions in 0 to 1 .* got 'nan'"),
    "no picture": (("{mood}", "{topic}", "-o", "{new}.gif"), "must end with .png or .svg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(place, scored, tmp_path, case):
    arguments, message = BAD[case]
    picture = () if "-o" in arguments else ("-o", "{new}.png")
    filled = [it.format(**scored, model=place.model, new=tmp_path / "new") for it in (*arguments, *picture)]
    result = run("compare", *filled)
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("jaxprune: error: ") and re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_needs_neither_a_model_nor_slow_packages(scored):
    code = f"""
import sys
from jaxprune.__main__ import main
sys.argv = ["jaxprune", "compare", {str(scored["mood"])!r}, {str(scored["topic"])!r}]
try:
    main()
except SystemExit as stop:
    print("IMPORTED", stop.code, *sorted({{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code, *imported = done.stderr.rpartition("IMPORTED ")[2].split()
    assert code == "0", done.stderr
    assert set(imported) & {"transformers", "datasets", "torch", "matplotlib"} == set()
