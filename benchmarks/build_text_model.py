"""Makes a small text-to-text model for many tasks: its vocabulary, its pre-training, its fine-tuning.

A T5 of about nine million parameters: a Unigram vocabulary trained on the training texts, span corruption on those
and a few more texts, then `jaxprune.finetune` on ten tasks with T5's prompts; in half precision:

    python benchmarks/build_text_model.py --data DATA --work WORK

`DATA` has one folder per task with `train|validation|test.jsonl[.gz]`. A run that was interrupted goes on where it was.
Nothing is claimed about pre-trained knowledge: the model has read a few million tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pretraining import Pretraining, pretrain
from timing import say

import jaxprune as jp
from jaxprune.data.tasks import Example, Task, load_task, remove_leaks, row_key
from jaxprune.models import Model, family
from jaxprune.training.loop import Step

TASKS = ("sst2", "ag_news", "mrpc", "rte", "qnli", "subj", "trec", "dbpedia_14", "banking77", "snips")
MORE_TEXTS = ("20newsgroups", "boolq_devsplit", "clinc150", "cola", "emotion")  # read in pre-training only
VOCABULARY = 8_000
SENTINELS = 16
TEST_ROWS = 1_000  # at most, for the card
MOST_CHARACTERS = 1_500  # of one text
CONFIG = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": VOCABULARY,
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "dropout_rate": 0.05,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
}
PRETRAINING = Pretraining(steps=2_500, batch_size=32, learning_rate=2e-2)
FINE_TUNING = jp.FineTuning(
    epochs=3,
    batch_size=32,
    learning_rate=5e-3,
    optimizer="adafactor",
    weight_decay=0.0,
    rows={
        "sst2": 20_000,
        "ag_news": 8_000,
        "mrpc": 5_000,
        "rte": 3_000,
        "qnli": 6_000,
        "subj": 6_000,
        "dbpedia_14": 4_000,
        "snips": 4_000,
    },
)


def train_tokenizer(texts: Sequence[str], target: Path) -> None:
    """Writes a Unigram tokenizer for some texts, in the files that Hugging Face's loaders read."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(texts[::3], trainer)  # enough for 8,000 pieces
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": special[3:],
        "model_max_length": 512,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def texts_of(tasks: Sequence[Task], data: Path) -> list[str]:
    """The training texts of the tasks and of a few more data sets, without what is held out in any of the tasks."""
    held = {row_key(Example(text)) for task in tasks for split in ("calibration", "dev", "test")
            for row in task.rows(split) for text in (row.text, row.pair) if text}  # fmt: skip
    more = [load_task(name, data=data) for name in MORE_TEXTS]
    rows = [row for task in (*tasks, *more) for row in task.rows("train")]
    texts = dict.fromkeys(text[:MOST_CHARACTERS] for row in rows for text in (row.text, row.pair) if text)
    return [text for text in texts if row_key(Example(text)) not in held]


def say_step(step: Step) -> None:
    """Every hundredth step, and evaluations."""
    if step.step % 100 == 0:
        say(f"step {step.step} of {step.steps}, loss {step.loss:.3f}")
    if step.evaluation is not None:
        say(f"epoch {step.epoch}: {step.evaluation['results']}")


def stream_of(model: Model, texts: Sequence[str], seed: int = 0) -> np.ndarray:
    """All texts in random order, each followed by the end of sequence, as one row of tokens."""
    order = np.random.default_rng(seed).permutation(len(texts))
    found = model.tokenizer([texts[i] for i in order], add_special_tokens=True)["input_ids"]
    return np.concatenate([np.asarray(own, np.int32) for own in found])


def main() -> None:
    """Makes the model, step by step; what is done is not done again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("-o", "--output", type=Path, default=jp.bundled_text_model(), help="the model's folder")
    parser.add_argument("--steps", type=int, default=PRETRAINING.steps, help="of pre-training")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    tasks, leaks = remove_leaks([load_task(name, data=arguments.data) for name in TASKS])
    texts = texts_of(tasks, arguments.data)
    start = work / "start"
    if not (start / "tokenizer.json").exists():
        train_tokenizer(texts, start)
        (start / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    module = family("t5")
    blank = Model(module.parse_config(CONFIG))
    pretrained = work / "pretrained"
    recipe = PRETRAINING._replace(steps=arguments.steps)
    if not pretrained.exists():
        model = Model(blank.config, source=start)
        stream = stream_of(model, texts)
        say(f"{len(texts):,} texts, {len(stream):,} tokens")
        sentinels = np.array([model.tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(SENTINELS)])
        params = pretrain(
            model,
            model.initialise(jax.random.key(0)),
            stream,
            sentinels,
            recipe,
            state=work / "pretraining.state",
            progress=say_step,
        )
        jp.save(pretrained, model, params, overwrite=True)
    model, params = jp.load(pretrained)
    done = jp.finetune(
        model,
        params,
        tasks,
        FINE_TUNING,
        state=work / "finetuning.state",
        progress=say_step,
    )
    folder: Path = arguments.output
    jp.save(folder, done.model, done.params, overwrite=True, dtype="float16")
    results = {
        "recipe": FINE_TUNING.to_json(),
        "pretraining": recipe._asdict() | {"corruption": asdict(recipe.corruption), "texts": len(texts)},
        "best_epoch": done.best + 1,
        "leaks": {f"{task}, {other}": count for (task, other), count in leaks.items()},
        "sizes": {
            "vocabulary": VOCABULARY,
            "parameters": jp.parameters(done.params),
            "bytes": (folder / "model.safetensors").stat().st_size,
        },
        "tasks": measure(folder, tasks),
        "history": [[result.to_json() for result in epoch] for epoch in done.evaluations],
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "tokenizers", "transformers")},
    }
    files = {"README.md": card(results).encode(), "results.json": (json.dumps(results, indent=1) + "\n").encode()}
    jp.save(folder, done.model, done.params, dtype="float16", overwrite=True, extra=files)


def measure(folder: Path, tasks: Sequence[Task]) -> Mapping[str, Any]:
    """The finished model's accuracy on every task, read from its folder."""
    model, params = jp.load(folder)
    found = {}
    for task in tasks:
        dev, test = (
            jp.evaluate(model, params, task, rows=jp.Rows(split=split, examples=TEST_ROWS)) for split in ("dev", "test")
        )
        found[task.name] = {"dev": dev.to_json(), "test": test.to_json(), "rows": task.sizes}
        say(f"{dev}; {test}")
    return found


def card(results: Mapping[str, Any]) -> str:
    """The model's README, from the results alone."""
    rows = "".join(
        f"| {name} | {_percent(own['dev'])} | {own['dev']['n']:,} | {_percent(own['test'])} | {own['test']['n']:,} | "
        f"{100 * own['dev']['chance']:.1f} | {own['rows']['train']:,} |\n"
        for name, own in results["tasks"].items()
    )
    leaks = "; ".join(f"{count:,} of {pair}" for pair, count in results["leaks"].items())
    recipes = {name: json.dumps(results[name]) for name in ("recipe", "pretraining")}
    return CARD.format(rows=rows, leaks=leaks, **recipes, **results["sizes"])


def _percent(result: Mapping[str, Any]) -> str:
    return f"{100 * result['metrics'][result['primary']]:.1f}"


CARD = """# A small T5 for ten tasks

A text-to-text model (4 + 4 layers, 256 wide, 4 heads and 1,024 neurons per layer) that is told by a prompt which of ten
tasks to do. It exists so that jaxprune can be tried, tested and measured offline, and has read a few million tokens:
nothing about pre-trained knowledge should be concluded from it.

- Start: random weights. Vocabulary: {vocabulary:,} Unigram pieces, trained on the training texts.
- Pre-training by span corruption on training texts of fifteen data sets, without what is held out in any task:
  `{pretraining}`.
- Fine-tuning on all ten tasks with T5's prompts: `{recipe}`. The epoch with the best mean on dev is kept.
- Half precision (float16) in the file: {bytes:,} bytes, {parameters:,} parameters. Compute in float32 or bfloat16.
- Made by `benchmarks/build_text_model.py`.
- Rows held out in any task were removed from the training rows of all: {leaks} (task, found in).

| task | dev | rows | test | rows | chance (dev) | trained on |
|---|---|---|---|---|---|---|
{rows}
Accuracy in percent, of the file as it is shipped, the answers ranked by their likelihood; a stratified draw where there
are more rows. Pairs of sentences (mrpc, rte, qnli) stay near chance: they need more pre-training than this, and nothing
about pruning should be concluded from them. Several splits are not the original ones, so the figures cannot be compared
with published ones. The figures are read from `results.json` beside this file.

The training data are public research data sets, some for research use only; none of their text is in this folder but
single words and pieces of the vocabulary.
"""


if __name__ == "__main__":
    main()
