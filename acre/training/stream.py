"""Examples of a mix of sources, resumed to the bit.

Takes a model and a mix, {source: weight}; gives `Example`s, and a state that a
checkpoint holds. One idea: nothing is drawn from a running generator, every choice from
one seeded by its number, so a state is a few numbers and data-parallel processes count
through one sequence without telling each other. Refuses weights that are no positive
numbers, and a state of other settings or data.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from acre.chat import Frame
from acre.generate import integer
from acre.model import Model
from acre.training.examples import INTERVALS, Example, Maker, Shape
from acre.training.files import Skipped
from acre.training.sources import opened

Mix = str | Sequence[str] | Mapping[str, float]


class Stream:
    """Examples of a mix; an iterator. One owner.

    skipped: a Counter of what this process has left out or cut, by reason.
    """

    def __init__(
        self,
        model: Model,
        mix: Mix,
        *,
        length: int | tuple[int, int],
        window: int = 4096,
        stride: int = 2048,
        carry: int = 0,
        intervals: Sequence[int] = INTERVALS,
        questions: int = 16,
        context_weight: float = 0.0,
        seed: int = 0,
        passes: int | None = 1,
        rank: int = 0,
        world: int = 1,
        require_answer: bool = True,
        frame: Frame | None = None,
    ) -> None:
        """mix: sources and their shares of the examples, or sources of equal shares. A
        source is a file or folder of rows, "builder", or "builder:path"; a comma parts
        several paths. length ... context_weight: see `Shape`. passes: how often files
        are read (None: without end); builders never end. A source that has ended leaves
        the mix. rank, world: this process takes examples rank, rank + world, ... of one
        sequence. require_answer, frame: see `Maker`. ValueError, TypeError,
        FileNotFoundError naming the argument or file.
        """
        self._seed = integer("seed", seed, 0)
        if passes is not None:
            integer("passes", passes, 1)
        self._world = integer("world", world, 1)
        self._rank = integer("rank", rank, 0, world - 1)
        span = length if isinstance(length, int) else tuple(length)
        shape = Shape(
            span, window, stride, carry, tuple(intervals), questions, context_weight
        )
        maker = Maker(model, shape, frame=frame, require_answer=require_answer)
        self._skipped = Skipped(quiet=rank > 0)
        shares = shares_of(mix)
        self._shares = list(shares.values())
        # Seeded by their place in the mix: data may move to another folder.
        self._sources = [
            opened(name, maker, self._skipped, f"{seed}:{i}", passes)
            for i, name in enumerate(shares)
        ]
        self._ended: set[int] = set()
        self._drawn = 0
        facts = [one.facts for one in self._sources]
        self._settings = {"seed": seed, "shares": self._shares, "sources": facts}
        self._settings |= maker.facts

    @property
    def skipped(self) -> Counter[str]:
        """What was left out or cut, by reason."""
        return self._skipped.counts

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Example:
        """This process's example of the next `world`. At the end of the sequence the
        last ranks may have none where the first still have one."""
        mine = None
        for rank in range(self._world):
            try:
                example = self._draw(rank == self._rank)
            except StopIteration:
                break
            mine = example if rank == self._rank else mine
        if mine is None:
            raise StopIteration
        return mine

    def _draw(self, keep: bool) -> Example | None:
        """The next example of the whole sequence."""
        rng = random.Random(f"{self._seed}:mix:{self._drawn}")
        while True:
            alive = [i for i in range(len(self._sources)) if i not in self._ended]
            if not alive:
                raise StopIteration
            chosen = rng.choices(alive, [self._shares[i] for i in alive])[0]
            try:
                example = self._sources[chosen].draw(keep)
            except StopIteration:
                self._ended.add(chosen)
                continue
            self._drawn += 1
            return example

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` goes on; the same for all ranks but for
        what was skipped, so one rank's serves all."""
        return {
            "settings": self._settings,
            "drawn": self._drawn,
            "ended": sorted(self._ended),
            "sources": [one.state() for one in self._sources],
            "skipped": dict(self._skipped.counts),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the example after which `state` was taken.

        The examples that follow are the same, on any number of processes if that was a
        round's end. ValueError for a state of other settings or data.
        """
        for key, value in self._settings.items():
            held = state["settings"].get(key)
            if held != value:
                raise ValueError(f"state: its {key} is {held}, of this stream {value}")
        for one, place in zip(self._sources, state["sources"], strict=True):
            one.restore(place)
        self._drawn, self._ended = int(state["drawn"]), set(state["ended"])
        self._skipped.counts.clear()
        self._skipped.counts.update(state["skipped"])


def shares_of(mix: Mix) -> dict[str, float]:
    """The mix as {source: weight}; ValueError for none, or for weights that are no
    positive numbers."""
    if isinstance(mix, str):
        mix = [mix]
    if not isinstance(mix, Mapping):
        mix = dict.fromkeys(mix, 1.0)
    if not mix:
        raise ValueError("mix: got no source")
    for name, weight in mix.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            raise ValueError(f"mix: {name}: got {weight!r}, expected a weight above 0")
    return {str(name): float(weight) for name, weight in mix.items()}
