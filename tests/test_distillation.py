"""Students learn and become sparse, exactly and resumably, and what does not fit their teacher is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Place, place, record_of, run
from test_likelihood import asked_moods, speaker
from test_training import DATA, encoder, lengths, moods
from tiny import tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.checkpoints.tensors import model_digest, params_digest
from jaxprune.cli.render.cards import CARD, LEARNED
from jaxprune.cli.render.pictures import training_picture
from jaxprune.cli.training import DISTILLATION, read_pattern
from jaxprune.models import Model, TaskHead
from jaxprune.sparse.masks import WeightMovement, one_shot, sparsity_of
from jaxprune.sparse.patterns import NM, Block, Unstructured, linear_maps
from jaxprune.sparse.schedules import Schedule, cubic_schedule, one_shot_schedule
from jaxprune.training.distillation import Distilled, Sparsification, distill, surviving_heads
from jaxprune.training.finetuning import FineTuning, finetune
from jaxprune.training.joint_loss import Distillation
from jaxprune.training.loop import Step, Training
from jaxprune.units import Params, flatten, widths

__all__ = ["place"]  # a fixture

TRAINING = Training(steps=40, batch_size=16, learning_rate=5e-3, evaluate_every=10)
QUICKLY = replace(TRAINING, steps=8, evaluate_every=4)
SPARSE = Sparsification(schedule=partial(cubic_schedule, 0.9, prunings=10))
LABELS = Distillation(attention=0, embeddings=0, hidden=0, logits=0, labels=1)


@pytest.fixture(scope="module")
def teacher() -> tuple[Model, Params]:
    model, params = encoder(layers=2)
    done = finetune(model, params, [moods()], FineTuning(epochs=2, batch_size=16, learning_rate=5e-3))
    assert done.evaluations[done.best][0]["accuracy"] > 0.9
    return done.model, done.params


def dropping() -> tuple[Model, Params]:
    """The pre-trained model, with dropout."""
    model, params = encoder(layers=2)
    return replace(model, config=replace(model.config, hidden_dropout=0.1, attention_dropout=0.1)), params


def teach(teacher: tuple[Model, Params], training: Training = TRAINING, **settings: Any) -> Distilled:
    settings = {"student": dropping(), "task": moods(), "sparsification": SPARSE} | settings
    return distill(teacher=teacher, training=training, **settings)


@pytest.fixture(scope="module")
def whole(teacher) -> Distilled:
    return teach(teacher)


def zeros(model: Model, params: Params) -> float:
    return sparsity_of(params, linear_maps(model)).fraction


def test_a_student_learns_while_it_becomes_sparse(teacher, whole: Distilled):
    exam = whole.evaluations[whole.best]
    assert exam.evaluation["accuracy"] > exam.evaluation.chance + 0.2
    assert set(exam.losses) == {"attention", "embeddings", "hidden", "logits"}
    assert exam.losses["hidden"] < whole.evaluations[0].losses["hidden"]
    assert whole.fresh_head and whole.model.heads == ("moods",) and whole.steps == 40
    for name, (pruned, size) in sparsity_of(whole.params, linear_maps(whole.model)).arrays.items():
        assert pruned == int(0.9 * size + 0.5), name


def test_sparsity_is_that_of_the_schedule_at_every_evaluation(whole: Distilled):
    schedule = cubic_schedule(0.9, 40, prunings=10)
    assert [exam.step for exam in whole.evaluations] == [10, 20, 30, 40]
    sizes = [size for _, size in sparsity_of(whole.params, linear_maps(whole.model)).arrays.values()]
    for exam in whole.evaluations:
        asked = max(s for step, s in zip(schedule.steps, schedule.sparsities, strict=True) if step <= exam.step)
        assert exam.sparsity == sum(int(np.floor(asked * size + 0.5)) for size in sizes) / sum(sizes)


def test_only_what_is_as_sparse_as_asked_for_is_kept(teacher):
    early = replace(SPARSE, schedule=lambda steps: cubic_schedule(0.9, steps // 2, prunings=4))
    done = teach(teacher, replace(QUICKLY, evaluate_every=2), sparsification=early)
    values = [dev.evaluation["accuracy"] for dev in done.evaluations]
    assert done.best == 1 + int(np.argmax(values[1:]))  # the evaluations at the steps 4, 6 and 8
    assert zeros(done.model, done.params) == done.evaluations[-1].sparsity


def test_interrupted_and_resumed_equals_uninterrupted(teacher, tmp_path: Path):
    def interrupt(step: Step) -> None:
        if step.step == 4:
            raise KeyboardInterrupt

    training, state = replace(QUICKLY, decay=True), tmp_path / "state"
    expected = teach(teacher, training)
    with pytest.raises(KeyboardInterrupt):
        teach(teacher, training, state=state, progress=interrupt)
    resumed = teach(teacher, training, state=state)
    assert params_digest(resumed.params) == params_digest(expected.params)
    assert resumed.evaluations == expected.evaluations and resumed.best == expected.best
    others: dict[str, dict[str, Any]] = {
        "sparsification": {"sparsification": replace(SPARSE, schedule=partial(cubic_schedule, 0.8))},
        "training": {"training": replace(training, seed=1)},
        "distillation": {"distillation": LABELS},
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"another run \({name}.* is "):
            teach(teacher, **{"training": training, "state": state} | other)


@pytest.mark.slow
def test_with_labels_alone_the_teacher_is_not_asked(teacher):
    model, params = teacher
    broken = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), params)
    done = teach((model, broken), distillation=LABELS, sparsification=Sparsification())
    assert done.evaluations[-1].losses.keys() == {"labels"} and done.evaluations[-1].sparsity is None
    assert done.evaluations[done.best].evaluation["accuracy"] > 0.7


def test_texts_that_are_cut_are_counted(teacher):
    long = replace(TRAINING, max_length=8)
    with (
        pytest.warns(UserWarning, match="of 320 train texts of 'moods' are cut to 8 tokens"),
        pytest.raises(ValueError, match="the schedule prunes until"),
    ):
        teach(teacher, long, sparsification=Sparsification(schedule=lambda steps: cubic_schedule(0.9, steps + 1)))


def test_the_students_own_head_is_kept_if_it_has_the_labels(teacher):
    model, params = teacher
    extra = model.with_heads((TaskHead(name="other", labels=("a", "b")), *model.config.task_heads))
    heads = {"other": extra.initialise_head("other", jax.random.key(7)), "moods": params["heads"]["moods"]}
    once = replace(TRAINING, steps=1, learning_rate=1e-9)
    done = teach(teacher, once, student=(extra, params | {"heads": heads}), sparsification=Sparsification())
    assert not done.fresh_head and done.model.heads == ("moods",) and set(done.params["heads"]) == {"moods"}
    np.testing.assert_allclose(
        done.params["heads"]["moods"]["out"]["kernel"], params["heads"]["moods"]["out"]["kernel"], atol=1e-7
    )


def test_zeros_stay_with_and_without_more_of_them(teacher):
    model, params = teacher
    sparse, _ = one_shot(params, 0.6, prunable=linear_maps(model))
    kept, before = Sparsification(keep_zeros=True), zeros(model, sparse)
    same = teach(teacher, QUICKLY, student=(model, sparse), sparsification=kept)
    assert zeros(same.model, same.params) == before == same.evaluations[0].sparsity
    pruned = replace(kept, schedule=lambda steps: one_shot_schedule(0.9, 5))
    more = teach(teacher, QUICKLY, student=(model, sparse), sparsification=pruned)
    for old, new in zip(*(flatten(own).items() for own in (sparse, more.params)), strict=True):
        if linear_maps(model)(old[0], old[1]):
            assert not np.asarray(new[1])[np.asarray(old[1]) == 0].any()


def test_a_student_of_another_width_learns_through_a_projection(teacher):
    model, _ = tiny_model(layers=1, embed=16, neurons=32, heads=())
    student = replace(model, source=DATA / "words"), model.initialise(jax.random.key(0))
    settings = Distillation(attention=0.0, layers=lambda ours, theirs: (theirs - 1,))
    done = teach(teacher, QUICKLY, student=student, distillation=settings)
    assert "projection" not in done.params
    fresh = done.model.initialise(jax.random.key(0))
    assert {p: a.shape for p, a in flatten(done.params).items()} == {p: a.shape for p, a in flatten(fresh).items()}


@pytest.mark.slow
def test_a_text_to_text_student_learns():
    model, params = speaker()
    done = distill((model, params), (model, params), asked_moods(), training=QUICKLY, sparsification=SPARSE)
    assert done.evaluations[-1].sparsity == zeros(done.model, done.params) > 0.89


def test_what_does_not_fit_is_refused(teacher):
    other, _ = tiny_model(layers=2, embed=32, neurons=64, vocab=70, heads=())
    stranger = replace(other, source=DATA / "words"), other.initialise(jax.random.key(0))
    with pytest.raises(ValueError, match="must read the same tokens: their vocabularies have 70 and"):
        teach(teacher, student=stranger)
    with pytest.raises(ValueError, match="has 2 labels"):
        three = replace(moods(), labels=("bad", "good", "so so"))
        teach(teacher, task=three)
    with pytest.raises(ValueError, match="is a classification"):
        teach(teacher, task=lengths(moods()), distillation=Distillation(head="moods"))
    longer = Sparsification(schedule=lambda steps: Schedule(steps=(steps + 1,), sparsities=(0.5,)))
    with pytest.raises(ValueError, match="prunes until step 41, the training has 40"):
        teach(teacher, sparsification=longer)
    with pytest.raises(ValueError, match="no train rows"):
        teach(teacher, task=replace(moods(), splits={**moods().splits, "train": ()}))
    with pytest.raises(ValueError, match="must both be encoders"):
        teach(teacher, student=speaker())
    with pytest.raises(ValueError, match="the student has 1 layers, the teacher 2: choose a layer map"):
        shallow, _ = tiny_model(layers=1, embed=32, neurons=64, heads=())
        teach(teacher, student=(replace(shallow, source=DATA / "words"), shallow.initialise(jax.random.key(0))))
    with pytest.raises(ValueError, match="max_length must be at most 64"):
        teach(teacher, replace(TRAINING, max_length=65))


def test_held_out_rows_are_not_learned_from(teacher):
    task = moods()
    held = task.rows("dev")[:5]
    leaking = replace(task, splits={**task.splits, "train": (*task.rows("train"), *held)})
    done = teach(teacher, replace(TRAINING, steps=1), task=leaking, sparsification=Sparsification())
    assert done.leaks == 5


# the commands


@pytest.fixture(scope="module")
def pretrained(place: Place) -> Path:
    """The model without task heads, with other bits."""
    model, _ = load(place.model)
    bare = model.with_heads(())
    return save(place.folder / "pretrained", bare, bare.initialise(jax.random.key(3)))


FEW = ("--criterion", "gradient-activation", "--examples", 16)
QUICK = ("--steps", 6, "--batch-size", 16, "--prunings", 3, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def sparse(place: Place, pretrained: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a student that was made sparse, and the record that the command printed."""
    out = place.folder / "sparse"
    return out, record_of(*sparsify(place, pretrained), "-o", out)


def sparsify(place: Place, pretrained: Path) -> tuple[Any, ...]:
    rows = ("--teacher", place.model, "--task", "mood", "--data", place.data)
    return ("sparsify", pretrained, *rows, *QUICK, "--sparsity", 0.9)


def test_sparsify_writes_a_model_and_how_it_was_made(sparse):
    out, record = sparse
    model, params = load(out)
    assert model.heads == ("mood",)
    counts = sparsity_of(params, linear_maps(model))
    assert all(pruned == int(0.9 * size + 0.5) for pruned, size in counts.arrays.values())
    stored = json.loads((out / DISTILLATION).read_text())
    assert stored == {name: value for name, value in record.items() if name != "file_bytes"}
    assert (out / LEARNED).read_bytes() == training_picture(record) and LEARNED in (out / CARD).read_text()
    weights = record["weights"]["student"]
    assert weights["linear_maps"] - weights["linear_maps_not_zero"] == counts.zeros
    assert record["results"]["student"]["test"]["n"] == record["results"]["teacher"]["test"]["n"] == 60
    assert record["fresh_head"] and record["steps"] == 6 and not out.with_name("sparse.state").exists()


@pytest.mark.slow
def test_sparsify_resumes_and_shows_the_student(place: Place, pretrained: Path, tmp_path: Path, monkeypatch):
    how = (*sparsify(place, pretrained)[:-2], "--pattern", "2:4", "--no-evaluate", "--evaluate-every", 3)
    whole = run(*how, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    assert "teacher" in whole.stdout and "kept" in whole.stdout
    assert max(map(len, whole.stdout.splitlines()[:-1])) <= 80  # the last one names the folder
    assert "step 6: 50.0 % zero, dev accuracy" in whole.stderr

    def interrupt(evaluation: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jaxprune.cli.render.tables.evaluation_line", interrupt)
        assert run(*how, "-o", tmp_path / "out").exit_code == 130
    assert (tmp_path / "out.state").exists() and not (tmp_path / "out").exists()
    assert run(*how, "-o", tmp_path / "out").exit_code == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other and not (tmp_path / "out.state").exists()


@pytest.mark.slow
def test_distill_recovers_a_pruned_model_with_its_own_heads(place: Place, tmp_path: Path):
    small, out = tmp_path / "small", tmp_path / "better"
    rows = ("--task", "mood", "--data", place.data)
    pruned = run("prune", place.model, *rows, *FEW, "--flops", 0.5, "-o", small, "--no-evaluate", "--measure", 0)
    assert pruned.exit_code == 0, pruned.stderr
    record = record_of("distill", small, "--teacher", place.model, *rows, *QUICK[:4], "-o", out)
    model, params = load(out)
    assert widths(model.axes, params) == widths(*((own := load(small))[0].axes, own[1]))
    assert surviving_heads(read_pruning(out)) == surviving_heads(read_pruning(small))
    assert record["command"] == "distill" and record["thinning"] is None
    losses = [exam["losses"]["attention"] for exam in record["exams"]]
    assert all(np.isfinite(losses))
    assert (out / LEARNED).read_bytes() == training_picture(record) != training_picture(record, dark=True)
    record["exams"][0]["losses"]["attention"] = 0.0  # not on a logarithmic scale
    assert (out / LEARNED).read_bytes() != training_picture(record)


@pytest.mark.slow
def test_distill_takes_the_model_of_one_task(place: Place, tmp_path: Path):
    """The gates of a shared folder say which heads are left."""
    scores, shared = tmp_path / "s.safetensors", tmp_path / "shared"
    rows = ("--task", "mood", "--data", place.data)
    assert run("score", place.model, *rows, "--criterion", "magnitude", "-o", scores).exit_code == 0
    assert run("share", place.model, "--scores", scores, "--flops", 0.5, "-o", shared).exit_code == 0
    out = tmp_path / "better"
    record = record_of("distill", f"{shared}#mood", "--teacher", place.model, *rows, *QUICK[:4], "-o", out)
    assert np.isfinite(record["exams"][0]["losses"]["attention"])
    assert {name for name, site in read_pruning(out)["sites"].items() if site["kept"] < site["had"]}


@pytest.mark.slow
def test_heads_of_unknown_origin_are_refused(place: Place, tmp_path: Path):
    """A model that was pruned twice says what stays of its second pruning, not of the teacher's heads."""
    rows = ("--task", "mood", "--data", place.data)
    quick = ("--criterion", "magnitude", "--no-evaluate", "--measure", 0, "--recover", "none")
    for source, budget, out in ((place.model, 0.6, "one"), (tmp_path / "one", 0.5, "two")):
        assert run("prune", source, *rows, *quick, "--units", budget, "-o", tmp_path / out).exit_code == 0
    how = ("distill", tmp_path / "two", "--teacher", place.model, *rows, *QUICK[:4], "-o", tmp_path / "new")
    refused = run(*how)
    assert refused.exit_code == 2 and "Say which are left" in refused.stderr and not (tmp_path / "new").exists()
    assert run(*how, "--losses", "hidden,logits").exit_code == 0


@pytest.mark.slow
def test_figures_and_digest_are_those_of_the_rounded_student(place: Place, pretrained: Path, tmp_path: Path):
    out = tmp_path / "small"
    record = record_of(*sparsify(place, pretrained), "--packed", "int8", "--half", "-o", out)
    model, params = load(out)
    assert record["models"]["result"] == model_digest(model, params)
    [tested] = record_of("evaluate", out, "--task", "mood", "--data", place.data)["results"]
    assert record["results"]["student"]["test"] == {**tested, "head": "mood"}
    assert "figures are those after rounding to int8 and float16" in (out / "README.md").read_text()


def test_a_student_has_a_card(sparse):
    out, record = sparse
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: jaxprune\n") and "# `pretrained`, sparse for `mood`" in card
    zeros = 100 * record["exams"][record["best"]]["sparsity"]
    assert f"{zeros:.1f} % of the weights of its linear maps are zero" in card and str(out.parent) not in card
    assert "other task heads" not in card and "after rounding" not in card and abs(zeros - 90) < 0.5
    accuracy = 100 * record["results"]["student"]["test"]["metrics"]["accuracy"]
    assert f"| {accuracy:.1f} |" in card and "Labels, in the order of the logits: `bad`, `good`." in card
    example = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    scope: dict[str, Any] = {}
    exec(example.replace("FOLDER", str(out)), scope)
    assert scope["logits"].shape == (1, 2)


@pytest.mark.slow
def test_a_packed_student_is_the_same(sparse, place: Place, pretrained: Path, tmp_path: Path):
    packed = run(*sparsify(place, pretrained), "--packed", "exact", "--no-evaluate", "-o", tmp_path / "packed")
    assert packed.exit_code == 0, packed.stderr
    assert params_digest(load(tmp_path / "packed")[1]) == params_digest(load(sparse[0])[1])
    assert "after rounding" not in (tmp_path / "packed" / "README.md").read_text()


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "sparsity of 1": (("--sparsity", 1.0), r"--sparsity must lie in \[0, 1\)"),
    "sparsity of the pattern": (("--pattern", "2:4", "--sparsity", 0.9), "2 of 4 weights stay, a sparsity of 0.5"),
    "a pattern that does not divide": (("--pattern", "1:3", "--sparsity", 2 / 3), "multiple"),
    "an unknown pattern": (("--pattern", "many"), "--pattern is any, N:M"),
    "N above M": (("--pattern", "4:2"), "n must be at least 1 and less than m"),
    "an end before the beginning": (("--prune-from", 0.5, "--prune-until", 0.2), "the first below the second"),
    "a longer schedule than training": (("--prune-until", 1.5), "fractions of the training"),
    "no prunings": (("--prunings", 0), "prunings must be at least 1"),
    "an unknown loss": (("--losses", "words"), "--losses takes attention"),
    "a loss twice": (("--losses", "logits,logits=2"), "each once"),
    "no loss": (("--losses", "logits=0"), "one of them positive"),
    "temperature": (("--temperature", 0), "temperature must be positive"),
    "an unknown schedule": (("--schedule", "cube"), "Did you mean 'cubic'"),
    "an unknown packing": (("--packed", "int4"), "--packed is exact or int8"),
    "another head": (("--head", "sound"), "no task head 'sound'"),
    "steps": (("--steps", 0), "steps must be at least 1"),
    "other labels": (("--task", "topic", "--head", "mood"), "has 2 labels"),
    "not finite": (("--learning-rate", 1e14, "--steps", 20), "lower the learning rate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(place: Place, pretrained: Path, tmp_path: Path, case: str):
    given, message = BAD[case]
    rows = ("--teacher", place.model, "--task", "mood", "--data", place.data, "--batch-size", 16, "--steps", 4)
    result = run("sparsify", pretrained, *rows, *given, "-o", tmp_path / "new")
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.count("jaxprune: error:") == 1
    error = next(line for line in result.stderr.splitlines() if line.startswith("jaxprune: error:"))
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()


def test_patterns_are_read():
    assert read_pattern("any") == Unstructured()
    assert read_pattern("2:4") == NM(n=2, m=4) and read_pattern("8x16") == Block(inputs=8, outputs=16)


def test_other_criteria_are_described(teacher):
    described = replace(SPARSE, criterion=WeightMovement(), pattern=Block(inputs=4, outputs=4)).to_json(100)
    assert described and described["criterion"]["name"] == "WeightMovement" and described["pattern"]["inputs"] == 4
    json.dumps(described)
