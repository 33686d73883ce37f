"""Solved segments on disk: memory is freed of them, and a killed run goes on behind them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import OptionError
from iobs_onnx.passes import Codes, replacing
from iobs_onnx.pruning.records import Measurements, SolvedSite
from iobs_onnx.runtime import Feed, weighed
from iobs_onnx.site import Site

_Key = TypeVar("_Key")


class Checkpoint:
    """Keeps what was solved in a folder; every record is whole or not there.

    A record is a `.json` file, written last, with a `.data` file of tensors beside it. It holds the
    SHA-256 of its name, its content and the data, and says what it came after: the run, and the
    data of all records before it. One that came after something else is not found, and is made
    again.

    Args:
        folder: where; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run = self._after = ""
        self._found: set[str] = set()

    def claim(self, run: Mapping[str, Any]) -> None:
        """Keep the folder for one run.

        Args:
            run: all that decides its result, as JSON types.

        Raises:
            OptionError: the folder holds another run.
        """
        run = json.loads(json.dumps(run))
        held = self._read("run", "")
        if held is None:
            self._write("run", {**run, "after": ""})
        elif differ := [key for key in {**held, **run} if held.get(key) != run.get(key)]:
            raise OptionError(
                f"work-dir {self.folder}: holds a run with other {', '.join(sorted(differ))}; "
                "give another folder, or empty this one"
            )
        self._run = self._after = _sha256(run)

    def digested(
        self, name: str, shards: Sequence[Iterable[Feed | tuple[Feed, float]]]
    ) -> list[Iterator[Feed | tuple[Feed, float]]]:
        """Return the feeds of each shard; after the last of one they are held to those before.

        Raises:
            OptionError: on the way: an earlier run read others.
        """
        return [self._digested(name, i, len(shards), feeds) for i, feeds in enumerate(shards)]

    def _digested(
        self, name: str, shard: int, shards: int, feeds: Iterable[Feed | tuple[Feed, float]]
    ) -> Iterator[Feed | tuple[Feed, float]]:
        hashed = hashlib.sha256()
        for item in feeds:
            _hash(hashed, item)
            yield item
        record, found = f"{name}-feeds-{shard:02d}", {"sha256": hashed.hexdigest(), "of": shards}
        held = self._read(record, self._run)
        if held is None:
            if any(other.startswith(f"{name}-segment-") for other in self._found):
                raise self._damaged(f"{record}.json", "is missing", "this folder")
            self._write(record, {**found, "after": self._run})
        elif held != found:
            raise OptionError(
                f"work-dir {self.folder}: holds a run on other calibration data; give another "
                "folder, or empty this one"
            )

    def put(
        self, name: str, solved: Mapping[Site, SolvedSite], facts: Mapping[str, Any]
    ) -> dict[Site, SolvedSite]:
        """Write solved sites and facts about them; return the sites as they lie there."""
        arrays = {
            (site, what): array
            for site, item in solved.items()
            for what, array in _arrays(item).items()
            if array is not None
        }
        places, data = self._store(name, arrays)
        sites = {
            site.name: {
                "tensors": {what: places.get((site, what)) for what in _arrays(item)},
                "axis": None if item.codes is None else item.codes.axis,
                "measured": dataclasses.asdict(item.measured),
            }
            for site, item in solved.items()
        }
        self._write(
            name, {"facts": dict(facts), "sites": sites, "data": data, "after": self._after}
        )
        self._advance(data)
        return {site: self._solved(name, sites[site.name]) for site in solved}

    def get(
        self, name: str, sites: Sequence[Site]
    ) -> tuple[dict[Site, SolvedSite], dict[str, Any]] | None:
        """Return solved sites and the facts about them; None where there is no such record.

        Sites that were not solved, because no rows reached them, are left out.

        Raises:
            OptionError: the record is damaged.
        """
        held = self._read(name, self._after)
        if held is None:
            return None
        self._require_data(name, held["data"])
        self._advance(held["data"])
        done = [site for site in sites if site.name in held["sites"]]
        return {site: self._solved(name, held["sites"][site.name]) for site in done}, held["facts"]

    def _solved(self, name: str, item: Mapping[str, Any]) -> SolvedSite:
        found = {
            what: None if place is None else self._tensor(f"{name}.data", place)
            for what, place in item["tensors"].items()
        }
        weight, values, scale = found["weight"], found["values"], found["scale"]
        assert weight is not None, "every solved site has a weight"
        codes = None
        if values is not None and scale is not None:
            codes = Codes(values.numpy(), scale.numpy(), item["axis"])
        return SolvedSite(weight, found["bias"], codes, Measurements(**item["measured"]))

    def put_tensors(
        self,
        name: str,
        arrays: Mapping[str, NDArray[np.generic]],
        facts: Mapping[str, Any],
        *,
        aside: bool = False,
    ) -> tuple[dict[str, ir.ExternalTensor], dict[str, Any]]:
        """Write tensors by name, and facts about them; return them as they lie there.

        Args:
            name: of the record.
            arrays: by any names.
            facts: as JSON types.
            aside: no other record comes after this one, nor does it after any but the run.
        """
        places, data = self._store(name, arrays)
        after = self._run if aside else self._after
        self._write(name, {"facts": dict(facts), "tensors": places, "data": data, "after": after})
        if not aside:
            self._advance(data)
        return self._tensors(name, places), dict(facts)

    def get_tensors(
        self, name: str, *, aside: bool = False
    ) -> tuple[dict[str, ir.ExternalTensor], dict[str, Any]] | None:
        """Return what :meth:`put_tensors` wrote, or None.

        Raises:
            OptionError: the record is damaged.
        """
        held = self._read(name, self._run if aside else self._after)
        if held is None:
            return None
        self._require_data(name, held["data"])
        if not aside:
            self._advance(held["data"])
        return self._tensors(name, held["tensors"]), held["facts"]

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write facts that go with no tensors."""
        self._write(name, {**facts, "after": self._after})

    def noted(self, name: str) -> dict[str, Any] | None:
        """Return what :meth:`note` wrote, or None.

        Raises:
            OptionError: the record is damaged.
        """
        return self._read(name, self._after)

    def _advance(self, data: Mapping[str, Any]) -> None:
        self._after = _sha256([self._after, data])

    def _tensors(
        self, name: str, places: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, ir.ExternalTensor]:
        return {key: self._tensor(f"{name}.data", place) for key, place in places.items()}

    def _tensor(self, file: str, place: Mapping[str, Any]) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            file,
            place["offset"],
            place["length"],
            ir.DataType[place["dtype"]],
            shape=ir.Shape(place["shape"]),
            name="",
            base_dir=self.folder,
        )

    def _store(
        self, name: str, arrays: Mapping[_Key, NDArray[np.generic]]
    ) -> tuple[dict[_Key, dict[str, Any]], dict[str, Any]]:
        """Write a data file; return the place of each array, and size and hash of the file."""
        with replacing(self.folder / f"{name}.data") as file:
            tensors = ir.external_data.convert_tensors_to_external(
                [ir.Tensor(np.ascontiguousarray(array)) for array in arrays.values()],
                file.parent,
                file.name,
            )
            data = _describe(file)
        return {key: _place(item) for key, item in zip(arrays, tensors, strict=True)}, data

    def _require_data(self, name: str, data: Mapping[str, Any]) -> None:
        remedy = f"{name}.json, and it is made again"
        try:
            found = _describe(self.folder / f"{name}.data")
        except FileNotFoundError as error:
            raise self._damaged(f"{name}.data", "is missing", remedy) from error
        if found != data:
            raise self._damaged(f"{name}.data", "is not what was written", remedy)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.folder / f"{name}.json") as file:
            record = {"sha256": _sha256([name, content]), "content": content}
            file.write_text(json.dumps(record), encoding="utf-8")

    def _read(self, name: str, after: str) -> dict[str, Any] | None:
        """Return the content of a record, None where there is none that came after that."""
        try:
            text = (self.folder / f"{name}.json").read_text(encoding="utf-8")
            record = json.loads(text)
            whole = record["sha256"] == _sha256([name, record["content"]])
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, RecursionError):
            whole = False
        if not whole:
            remedy = "it, and that part is made again"
            raise self._damaged(f"{name}.json", "is not what was written", remedy)
        content: dict[str, Any] = record["content"]
        if content.pop("after") != after:
            return None
        self._found.add(name)
        return content

    def _damaged(self, file: str, fault: str, remedy: str) -> OptionError:
        return OptionError(
            f"work-dir {self.folder}: {file} {fault}: the folder was damaged; delete {remedy}, "
            "or give another folder"
        )


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            "bytes": stream.tell(),
        }


def digest(feeds: Iterable[Feed]) -> str:
    """Return a SHA-256 of feeds, in hexadecimal."""
    hashed = hashlib.sha256()
    for feed in feeds:
        _hash(hashed, feed)
    return hashed.hexdigest()


def _hash(hashed: hashlib._Hash, item: Feed | tuple[Feed, float]) -> None:
    feed, weight = weighed(item)
    for key in sorted(feed):
        array = np.asarray(feed[key])
        hashed.update(f"{key} {array.dtype} {array.shape} {weight!r}".encode())
        strings = array.dtype.kind in "OSU"
        hashed.update(repr(array.tolist()).encode() if strings else array.tobytes())


def _arrays(solved: SolvedSite) -> dict[str, NDArray[np.generic] | None]:
    codes = solved.codes
    return {
        "weight": solved.weight.numpy(),
        "bias": None if solved.bias is None else solved.bias.numpy(),
        "values": None if codes is None else codes.values,
        "scale": None if codes is None else codes.scale,
    }


def _place(tensor: ir.ExternalTensor) -> dict[str, Any]:
    return {
        "offset": tensor.offset,
        "length": tensor.length,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape.numpy()),
    }
