"""Cut a graph into segments that are run one after the other.

A segment is a run of consecutive nodes. All that connects it to the others are the tensors alive
at its two ends, so it can be run and pruned on its own, whatever the size of the whole.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph import names, walk
from iobs_onnx.passes.graph.tensors import stored_tensor
from iobs_onnx.passes.taps.halves import HALVES
from iobs_onnx.site import Site, Tap

Sequential = Literal["none", "segment", "site"]
# Float32 matrices of a tap's order at work while it is solved: H, its drift, factors.
_SOLVER_MATRICES = 8


@dataclass(frozen=True)
class Segment:
    """A run of nodes between two cuts.

    Attributes:
        inputs: values made before it, graph inputs included, that its nodes read.
        outputs: values it makes that later segments read.
        alive: values that later segments read, made here or before.
        changed: those of `outputs` that depend on a weight to be pruned.
        wanted: values that were asked for and are made here.
        taps: activations whose Hessians are collected here; each is an input or made here.
        sites: solved here: their last multiplication is here.
        beside: further activations to fetch with the tap of each site.
        nodes: how many there are.
        weights: names of the stored tensors that they read.
        weight_bytes: size of those.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    alive: tuple[str, ...]
    changed: tuple[str, ...]
    wanted: tuple[str, ...]
    taps: tuple[Tap, ...]
    sites: tuple[Site, ...]
    beside: Mapping[Site, Tap]
    nodes: int
    weights: tuple[str, ...]
    weight_bytes: int


def partition(
    model: ir.Model,
    sites: Sequence[Site] = (),
    *,
    beside: Mapping[Site, Tap] | None = None,
    outputs: Iterable[str] = (),
    sequential: Sequential = "none",
    least: int = 1,
    budget: int | None = None,
) -> tuple[Segment, ...]:
    """Cut the main graph where few tensors are alive.

    Args:
        model: unchanged; only shapes and sizes of its tensors are read.
        sites: weights to be pruned; their taps are collected on the way.
        beside: a further activation to fetch where a site's tap is. One that is made only after
            the site's node is left out.
        outputs: further values to fetch on the way, such as the outputs of the model.
        sequential: `none` cuts only for the budget; `segment` wherever no more tensors are alive
            than at the narrowest place between two sites (the ends of repeated blocks); `site`
            before every site whose input depends on a site of the same segment, so that each
            can read what the pruned model feeds it.
        least: sites that a segment of `segment` holds at least, where there are so many.
        budget: bytes of weights, and of Hessians at work, that a segment may hold; one node may
            exceed it alone.

    Raises:
        ModelError: one of `outputs` is not a value of the main graph.
    """
    flow = _Flow(model, sites, beside or {}, tuple(outputs))
    cuts = {"none": list, "segment": flow.narrow_cuts, "site": flow.site_cuts}[sequential]()
    if sequential == "segment":
        cuts = flow.without_small(cuts, least)
    if budget is not None:
        cuts = flow.budget_cuts(cuts, budget)
    edges = [0, *cuts, flow.end]
    return tuple(flow.segment(start, stop) for start, stop in itertools.pairwise(edges))


class _Flow:
    """Who makes which value and who reads it last, in positions of the node list."""

    def __init__(
        self,
        model: ir.Model,
        sites: Sequence[Site],
        beside: Mapping[Site, Tap],
        outputs: tuple[str, ...],
    ) -> None:
        graph = model.graph
        constant = walk.constant_values(graph)
        self.nodes = list(graph)
        # A graph input is made before the first node.
        self.made = {v: -1 for v in graph.inputs} | {
            value: i for i, node in enumerate(self.nodes) for value in node.outputs
        }
        self.reads = [
            [v for v in walk.read_values(n) if v in self.made and v not in constant]
            for n in self.nodes
        ]
        self.flow = nx.DiGraph()
        self.flow.add_nodes_from(range(len(self.nodes)))
        self.flow.add_edges_from(
            (self.made[value], i) for i, reads in enumerate(self.reads) for value in reads
        )
        self.by_name = {value.name: value for value in self.made}
        self._locate(sites)
        if missing := [name for name in outputs if name not in self.by_name]:
            raise ModelError(f"output {missing[0]!r}: the main graph has no such value")
        self.wanted = [self.by_name[name] for name in outputs if self.by_name[name] not in constant]
        self.beside = {
            site: tap
            for place, solved in self.solved.items()
            for site in solved
            if (tap := beside.get(site)) and self.made[self.by_name[tap.value]] < place
        }
        self._find_last_reads()
        self._count_alive(graph.outputs)
        self._weigh(constant)

    def _locate(self, sites: Sequence[Site]) -> None:
        """Find the nodes of every site, and where each of its taps is met last."""
        position: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            # What a body holds happens where the node that runs it stands.
            inner = (n for body in walk.subgraphs(node) for n in body.all_nodes())
            position |= {names.node_reference(n): i for n in (*inner, node)}
        self.uses: dict[int, list[Site]] = defaultdict(list)
        self.solved: dict[int, list[Site]] = defaultdict(list)
        self.tapped: dict[int, list[Tap]] = defaultdict(list)
        self.tainted: set[int] = set()
        for site in sites:
            places = sorted(position[name] for name in site.nodes)
            self.tainted.update(places)
            for place in places:
                self.uses[place].append(site)
            solved = places[-1]
            for tap in site.taps:
                read = [i for i in places if self.by_name[tap.value] in self.nodes[i].inputs]
                # A tap that no node of the site reads is made from what one of them puts out.
                place = read[-1] if read else max(places[-1], self.made[self.by_name[tap.value]])
                self.tapped[place].append(tap)
                solved = max(solved, place)
            self.solved[solved].append(site)
        self.tainted = _reached(self.flow, self.tainted)

    def _find_last_reads(self) -> None:
        """Find the last node that reads each value, among those that lead to what is fetched."""
        self.fetched: dict[ir.Value, int] = {}
        fetched = {place: list(taps) for place, taps in self.tapped.items()}
        for place, solved in self.solved.items():
            beside = [self.beside[site] for site in solved if site in self.beside]
            fetched[place] = [*fetched.get(place, ()), *beside]
        for place, taps in fetched.items():
            for tap in taps:
                for value in (self.by_name[name] for name in tap.values):
                    self.fetched[value] = max(place, self.fetched.get(value, -1))
        ends = {self.made[value] for value in (*self.fetched, *self.wanted)}
        needed = _reached(self.flow.reverse(copy=False), ends)
        self.last = dict(self.fetched)
        for i, reads in enumerate(self.reads):
            if i in needed:
                for value in reads:
                    self.last[value] = max(i, self.last.get(value, -1))
        self.end = 1 + max([*ends, *self.solved], default=-1)

    def _count_alive(self, results: Iterable[ir.Value]) -> None:
        """Count the tensors alive between node i - 1 and node i, as if the whole graph were run.

        Those that follow a tap are counted first: masks and positions live as long as the model
        and would hide its narrow places.
        """
        taps = {self.made[value] for value in self.fetched} - {-1}
        stream = _reached(self.flow, self.tainted | taps)
        last = {value: i for i, reads in enumerate(self.reads) for value in reads}
        last |= {value: len(self.nodes) for value in results if value in self.made}
        self.alive = [(0, 0)] * (len(self.nodes) + 1)
        for value, end in last.items():
            # Only tensors can be handed from one segment to the next.
            stuck = isinstance(value.type, ir.SequenceType | ir.OptionalType)
            weight = len(self.made) if stuck else 1
            follows = stuck or value in self.fetched or self.made[value] in stream
            for i in range(self.made[value] + 1, end + 1):
                main, others = self.alive[i]
                self.alive[i] = (main + weight * follows, others + weight)

    def _weigh(self, constant: set[ir.Value]) -> None:
        """Attribute each stored tensor to the nodes that read it, through constant nodes too."""
        stored: dict[ir.Value, frozenset[ir.Value]] = {}
        self.weights: list[frozenset[ir.Value]] = []
        for node in self.nodes:
            read: set[ir.Value] = set()
            for value in walk.read_values(node):
                if stored_tensor(value) is not None:
                    read.add(value)
                read |= stored.get(value, frozenset())
            self.weights.append(frozenset(read))
            for output in node.outputs:
                if output in constant:
                    stored[output] = self.weights[-1]

    def narrow_cuts(self) -> list[int]:
        """Cut wherever as few tensors are alive as anywhere between two sites."""
        places = sorted(self.uses)
        between = range(places[0] + 1, places[-1] + 1) if places else range(0)
        if not between:
            return []
        least = min(self.alive[i][0] for i in between)
        narrow = [i for i in between if self.alive[i][0] == least]
        # Of the narrow places between the same two sites, the last.
        return list({bisect_left(places, i): i for i in narrow}.values())

    def without_small(self, cuts: Sequence[int], least: int) -> list[int]:
        """Leave out cuts behind fewer than `least` sites since the last one, or before as few."""
        solved = sorted(place for place, sites in self.solved.items() for _ in sites)
        kept: list[int] = []
        for cut in cuts:
            done = bisect_left(solved, cut)
            since = done - (bisect_left(solved, kept[-1]) if kept else 0)
            if since >= least <= len(solved) - done:
                kept.append(cut)
        return kept

    def site_cuts(self) -> list[int]:
        """Cut between a site and those that depend on it."""
        cuts: list[int] = []
        tainted: set[ir.Value] = set()
        last_site = start = i = 0
        while i < self.end:
            depends = not tainted.isdisjoint(self.reads[i])
            if i in self.uses and depends:
                cut = self._narrowest(max(last_site + 1, start + 1), i)
                cuts.append(cut)
                start = i = last_site = cut
                tainted = set()
                continue
            if depends or i in self.uses:
                tainted.update(self.nodes[i].outputs)
            if i in self.uses:
                last_site = i
            i += 1
        return cuts

    def budget_cuts(self, cuts: list[int], budget: int) -> list[int]:
        """Cut further where a segment would exceed the budget, in its second half."""
        result: list[int] = []
        for first, stop in itertools.pairwise([0, *cuts, self.end]):
            start = first
            while (filled := self._fill(start, stop, budget)) is not None:
                i, half = filled
                start = self._narrowest(half, i)
                result.append(start)
            result += [stop] if stop != self.end else []
        return result

    def _fill(self, start: int, stop: int, budget: int) -> tuple[int, int] | None:
        """Return the node that no longer fits a segment from `start`, and where half was used."""
        seen: set[ir.Value | Tap] = set()
        used, half = 0, None
        for i in range(start, stop):
            fresh = {*self.weights[i], *self.tapped.get(i, ())} - seen
            seen |= fresh
            more = sum(_work(item) if isinstance(item, Tap) else _held(item) for item in fresh)
            if used and more and used + more > budget:
                return i, half or i
            used += more
            if half is None and used * 2 >= budget:
                half = i + 1
        return None

    def _narrowest(self, first: int, last: int) -> int:
        """Return the latest of the places `first ... last` where the fewest tensors are alive."""
        return min(range(last, first - 1, -1), key=lambda i: self.alive[i])

    def segment(self, start: int, stop: int) -> Segment:
        """Describe the nodes from `start` up to `stop`."""
        here = range(start, stop)
        read = [v for i in here for v in self.reads[i] if i <= self.last.get(v, -1)]
        read += [value for value, last in self.fetched.items() if last in here]
        outputs = [v for v, last in self.last.items() if self.made[v] in here and last >= stop]
        weights = dict.fromkeys(value for i in here for value in self.weights[i])
        sites = tuple(site for i in here for site in self.solved.get(i, ()))
        return Segment(
            inputs=_names(value for value in read if self.made[value] < start),
            outputs=_names(outputs),
            alive=_names(v for v, last in self.last.items() if self.made[v] < stop <= last),
            changed=_names(v for v in outputs if self.made[v] in self.tainted),
            # A graph input that is returned as it is counts as made by the first segment.
            wanted=_names(v for v in self.wanted if max(self.made[v], 0) in here),
            taps=tuple(dict.fromkeys(tap for i in here for tap in self.tapped.get(i, ()))),
            sites=sites,
            beside={site: self.beside[site] for site in sites if site in self.beside},
            nodes=len(here),
            weights=_names(weights),
            weight_bytes=sum(_nbytes(value) for value in weights),
        )


def _reached(flow: nx.DiGraph, starts: Collection[int]) -> set[int]:
    """Return the nodes that can be reached from any of `starts`, and these."""
    own = [start for start in starts if start in flow]
    return set(own).union(*(layer for layer in nx.bfs_layers(flow, own)))


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value.name or "" for value in values))


def _nbytes(value: ir.Value) -> int:
    tensor = stored_tensor(value)
    return 0 if tensor is None else tensor.nbytes


def _held(value: ir.Value) -> int:
    """Return the bytes that a stored tensor takes while it is run: on a CPU halves are widened."""
    tensor = stored_tensor(value)
    narrow = tensor is not None and tensor.dtype in HALVES
    return 2 * _nbytes(value) if narrow else _nbytes(value)


def _work(tap: Tap) -> int:
    return _SOLVER_MATRICES * 4 * tap.groups * tap.features**2
