"""What the text of an optimised program tells: cycles, collectives, copies.

A TPU's compiler writes beside each instruction how many cycles it should take. A loop stands there
once; how often it runs is told by what its condition compares with.
"""

import collections
import re
from typing import NamedTuple

# Instructions by which devices send each other arrays.
COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
    "collective-broadcast",
)  # fmt: skip

# Instructions whose result is what they were given, in another place or layout.
MOVES = ("bitcast", "convert", "copy", "copy-done", "copy-start", "while")

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: unique in its program.
      opcode: what it does.
      shape: of its result, with its layout.
      operands: names of what it takes.
      text: the whole line.
      origin: where in the traced program it comes from, names of scopes between slashes.
      cycles: estimated, of this line alone.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    text: str
    origin: str
    cycles: int


class Cost(NamedTuple):
    """Cycles of a program.

    Attributes:
      always: of what runs at every call, and of the dearer branch of conditions without a name.
      branches: of the dearer branch of the conditions in a scope, by the scope's name.
      unknown_loops: loops of which the text does not tell how often they run; counted once.
    """

    always: int
    branches: dict[str, int]
    unknown_loops: int


class Program:
    """A parsed program.

    Attributes:
      computations: lists of instructions by name.
      entry: name of the one that is called.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                current = self.computations[opened[2]] = []
                self.entry = opened[2] if opened[1] else self.entry
            elif (found := _INSTRUCTION.match(line)) and (one := _instruction(found[2], found[3])):
                current.append(one)
        self._by_name = {one.name: one for lines in self.computations.values() for one in lines}
        # Parameters of a loop's body and condition -> the loop.
        self._loop_of = {
            inside.name: one
            for one in self._by_name.values()
            if one.opcode == "while"
            for part in ("body", "condition")
            for inside in self.computations[_attribute(one.text, part)]
            if inside.opcode == "parameter"
        }

    def instructions(self) -> list[Instruction]:
        """All, also those inside fusions and loops."""
        return list(self._by_name.values())

    def collectives(self) -> dict[str, int]:
        """How many collectives of each kind the text holds; one within a loop counts once."""
        counts: collections.Counter[str] = collections.Counter()
        for one in self._by_name.values():
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                counts[kind] += 1
        return dict(counts)

    def cost(self, scopes: tuple[str, ...] = ()) -> Cost:
        """Cycles of a call.

        Args:
          scopes: names of `jax.named_scope`s, whose conditions are counted apart.
        """
        branches = dict.fromkeys(scopes, 0)
        unknown: list[str] = []

        def of_computation(name: str) -> int:
            return sum(of_instruction(one) for one in self.computations[name])

        def of_instruction(one: Instruction) -> int:
            if one.opcode == "while":
                body, times = _attribute(one.text, "body"), self.rounds(one)
                if times is None:
                    unknown.append(one.name)
                return of_computation(body) * (1 if times is None else times)
            if one.opcode == "conditional":
                dearest = max(map(of_computation, _branches(one.text)))
                for scope in scopes:
                    if scope in one.origin.split("/"):
                        branches[scope] += dearest
                        return 0
                return dearest
            if one.opcode == "call":
                return of_computation(_attribute(one.text, "to_apply"))
            return one.cycles

        always = of_computation(self.entry)
        return Cost(always, branches, len(unknown))

    def rounds(self, loop: Instruction) -> int | None:
        """How often a loop runs, a `while`; None where its text does not tell.

        Its counter and what that is compared with have to be constants before it begins.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = self.computations[_attribute(loop.text, "condition")]
        compared = [one for one in condition if one.opcode == "compare"]
        if len(compared) != 1 or "direction=LT" not in compared[0].text:
            return None
        counter, limit = (self._before(name) for name in compared[0].operands)
        return None if counter is None or limit is None else limit - counter

    def _before(self, name: str) -> int | None:
        """A whole number as it is before the loops around it begin, if it is a constant then."""
        element: list[int] = []  # which element of a tuple is followed, the innermost last
        for _ in self._by_name:  # no way is longer
            one = self._by_name.get(name)
            if one is None:
                return None
            if one.opcode == "constant":
                value = re.search(r"constant\((-?\d+)\)", one.text)
                return int(value[1]) if value else None
            if one.opcode == "get-tuple-element":
                place = re.search(r"index=(\d+)", one.text)
                assert place is not None
                element.append(int(place[1]))
                name = one.operands[0]
            elif one.opcode == "tuple" and element:
                name = one.operands[element.pop()]
            elif one.opcode == "parameter" and name in self._loop_of:
                name = self._loop_of[name].operands[0]
            elif one.opcode in MOVES:
                name = one.operands[0]
            else:
                return None
        return None


def _instruction(name: str, rest: str) -> Instruction | None:
    found = _OPCODE.search(rest)
    if found is None:
        return None
    shape, arguments = rest[: found.start(1)].strip(), rest[found.end() :]
    depth, inside = 1, []
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            break
        inside.append(letter)
    operands = tuple(_NAME.findall("".join(inside)))
    origin = re.search(r'op_name="([^"]*)"', rest)
    # A nested fusion's cycles are part of those of the line that calls it: the first are its own.
    cycles = _CYCLES.search(rest)
    return Instruction(
        name, found[1], shape, operands, rest, origin[1] if origin else "",
        int(cycles[1]) if cycles else 0,
    )  # fmt: skip


def _attribute(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", text)
    assert found is not None, f"no {name} in {text[:200]}"
    return found[1]


def _branches(text: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", text):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [_attribute(text, side) for side in ("true_computation", "false_computation")]
