"""Break a valid model or archive in one of many ways, decided by a seed.

Bytes are cut, flipped, moved and spliced; fields of the protobuf get boundary values, lose or
repeat members, or take the value of a field elsewhere, which makes cycles, double names and
shapes that lie. The second kind still parses, and so reaches further.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_INTEGERS = (
    -(2**63),
    -(2**31),
    -3,
    -1,
    0,
    1,
    2,
    3,
    7,
    23,
    64,
    2**16,
    2**31,
    2**40,
    2**62,
    2**63 - 1,
)
_STRINGS = (
    "",
    "x",
    "\n",
    "a\0b",
    "-1",
    "7",
    "1e9",
    "99999999999999999999",
    "../weights.bin",
    "/etc/hostname",
    "/dev/zero",
    ".",
    "n" * 5000,
    "ünï",
    "location",
    "offset",
    "length",
    "ai.onnx",
    "com.microsoft",
    "If",
    "Loop",
    "Conv",
    "Gemm",
    "MatMul",
    "Constant",
    "Cast",
    "Transpose",
    "Reshape",
    "perm",
    "transB",
    "group",
)
_FLOATS = (0.0, -1.0, 1e38, float("nan"), float("inf"))
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def mutate_bytes(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return damaged bytes; `other` lends material."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data)) if data else 0
        stop = min(len(data), at + rng.randint(1, 64))
        kind = rng.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            del data[at:stop]
        elif kind == 4:
            data[at:at] = data[at:stop]
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
        elif other:
            start = rng.randrange(len(other))
            data[at:stop] = other[start : start + rng.randint(1, 256)]
    return bytes(data)


def mutate_proto(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the bytes of a model with some fields changed."""
    proto = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # By type first: nodes and dims would otherwise drown everything else.
        by_type: dict[str, list[Message]] = {}
        for message in _messages(proto):
            by_type.setdefault(message.DESCRIPTOR.name, []).append(message)
        message = rng.choice(by_type[rng.choice(sorted(by_type))])
        present = [field for field, _ in message.ListFields()]
        fields = present if present and rng.random() < 0.8 else list(message.DESCRIPTOR.fields)
        _change(message, rng.choice(fields), by_type, rng)
    return proto.SerializeToString()


def _messages(message: Message) -> Iterator[Message]:
    pending = [message]
    while pending:
        message = pending.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending.extend(value if field.is_repeated else [value])


def _change(
    message: Any, field: FieldDescriptor, by_type: dict[str, list[Any]], rng: random.Random
) -> None:
    if field.is_repeated:
        _change_repeated(getattr(message, field.name), field, by_type, rng)
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is not None:
        donors = by_type.get(field.message_type.name)
        if donors:
            _copy(getattr(message, field.name), rng.choice(donors))
        else:
            getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _scalar(getattr(message, field.name), field, by_type, rng))


def _copy(target: Any, donor: Any) -> None:
    # Serialized first: a message may be copied into itself.
    target.ParseFromString(donor.SerializeToString())


def _change_repeated(
    values: Any, field: FieldDescriptor, by_type: dict[str, list[Any]], rng: random.Random
) -> None:
    kind = rng.randrange(5)
    at = rng.randrange(len(values)) if values else 0
    if kind == 0 and values:
        del values[at]
    elif kind == 1 and values:
        # Moved to the end: a node that now stands after its readers.
        moved = list(values)
        moved.append(moved.pop(at))
        del values[:]
        values.extend(moved)
    elif field.message_type is not None:
        donors = by_type.get(field.message_type.name)
        if kind == 2 and values:
            values.add().CopyFrom(values[at])
        elif donors:
            _copy(values.add(), rng.choice(donors))
        else:
            values.add()
    elif kind == 2 or not values:
        values.append(_scalar(values[at] if values else None, field, by_type, rng))
    else:
        values[at] = _scalar(values[at], field, by_type, rng)


def _scalar(
    old: Any, field: FieldDescriptor, by_type: dict[str, list[Any]], rng: random.Random
) -> Any:
    if field.enum_type is not None:
        return rng.choice([value.number for value in field.enum_type.values])
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            old = old or b""
            return rng.choice((b"", old[:-1], old + b"\0", old * 2, b"\xff\xfe", b"NOTSET"))
        return rng.choice(_STRINGS) if rng.random() < 0.5 else rng.choice(_names(by_type))
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(_FLOATS)
    least, most = _RANGES[field.cpp_type]
    return max(least, min(most, rng.choice((*_INTEGERS, (old or 0) + 1, (old or 0) - 1))))


def _names(by_type: dict[str, list[Any]]) -> list[str]:
    """All names in the model: one put in another's place makes cycles and doubles."""
    names = [""]
    for node in by_type.get("NodeProto", ()):
        names += [node.op_type, node.name, *node.input, *node.output]
    for kind in ("TensorProto", "ValueInfoProto", "AttributeProto", "FunctionProto"):
        names += [message.name for message in by_type.get(kind, ())]
    return names


MUTATORS: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    mutate_bytes,
    mutate_proto,
    mutate_proto,
    mutate_proto,
)

# Headers of arrays in an archive that lie, or are not headers at all.
HEADERS = tuple(
    text.encode()
    for text in (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 8)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 9)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 'x'}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (8, 8)}",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (1099511627776,)}",
        "{'descr': (), 'fortran_order': False, 'shape': (8, 8)}",
        "{'descr': [('a',)], 'fortran_order': False, 'shape': (8, 8)}",
        "{'descr': '<f4', 'fortran_order': 3, 'shape': (8L, 8)}",
        "{'descr': ",
        "(" * 100,
        "-" * 100 + "1",
    )
)
