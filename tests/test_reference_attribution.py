"""Attributions equal those of captum and of PyTorch's autograd on Hugging Face models with gates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.checkpoints.folder import load
from jaxprune.models import Model
from jaxprune.models.layers import absolute_tokens, max_tokens, squared_tokens
from jaxprune.scoring.attribution import (
    GradientActivation,
    IntegratedGradients,
    gauss_legendre,
    joint,
    layer,
    riemann,
    trapezoid,
)
from jaxprune.scoring.objectives import log_probability, probability, signed
from jaxprune.units import Params, sites, widths

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
captum = pytest.importorskip("captum.attr")

SIZES = {"vocab_size": 50, "pad_token_id": 0, "num_labels": 3}
BERT = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_act": "gelu",
    "max_position_embeddings": 40,
}
DISTILBERT = SIZES | {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 40}
SETTINGS = {
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", BERT | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", BERT | {"pad_token_id": 1}),
    "distilbert": ("DistilBert", DISTILBERT),
}
OBJECTIVES = {probability: torch.softmax, log_probability: torch.log_softmax}


class Gated:
    """A Hugging Face classifier whose heads and neurons are multiplied by gates, one row per example."""

    def __init__(self, network: Any, names: list[str]):
        self.network, self.names = network, names
        self.gates: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}  # gated values of the last pass
        layers = network.base_model
        layers = layers.transformer.layer if hasattr(layers, "transformer") else layers.encoder.layer
        for i, block in enumerate(layers):
            distil = hasattr(block, "ffn")
            readers = (
                (block.attention.out_lin, block.ffn.lin2)
                if distil
                else (block.attention.output.dense, block.output.dense)
            )
            for kind, reader in zip(("attention.heads", "ffn.neurons"), readers, strict=True):
                reader.register_forward_pre_hook(lambda _, inputs, name=f"{i}.{kind}": (self.gate(name, inputs[0]),))

    def gate(self, name: str, values: Any) -> Any:
        units = values.reshape(*values.shape[:2], 4, 4) if name.endswith("heads") else values[..., None]
        self.seen[name] = units
        if units.requires_grad:
            units.retain_grad()
        if name in self.gates:
            units = units * self.gates[name][:, None, :, None]
        return units.reshape(values.shape)

    def objective(self, kind: Any, names: list[str]) -> Any:
        """The objective of every label as a function of the gates of some sites, then the batch's arrays."""

        def run(*arguments: Any) -> Any:
            self.gates = dict(zip(names, arguments, strict=False))
            ids, mask = arguments[len(names) :]
            return kind(self.network(input_ids=ids, attention_mask=mask).logits, -1)

        return run


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Model, Params, Gated, Any]]:
    """Our model and theirs with the same random weights, and a padded batch with labels."""
    transformers = pytest.importorskip("transformers")
    family, settings = SETTINGS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    network = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # Hugging Face's are so small that nothing would matter
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2) + (parameter == 1))
    folder = tmp_path_factory.mktemp(request.param)
    network.save_pretrained(folder)
    model, params = load(folder)
    random = np.random.default_rng(0)
    mask = (np.arange(9) < np.array([9, 6, 4, 7])[:, None]).astype(np.int32)
    pad = settings["pad_token_id"]
    ids = np.where(mask > 0, random.integers(2, 50, mask.shape), pad).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": np.array([0, 2, 1, 2], np.int32)}
    yield model, params, Gated(network, [site.name for site in sites(model.axes, params)]), batch


def arrays(batch: Any) -> tuple[Any, ...]:
    return tuple(torch.tensor(batch[name].astype(np.int64)) for name in ("input_ids", "attention_mask"))


def agree(found: Any, expected: Any, largest: float) -> None:
    """Equal to 1e-4 of the largest attribution of the kind."""
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("path", "objective", "start"),
    [(joint, probability, 0.0), (joint, log_probability, 0.5), (layer, probability, 0.0)],
    ids=["joint", "start", "layer"],
)
def test_integrated_gradients_equal_captum(pair: Any, path: Any, objective: Any, start: float):
    model, params, gated, batch = pair
    criterion = IntegratedGradients(nodes=7, path=path, start=start, objective=objective)
    [found], completeness, _ = criterion.attributions(model, params, batch)
    units, target = widths(model.axes, params), torch.tensor(batch["labels"].astype(np.int64))
    for group, [complete] in zip(path(sites(model.axes, params)), completeness, strict=True):
        names = [site.name for site in group]
        gates = tuple(torch.ones(4, units[name]) for name in names)
        run = gated.objective(OBJECTIVES[objective], names)
        expected, delta = captum.IntegratedGradients(run).attribute(
            gates,
            tuple(start * gate for gate in gates),
            target,
            arrays(batch),
            n_steps=7,
            method="gausslegendre",
            return_convergence_delta=True,
        )
        largest = max(float(value.abs().max()) for value in expected)
        for name, value in zip(names, expected, strict=True):
            agree(found[name], value.detach().numpy(), largest)
        agree(complete.found - complete.expected, delta.numpy(), largest)


@pytest.mark.parametrize(
    ("rule", "method", "factor"),
    [(gauss_legendre, "gausslegendre", 1.0), (riemann, "riemann_middle", 1.0), (trapezoid, "riemann_trapezoid", 5 / 4)],
)
def test_quadrature_rules_equal_captum(pair: Any, rule: Any, method: str, factor: float):
    """captum's weights of the trapezoidal rule sum to `(nodes - 1) / nodes`."""
    model, params, gated, batch = pair
    [found], _, _ = IntegratedGradients(nodes=5, rule=rule, kinds=("heads",)).attributions(model, params, batch)
    target = torch.tensor(batch["labels"].astype(np.int64))
    run = gated.objective(torch.softmax, list(found))
    gates = tuple(torch.ones(4, 4) for _ in found)
    expected = captum.IntegratedGradients(run).attribute(gates, None, target, arrays(batch), n_steps=5, method=method)
    largest = max(float(value.abs().max()) for value in expected)
    for name, value in zip(found, expected, strict=True):
        agree(found[name], factor * value.detach().numpy(), factor * largest)


def test_gradient_times_activation_equals_autograd(pair: Any):
    model, params, gated, batch = pair
    target = torch.tensor(batch["labels"].astype(np.int64))[:, None]
    gated.objective(torch.softmax, [])(*arrays(batch)).gather(1, target).sum().backward()
    products = {name: (units * units.grad).sum(-1).detach().numpy() for name, units in gated.seen.items()}
    mask = batch["attention_mask"][..., None]
    reductions = {
        None: lambda p: (p * mask).sum(1),
        absolute_tokens: lambda p: (np.abs(p) * mask).sum(1),
        squared_tokens: lambda p: (p**2 * mask).sum(1),
        max_tokens: lambda p: np.where(mask > 0, p, -np.inf).max(1),
    }
    for tokens, reduce in reductions.items():
        settings = {} if tokens is None else {"tokens": tokens}
        found = GradientActivation(examples=signed, **settings)(model, params, batch).scores
        largest = max(float(np.abs(reduce(product)).max()) for product in products.values())
        for name, product in products.items():
            agree(found[name], reduce(product), largest)


def test_logits_are_those_of_the_reference(pair: Any):
    """The assumptions of the comparisons above."""
    model, params, gated, batch = pair
    gated.gates = {}
    ids, mask = arrays(batch)
    expected = gated.network(input_ids=ids, attention_mask=mask).logits.detach().numpy()
    found = model.apply(params, {name: jnp.asarray(batch[name]) for name in ("input_ids", "attention_mask")}).logits
    np.testing.assert_allclose(np.asarray(jax.device_get(found)), expected, atol=1e-4 * np.abs(expected).max())
