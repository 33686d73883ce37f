"""Solved segments on disk: memory is freed of them, and a killed run goes on behind them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import OptionError
from iobs_onnx.passes import Codes, replacing
from iobs_onnx.pruning.records import Measurements, SolvedSite
from iobs_onnx.runtime import Feed
from iobs_onnx.site import Site


class Checkpoint:
    """Keeps what was solved in a folder; every record is whole or not there.

    A record is a `.json` file, written last, with a `.data` file of tensors beside it.

    Args:
        folder: where; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, run: Mapping[str, Any]) -> None:
        """Keep the folder for one run.

        Args:
            run: all that decides its result, as JSON types.

        Raises:
            OptionError: the folder holds another run.
        """
        run = json.loads(json.dumps(run))
        held = self._read("run")
        if held is None:
            self._write("run", run)
            return
        if differ := [key for key in {**held, **run} if held.get(key) != run.get(key)]:
            raise OptionError(
                f"work-dir {self.folder}: holds a run with other {', '.join(sorted(differ))}; "
                "give another folder, or empty this one"
            )

    def digested(
        self, name: str, feeds: Iterable[Feed | tuple[Feed, float]]
    ) -> Iterator[Feed | tuple[Feed, float]]:
        """Yield the feeds; after the last, see that they are those of the run that goes on.

        Raises:
            OptionError: an earlier run read other feeds.
        """
        hashed = hashlib.sha256()
        for item in feeds:
            _hash(hashed, item)
            yield item
        found = {"sha256": hashed.hexdigest()}
        held = self._read(f"{name}-feeds")
        if held is None:
            self._write(f"{name}-feeds", found)
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
        tensors = ir.external_data.convert_tensors_to_external(
            [ir.Tensor(np.ascontiguousarray(array)) for array in arrays.values()],
            self.folder,
            f"{name}.data",
        )
        places = {key: _place(tensor) for key, tensor in zip(arrays, tensors, strict=True)}
        sites = {
            site.name: {
                "tensors": {what: places.get((site, what)) for what in _arrays(item)},
                "axis": None if item.codes is None else item.codes.axis,
                "measured": dataclasses.asdict(item.measured),
            }
            for site, item in solved.items()
        }
        self._write(name, {"facts": dict(facts), "sites": sites})
        found = self.get(name, list(solved))
        assert found is not None, "it was written just now"
        return found[0]

    def get(
        self, name: str, sites: Sequence[Site]
    ) -> tuple[dict[Site, SolvedSite], dict[str, Any]] | None:
        """Return solved sites and the facts about them; None where there is no such record.

        Sites that were not solved, because no rows reached them, are left out.
        """
        held = self._read(name)
        if held is None:
            return None
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
        self, name: str, arrays: Mapping[str, NDArray[np.generic]], facts: Mapping[str, Any]
    ) -> tuple[dict[str, ir.ExternalTensor], dict[str, Any]]:
        """Write tensors by name, and facts about them; return them as they lie there."""
        tensors = ir.external_data.convert_tensors_to_external(
            [ir.Tensor(np.ascontiguousarray(array)) for array in arrays.values()],
            self.folder,
            f"{name}.data",
        )
        places = {key: _place(tensor) for key, tensor in zip(arrays, tensors, strict=True)}
        self._write(name, {"facts": dict(facts), "tensors": places})
        found = self.get_tensors(name)
        assert found is not None, "it was written just now"
        return found

    def get_tensors(self, name: str) -> tuple[dict[str, ir.ExternalTensor], dict[str, Any]] | None:
        """Return what :meth:`put_tensors` wrote, or None."""
        held = self._read(name)
        if held is None:
            return None
        file = f"{name}.data"
        found = {key: self._tensor(file, place) for key, place in held["tensors"].items()}
        return found, held["facts"]

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write facts that go with no tensors."""
        self._write(name, facts)

    def noted(self, name: str) -> dict[str, Any] | None:
        """Return what :meth:`note` wrote, or None."""
        return self._read(name)

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

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.folder / f"{name}.json") as file:
            file.write_text(json.dumps(content), encoding="utf-8")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            text = (self.folder / f"{name}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        content: dict[str, Any] = json.loads(text)
        return content


def digest(feeds: Iterable[Feed]) -> str:
    """Return a SHA-256 of feeds, in hexadecimal."""
    hashed = hashlib.sha256()
    for feed in feeds:
        _hash(hashed, feed)
    return hashed.hexdigest()


def _hash(hashed: hashlib._Hash, item: Feed | tuple[Feed, float]) -> None:
    feed, weight = item if isinstance(item, tuple) else (item, 1.0)
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
