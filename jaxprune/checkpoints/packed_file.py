"""Opens safetensors files in which some tensors are packed; they look as if they were not.

What is packed is said in the header: under `"packed"` in the metadata, JSON with a version and a description of every
packed tensor. None of it is trusted: a file is refused, with one error that lists everything, unless every part is
there with the type and the length that its description asks for, and as many weights have a place as have a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxprune.checkpoints.packing import ENCODINGS, INT8, RUN, STORED, Description, Packed, runs
from jaxprune.checkpoints.tensors import FLOATS, Entry, TensorFile

METADATA = "packed"  # the name of the descriptions in the metadata of a file
VERSION = 1  # of the layout
_FIELDS = ("dtype", "shape", "values", "encoding", "count")
_TYPES = {name: kind for name, kind in FLOATS.items()} | {"U8": np.dtype(np.uint8), INT8: np.dtype(np.int8)}
_MOST = 2**63  # weights of one tensor
_SLICE = 2**20  # bytes that one tensor has in memory while it is read
_PIECE = 2**20  # bytes of bits or deltas that are checked at once


class FilePart(NamedTuple):
    """A flat tensor of an open file that is read slice by slice."""

    file: BinaryIO
    entry: Entry

    def __len__(self) -> int:
        return self.entry.shape[0]

    def __getitem__(self, part: Any) -> np.ndarray:
        kind = _TYPES[self.entry.dtype]
        first, last, _ = part.indices(len(self))
        self.file.seek(self.entry.start + first * kind.itemsize)
        return np.frombuffer(self.file.read(max(0, last - first) * kind.itemsize), kind)


class PackedFile(TensorFile):
    """A `TensorFile` whose packed tensors have the type and the shape, and give the values, that they unpack to."""

    def __init__(self, path: str | Path):
        """Opens a file, packed or not, and checks its header and where the values of its packed tensors are.

        Raises:
            ValueError: If the file is not a complete safetensors file, or its packed tensors are damaged.
        """
        super().__init__(path)
        self.packed: dict[str, Packed] = {}  # by the name of the tensor
        try:
            problems = self._unite(*_descriptions(self.metadata)) if METADATA in self.metadata else []
            if problems:
                raise ValueError("; ".join(problems))
        except ValueError as error:
            self._file.close()
            raise ValueError(f"the packed tensors of {path} cannot be read: {error}. Save it again.") from error

    def slices(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """As those of `TensorFile`: dense blocks of rows, one of them in memory at a time."""
        if name not in self.packed:
            yield from super().slices(name)
            return
        packed = self.packed[name]
        kind, inner = FLOATS[packed.how.dtype], packed.how.shape[1:]
        width = math.prod(inner)
        step = max(1, _SLICE // max(1, width * kind.itemsize))
        block = np.zeros(min(step * width, packed.how.size), kind)
        for start, places, values in runs(packed, step * width) if packed.how.size else ():
            block[:] = 0
            block[places] = values
            rows = min(len(block), packed.how.size - start) // width
            yield slice(start // width, start // width + rows), block[: rows * width].reshape(rows, *inner)

    def nonzeros(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of a packed tensor, and where in the flat tensor they are."""
        packed = self.packed[name]
        places, values = np.empty(packed.how.count, np.int64), np.empty(packed.how.count, FLOATS[packed.how.dtype])
        taken = 0
        for start, own, found in runs(packed, _SLICE):
            places[taken : taken + len(own)] = own + start
            values[taken : taken + len(own)] = found
            taken += len(own)
        return places, values

    def stored_bytes(self, name: str) -> int:
        """The bytes of a tensor in the file."""
        entries = [part.entry for part in self.packed[name].parts.values()] if name in self.packed else []
        return sum(entry.stop - entry.start for entry in entries or [self.entries[name]])

    def _unite(self, described: Mapping[str, Description], problems: list[str]) -> list[str]:
        """Puts the packed tensors in the place of their parts, and says what is wrong with them."""
        parts = dict(self.entries)
        for name, how in described.items():
            own = {part: parts.get(f"{name}.{part}") for part in how.parts}
            wrong = [f"there is a tensor {name} as well"] * (name in parts)
            wrong += [fault for part, entry in own.items() if (fault := _misfit(how, part, entry))]
            if not wrong:
                found = {part: FilePart(self._file, entry) for part, entry in own.items() if entry is not None}
                wrong = _misplaced(how, found)
                values = found["values"].entry
                self.packed[name] = Packed(how, found)
                self.entries[name] = Entry(how.dtype, how.shape, values.start, values.stop)
                for part in own:
                    self.entries.pop(f"{name}.{part}", None)
            problems += [f"{name}: {fault}" for fault in wrong]
        return problems


def descriptions_text(described: Mapping[str, Description]) -> str:
    """What the metadata of a file hold under `METADATA`."""
    tensors = {name: {**how._asdict(), "shape": list(how.shape)} for name, how in described.items()}
    return json.dumps({"version": VERSION, "tensors": tensors}, separators=(",", ":"))


def _descriptions(metadata: Mapping[str, str]) -> tuple[dict[str, Description], list[str]]:
    """The descriptions that make sense, and what is wrong with the others."""
    try:
        content = json.loads(metadata[METADATA], object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"their description is not valid JSON ({error})") from error
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(f"their layout has version {str(version)[:80]!r}, this version of jaxprune reads {VERSION}")
    if sorted(content) != ["tensors", "version"] or not isinstance(content["tensors"], dict):
        raise ValueError(f"they are described by {sorted(content)}, expected version and tensors")
    described, problems = {}, []
    for name, fields in content["tensors"].items():
        wrong = _nonsense(fields)
        if wrong:
            problems.append(f"{name}: {wrong}")
        else:
            described[name] = Description(**{**fields, "shape": tuple(fields["shape"])})
    return described, problems


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _nonsense(fields: Any) -> str | None:
    """What is wrong with a description on its own."""
    if not isinstance(fields, dict) or sorted(fields) != sorted(_FIELDS):
        return f"it is described by {str(fields)[:80]}, expected {', '.join(_FIELDS)}"
    dtype, shape, values, encoding, count = (fields[name] for name in _FIELDS)
    if not isinstance(dtype, str) or dtype not in FLOATS:
        return f"dtype is {str(dtype)[:80]!r}, expected {', '.join(FLOATS)}"
    if values not in (dtype, INT8):
        return f"values are {str(values)[:80]!r}, expected {dtype} or {INT8}"
    if not isinstance(encoding, str) or encoding not in ENCODINGS:
        return f"encoding is {str(encoding)[:80]!r}, expected {', '.join(ENCODINGS)}"
    if not isinstance(shape, list) or len(shape) > 32 or not all(_is_count(size) for size in (*shape, count)):
        return f"shape is {str(shape)[:80]} and count {str(count)[:80]}, expected counts"
    if math.prod(shape) >= _MOST or count > math.prod(shape) or (encoding == "all" and count != math.prod(shape)):
        return f"count is {count}, which does not fit the shape {shape} with encoding {encoding}"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _misfit(how: Description, part: str, entry: Entry | None) -> str | None:
    """What is wrong with the type or the length of a part."""
    if entry is None:
        return f"{part} are missing"
    kind = how.values if part == "values" else STORED[part]
    if entry.dtype != kind or len(entry.shape) != 1:
        return f"{part} are {entry.dtype} of shape {list(entry.shape)}, expected {kind} with one axis"
    length, wanted = entry.shape[0], {"values": how.count, "bits": -(-how.size // 8)}.get(part)
    if wanted is not None and length != wanted:
        return f"there are {length} {part}, expected {wanted}"
    if part == "scales" and (how.size % length if length else how.size):
        return f"there are {length} scales, which do not divide its {how.size} weights into columns"
    return None


def _misplaced(how: Description, parts: Mapping[str, FilePart]) -> list[str]:
    """What is wrong with where the values are."""
    if how.encoding == "all":
        return []
    found, covered = 0, how.size
    if how.encoding == "bits":
        found = sum(int(np.bitwise_count(piece).sum()) for piece in _pieces(parts["bits"]))
        last = parts["bits"][len(parts["bits"]) - 1 :]
        if how.size % 8 and int(last[0]) >> how.size % 8:
            return ["bits are set behind its last weight"]
    else:
        covered = 0
        for piece in _pieces(parts["deltas"]):
            kept = int(np.count_nonzero(piece < RUN))
            found, covered = found + kept, covered + int(piece.sum(dtype=np.int64)) + kept
    wrong = [f"{how.encoding} place {found} values, and there are {how.count}"] if found != how.count else []
    if not 0 <= how.size - covered < RUN:
        wrong.append(f"deltas end at weight {covered} of {how.size}")
    return wrong


def _pieces(part: FilePart) -> Iterator[np.ndarray]:
    for first in range(0, len(part), _PIECE):
        yield part[first : first + _PIECE]
