"""The identity of parameters and models: SHA-256 digests, each computed once for arrays that cannot change."""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxprune.checkpoints.tensors import blocks
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name

# Paths and identities of arrays -> references that remove the entry when an array goes, and their digest.
_known: dict[tuple[Any, ...], tuple[list[Any], str]] = {}


def params_digest(params: Params) -> str:
    """The SHA-256 of names, shapes, types and values: equal for equal parameters, on whatever device they are.

    That of JAX arrays is computed once and remembered for as long as all of them live; NumPy arrays may change.
    """
    flat = flatten(params)
    key = tuple((path, id(array)) for path, array in flat.items())
    if key in _known:
        return _known[key][1]
    sha = hashlib.sha256()
    for path, array in flat.items():
        sha.update(json.dumps([path_name(path), str(array.dtype), list(array.shape)]).encode())
        for block in blocks(array):
            sha.update(block.view(np.uint8).data)
    digest = sha.hexdigest()
    if flat and all(isinstance(array, jax.Array) for array in flat.values()):
        _known[key] = ([weakref.ref(array, partial(_forget, key)) for array in flat.values()], digest)
    return digest


def _forget(key: tuple[Any, ...], _: Any) -> None:
    _known.pop(key, None)


def model_digest(model: Model, params: Params) -> str:
    """The SHA-256 of the configuration, the task heads and the parameters; see `params_digest`."""
    heads = [asdict(model.head(name)) for name in model.heads]
    content = [json.loads(model.config.raw), heads, params_digest(params)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
