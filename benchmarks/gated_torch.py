"""The PyTorch side of `speed.py`: transformers' BERT with one gate per unit and example, weights frozen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import captum.attr
import numpy as np
import torch
from transformers import BertConfig, BertModel

from jaxprune.models import Model, family
from jaxprune.units import Params, flatten, widths

# Our array in the axis order of PyTorch's, which keeps [out, in], and heads x head size as one.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "copy": lambda a: a,
    "linear": lambda a: a.T,
    "split_out": lambda a: a.reshape(a.shape[0], -1).T,
    "split_bias": lambda a: a.reshape(-1),
    "merge_in": lambda a: a.reshape(-1, a.shape[-1]).T,
}


class Gated(torch.nn.Module):
    """The probability of every label `[b, labels]`, as a function of the gates `[b, units]` of some sites.

    The gates are applied by hooks before the two maps that read the units; a site without gates is left alone.
    """

    def __init__(self, model: Model, params: Params, head: str, device: str):
        super().__init__()
        chosen = model.head(head)
        config = BertConfig.from_dict(json.loads(model.config.raw), attn_implementation="sdpa")
        self.network = BertModel(config, add_pooling_layer=False)
        arrays = {path: np.asarray(array).astype(np.float32) for path, array in flatten(params).items()}
        names = family(model.config.model_type).checkpoint_names(model.config)
        theirs = {
            name: torch.tensor(np.ascontiguousarray(LAYOUTS[layout](arrays[path])))
            for path, (name, layout) in names.items()
            if path[0] != "heads"
        }
        self.network.load_state_dict(theirs)
        self.readout = torch.nn.Sequential()
        for part in ("dense", "out") if chosen.dense is not None else ("out",):
            kernel, bias = (torch.tensor(arrays["heads", head, part, name]) for name in ("kernel", "bias"))
            linear = torch.nn.Linear(*kernel.shape)
            linear.load_state_dict({"weight": kernel.T, "bias": bias})
            self.readout.append(linear)
            if part == "dense":
                self.readout.append({"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[str(chosen.dense)]())
        self.mean = chosen.pooling == "mean"
        self.gates: dict[str, torch.Tensor] = {}
        self.entrance = torch.nn.Identity()  # of the gates of one site: what captum calls a layer
        self.units = widths(model.axes, params)
        for i, layer in enumerate(self.network.encoder.layer):
            layer.attention.output.dense.register_forward_pre_hook(self.hook(f"{i}.attention.heads"))
            layer.output.dense.register_forward_pre_hook(self.hook(f"{i}.ffn.neurons"))
        dtype = getattr(torch, str(arrays_type(params)))
        self.eval().requires_grad_(False).to(device=device, dtype=dtype)

    def hook(self, name: str) -> Callable[..., tuple[torch.Tensor] | None]:
        """Multiplies what a module reads by the gates of a site: neurons one by one, heads in equal parts."""

        def gate(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            if name not in self.gates:
                return None
            (values,), gates = inputs, self.gates[name]
            units = values.unflatten(-1, (gates.shape[-1], -1))
            return ((units.float() * gates[:, None, :, None]).to(values.dtype).flatten(-2),)

        return gate

    def forward(self, gates: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The probabilities; every gate that is not given is open."""
        self.gates = gates
        hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask[..., None].to(hidden.dtype)
        pooled = (hidden * real).sum(1) / real.sum(1) if self.mean else hidden[:, 0]
        return self.readout(pooled).float().softmax(-1)


def arrays_type(params: Params) -> Any:
    """The type of the parameters."""
    return next(iter(flatten(params).values())).dtype


class Peer:
    """Attributions of a batch's labels, by autograd and by captum."""

    def __init__(
        self, model: Model, params: Params, head: str, batch: Mapping[str, np.ndarray], *, compiled: bool = False
    ):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gated = Gated(model, params, head, self.device)
        self.run: Any = torch.compile(self.gated) if compiled else self.gated
        self.inputs = tuple(
            torch.tensor(np.asarray(batch[name], np.int64), device=self.device)
            for name in ("input_ids", "attention_mask")
        )
        self.labels = torch.tensor(np.asarray(batch["labels"], np.int64), device=self.device)
        rows = len(self.labels)
        self.ones = {name: torch.ones(rows, units, device=self.device) for name, units in self.gated.units.items()}

    def slope(self, scale: float) -> list[torch.Tensor]:
        """The gradient with respect to all gates at `scale`: one forward pass, one call of autograd."""
        gates = {name: (scale * one).requires_grad_() for name, one in self.ones.items()}
        chosen = self.run(gates, *self.inputs).gather(1, self.labels[:, None])
        return list(torch.autograd.grad(chosen.sum(), list(gates.values())))

    def integrate(self, points: np.ndarray, weights: np.ndarray) -> list[torch.Tensor]:
        """Integrated gradients of the joint path by hand: the weighted sum of slopes, one node at a time."""
        total = [torch.zeros_like(one) for one in self.ones.values()]
        for point, weight in zip(points, weights, strict=True):
            total = [t + float(weight) * slope for t, slope in zip(total, self.slope(float(point)), strict=True)]
        self.wait()
        return total

    def gradient(self) -> list[torch.Tensor]:
        """The gradient at open gates, which is gradient x activation."""
        found = self.slope(1.0)
        self.wait()
        return found

    def captum_joint(self, nodes: int) -> list[torch.Tensor]:
        """Integrated gradients by captum with all gates as its inputs, one node at a time."""
        names = list(self.ones)

        def run(*arguments: torch.Tensor) -> torch.Tensor:
            return self.run(dict(zip(names, arguments, strict=False)), *arguments[len(names) :])

        gates = tuple(one.clone().requires_grad_() for one in self.ones.values())
        found = captum.attr.IntegratedGradients(run).attribute(
            gates,
            target=self.labels,
            additional_forward_args=self.inputs,
            n_steps=nodes,
            method="gausslegendre",
            internal_batch_size=len(self.labels),
        )
        self.wait()
        return [value.detach() for value in found]

    def captum_layers(self, nodes: int) -> list[torch.Tensor]:
        """Layer integrated gradients by captum, one site after the other, one node at a time."""
        found = []
        for name, one in self.ones.items():

            def run(gates: torch.Tensor, *inputs: torch.Tensor, name: str = name) -> torch.Tensor:
                return self.run({name: self.gated.entrance(gates)}, *inputs)

            found.append(
                captum.attr.LayerIntegratedGradients(run, self.gated.entrance).attribute(
                    one.clone().requires_grad_(),
                    torch.zeros_like(one),
                    target=self.labels,
                    additional_forward_args=self.inputs,
                    n_steps=nodes,
                    method="gausslegendre",
                    internal_batch_size=len(self.labels),
                )
            )
        self.wait()
        return [value.detach() for value in found]

    def wait(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
