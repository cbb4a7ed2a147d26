"""Decoders as models of lm-evaluation-harness, pruned or not, at whatever widths their layers have.

    python -m jaxprune.evaluation.harness run --model jaxprune --model_args path=small --tasks arc_easy,hellaswag

It is the harness's own command line, to which this model is added: `pip install 'jaxprune[harness]'`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from rich.console import Console
from rich.progress import Progress

from jaxprune.checkpoints.folder import load
from jaxprune.data.batches import IGNORED
from jaxprune.evaluation.text import MOST_LOGITS, Sampling, generate, likelihood_of, stop_tokens, teacher_forced
from jaxprune.evaluation.text import texts as texts_of

Item = TypeVar("Item")
STEP = 32  # tokens: contexts are padded to multiples, so that few programs are compiled


@register_model("jaxprune")
class HarnessModel(TemplateLM):
    """A decoder in a folder of jaxprune or Hugging Face, in a GGUF, or on the hub."""

    def __init__(
        self,
        path: str,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        seed: int = 0,
        **unused: Any,
    ):
        """Loads the model.

        Args:
            path: As for `jaxprune.load`.
            batch_size: Rows that are computed together; fewer where their logits would take more than 1 GiB.
            max_length: The most tokens that are read; None is all that the model has positions for.
            max_gen_toks: The most tokens to write where a task does not say.
            add_bos_token: Whether texts begin with special tokens; None leaves it to the tokenizer.
            seed: Of what is drawn where a task asks for samples.
            **unused: `device` and `max_batch_size`, which the harness gives to all models.

        Raises:
            ValueError: If there is no such model, it is no decoder, or a setting is not known.
        """
        super().__init__()
        if unknown := unused.keys() - {"device", "max_batch_size"}:
            raise ValueError(f"model_args of jaxprune have no {', '.join(sorted(unknown))}.")
        self.model, self.params = load(path)
        if not self.model.continues:
            raise ValueError(f"{path} is a {self.model.config.model_type} model: the harness asks decoders alone.")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size must be a positive number, got {batch_size!r}.")
        self.batch_size, self.max_gen_toks, self.seed = int(batch_size), int(max_gen_toks), int(seed)
        self.max_length = min(self.model.max_length, int(max_length or self.model.max_length))
        self.tokenizer, self.add_bos_token = self.model.tokenizer, add_bos_token

    @property
    def tokenizer_name(self) -> str:
        """The name that the harness keeps cached requests under."""
        return str(self.model.source).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; it gets no second beginning."""
        first = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = False if first and string.startswith(first) else self.add_bos_token
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **given)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of every continuation, in nats, and whether it is the likeliest token by token."""
        cut = [_last(context, answer, self.max_length) for _, context, answer in requests]

        def run(some: Sequence[tuple[list[int], list[int]]]) -> Iterable[tuple[float, bool]]:
            contexts, answers = zip(*some, strict=True)
            room = self.model.max_length + 1 - max(map(len, contexts))
            if room < max(map(len, answers)):  # the longest of both do not fit together, but those of each row do
                return [found for pair in some for found in run([pair])]
            targets = _padded(answers, 8, IGNORED, room)
            batch = teacher_forced(self.model, self._batch(contexts, targets.shape[1] - 1), targets)
            logits: Any = self.model.apply(self.params, batch).logits
            right = jnp.all((logits.argmax(-1) == targets) | (targets == IGNORED), axis=1)
            values = likelihood_of(logits, jnp.asarray(targets))
            return zip(np.asarray(values).tolist(), np.asarray(right).tolist(), strict=True)

        def rows(pair: tuple[list[int], list[int]]) -> int:
            return MOST_LOGITS // (self.model.config.vocab * len(pair[1]))

        return self._each(cut, lambda pair: (len(pair[1]), len(pair[0])), run, rows, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats, in windows that do not overlap."""
        windows = [
            [
                ("", *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([*itertools.chain(*windows)], disable_tqdm))
        return [sum(value for value, _ in itertools.islice(found, len(own))) for own in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts that the model writes behind contexts, up to one of the strings that end them."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts: dict[int, str] = {}
        for places in groups.values():
            contexts, settings = [requests[i].args[0] for i in places], requests[places[0]].args[1]
            texts |= zip(places, self._written(contexts, settings, disable_tqdm), strict=True)
        return [texts[i] for i in range(len(requests))]

    def _written(self, contexts: Sequence[str], settings: Mapping[str, Any], quiet: bool) -> list[str]:
        """The texts behind contexts with the same settings."""
        count = int(settings.get("max_gen_toks", settings.get("max_new_tokens", self.max_gen_toks)))
        ends = settings.get("until") or ()
        ends = [ends] if isinstance(ends, str) else [*ends]
        if (room := self.max_length - count) < 1:
            raise ValueError(f"{count} tokens are to be written, and the model reads {self.max_length}.")
        heat, drawn = float(settings.get("temperature", 1.0)), None
        if settings.get("do_sample") and heat > 0:
            drawn = Sampling(temperature=heat, top_p=float(settings.get("top_p", 1.0)), key=self.seed)
        stop = stop_tokens(self.model)

        def run(some: Sequence[list[int]]) -> list[str]:
            batch = self._batch(some, count)
            tokens = generate(self.model, self.params, batch, max_new_tokens=count, sampling=drawn, stop=stop)
            return texts_of(self.model, tokens)

        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        written = self._each(prompts, len, run, lambda _: self.batch_size, quiet)
        return [min((text.split(end)[0] for end in ends if end), key=len, default=text) for text in written]

    def _batch(self, rows: Sequence[list[int]], after: int = 0) -> dict[str, np.ndarray]:
        """Contexts as a batch, padded, with room for the tokens that come after."""
        tokens = _padded(rows, STEP, -1, self.model.max_length - after)
        return {"input_ids": np.where(tokens < 0, self.model.config.pad_id, tokens), "attention_mask": tokens >= 0}

    def _each(
        self,
        items: Sequence[Item],
        size: Callable[[Item], Any],
        run: Callable[[Sequence[Item]], Iterable[Any]],
        rows: Callable[[Item], int],
        quiet: bool,
    ) -> list[Any]:
        """The results of a function for all items; it is called with the longest ones first and always as many."""
        order = sorted(range(len(items)), key=lambda i: size(items[i]), reverse=True)
        results: list[Any] = [None] * len(items)
        with Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=quiet) as bar:
            line = bar.add_task("asking", total=len(items))
            while order:
                most = min(self.batch_size, max(1, rows(items[order[0]])))
                now, order = order[:most], order[most:]
                full = [items[i] for i in now] + [items[now[-1]]] * (most - len(now))
                for i, result in zip(now, run(full), strict=False):
                    results[i] = result
                bar.advance(line, len(now))
        return results


def _last(context: list[int], answer: list[int], most: int) -> tuple[list[int], list[int]]:
    """The last tokens of a context and its continuation; the model reads all but the very last."""
    tokens, count = [*context, *answer][-most - 1 :], min(len(answer), most)
    return tokens[:-count], tokens[-count:]


def _padded(rows: Sequence[list[int]], step: int, value: int, most: int) -> np.ndarray:
    """Rows of tokens as one array, filled up behind them to a multiple of a step, if there is room."""
    length = min(-(-max(map(len, rows)) // step) * step, most)
    filled = np.full((len(rows), length), value, np.int32)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = tokens
    return filled


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
