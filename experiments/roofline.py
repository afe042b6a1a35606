"""How long a GPU is at work on a compiled program, by its roofline: a kernel takes as long as its products or its bytes, whichever is longer.

The compiler of GPUs, unlike that of TPUs, does not say what it expects of a whole program. So its text is read here: what each kernel reads
and writes, of slices the part that is sliced, and how much it multiplies.
"""

import dataclasses
import math
import re

from experiments.topology import Gpu

# A large product, and a large copy, on an H100: of what NVIDIA states for it (results/bench/nvidia-h100-jax-0.11-qwen2.5-1.5b.json).
REACHED_FLOPS, REACHED_BANDWIDTH = 0.78, 0.74
START_S = 1e-6  # until a kernel that follows another one is at work
NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id", "replica-id"}
COLLECTIVES = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective|send|recv")
NAME = r"%?([\w.-]+)"
SLICES = ("dynamic-slice", "slice", "gather")
PARTS = ("sampling", "forward", "backward", "update and the rest")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program, as its text has it."""

    root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str


class Program:
    """The computations of a compiled program, {name: {name of an instruction: Instruction}}."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        found: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(rf"(?:ENTRY )?{NAME} \(.*\{{$", line)
            if head:
                found = self.computations["ENTRY" if line.startswith("ENTRY") else head[1]] = {}
            one = re.match(rf"\s+(ROOT )?{NAME} = (\(.*?\)|\S+) ([\w-]+)\((.*)$", line)
            if one:
                found[one[2]] = Instruction(bool(one[1]), one[3], one[4], tuple(re.findall(r"%([\w.-]+)", _inside(one[5]))), line)
        self.users = {name: _users(computation) for name, computation in self.computations.items()}
        self.known: dict[tuple[str, str], float] = {}  # what `used` has found

    def kernel(self, computation: str, name: str) -> tuple[int, float]:
        """Returns (bytes, floating-point operations) of an instruction, both 0 where it is no kernel; operations on float32 count twice, as they take twice as long."""
        one = self.computations[computation][name]
        if one.opcode in NO_WORK or one.opcode.endswith("-done") or COLLECTIVES.search(one.opcode):
            return 0, 0.0
        called = _called(one)
        if called:
            read = sum(self.used(called, parameter) * size(inner.shape) for parameter, inner in self._parameters(called).values())
            return int(read) + self.written(called), self.products(called)
        of = self.computations[computation]
        operands = [size(of[operand].shape) for operand in one.operands if operand in of]
        if one.opcode == "dynamic-update-slice":
            return 2 * operands[1], 0.0
        if one.opcode in SLICES:
            return 2 * _made(one), 0.0
        if one.opcode == "copy-start":
            return 2 * operands[0], 0.0
        return _made(one) + sum(operands), self._product(computation, one)

    def used(self, computation: str, name: str) -> float:
        """Returns the share of an array that its users within a fused computation read: of slices all that differ, else the largest."""
        if (computation, name) not in self.known:
            self.known[computation, name] = min(self._used(computation, name), 1.0)
        return self.known[computation, name]

    def _used(self, computation: str, name: str) -> float:
        found, one = 0.0, self.computations[computation][name]
        if one.root:
            return 1.0
        count, slices = max(elements(one.shape), 1), {}
        for user_name, place in self.users[computation].get(name, ()):
            user = self.computations[computation][user_name]
            called = _called(user)
            if called:
                found = max(found, self.used(called, self._parameters(called)[place][0]))
            elif user.opcode in SLICES and place == 0:
                slices[user.opcode, user.operands, _where(user)] = elements(user.shape) / count
            elif user.opcode == "dynamic-update-slice":
                found = max(found, 0.0 if place == 0 else 1.0)  # it is changed in its place
            elif user.opcode not in ("tuple", "custom-call", "dot") and elements(user.shape) == count:
                found = max(found, self.used(computation, user_name))
            else:
                return 1.0
        return max(found, sum(slices.values()))

    def written(self, computation: str, name: str | None = None) -> int:
        """Returns the bytes that a fused computation writes."""
        of = self.computations[computation]
        one = of[name] if name else next(one for one in of.values() if one.root)
        called = _called(one)
        if called:
            return self.written(called)
        if one.opcode == "tuple":
            return sum(self.written(computation, operand) for operand in one.operands)
        if one.opcode == "bitcast":
            return self.written(computation, one.operands[0])
        if one.opcode in ("dynamic-update-slice", "scatter") and self._is_given(computation, one.operands[0]):
            return size(of[one.operands[-1 if one.opcode == "scatter" else 1]].shape)
        return 0 if one.opcode == "parameter" else _made(one)

    def _is_given(self, computation: str, name: str) -> bool:
        """Returns whether an array is a parameter, which is changed in its place."""
        one = self.computations[computation][name]
        return one.opcode == "parameter" or (one.opcode == "bitcast" and self._is_given(computation, one.operands[0]))

    def labelled(self, computation: str, name: str) -> str:
        """Returns the text of an instruction, or of one within it, that says where in the source it comes from; "" where none does."""
        one = self.computations[computation][name]
        called = _called(one)
        if "op_name=" in one.text or not called:
            return one.text if "op_name=" in one.text else ""
        inner = sorted(self.computations[called].items(), key=lambda item: not item[1].root)
        return next((text for inside, _ in inner if (text := self.labelled(called, inside))), "")

    def products(self, computation: str) -> float:
        """Returns the floating-point operations of the products in a fused computation."""
        found = 0.0
        for one in self.computations[computation].values():
            called = _called(one)
            found += self.products(called) if called else self._product(computation, one)
        return found

    def _product(self, computation: str, one: Instruction) -> float:
        is_dot, is_blas = one.opcode == "dot", one.opcode == "custom-call" and re.search(r'custom_call_target="__cublas', one.text)
        if not is_dot and not is_blas:
            return 0.0
        left = self.computations[computation][one.operands[0]].shape
        contracted = re.search(r"lhs_contracting_dim(?:ension)?s\"?[=:][\[{]([\d,\"]*)[\]}]", one.text)
        (_, bits, dims), (_, _, made) = _arrays(left)[0], _arrays(one.shape)[0]
        length = math.prod(dims[int(place)] for place in re.findall(r"\d+", contracted[1])) if contracted else 1
        return 2.0 * math.prod(made) * length * max(bits // 16, 1)  # twice as slow of four bytes

    def _parameters(self, computation: str) -> dict[int, tuple[str, Instruction]]:
        found = {}
        for name, one in self.computations[computation].items():
            if one.opcode == "parameter":
                number = re.search(r" parameter\((\d+)\)", one.text)
                found[int(number[1]) if number else 0] = (name, one)
        return found


def _users(computation) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for name, one in computation.items():
        for place, operand in enumerate(one.operands):
            found.setdefault(operand, []).append((name, place))
    return found


def _where(one: Instruction) -> str:
    found = re.search(r"\b(?:slice|dynamic_slice_sizes|slice_sizes)=\{[^}]*\}", one.text)
    return found[0] if found else ""


def _called(one: Instruction) -> str | None:
    found = re.search(rf"\bcalls={NAME}", one.text)
    return found[1] if found else None


def _made(one: Instruction) -> int:
    """Returns the bytes of what an instruction yields, without the workspace of cuBLAS."""
    return size(re.sub(r"\bs8\[\d+\]", "", one.shape) if one.opcode in ("custom-call", "get-tuple-element") else one.shape)


def _inside(text: str) -> str:
    """Returns text up to the bracket that closes what was opened before it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place]
    return text


def _arrays(shape: str) -> list[tuple[str, int, list[int]]]:
    """Returns (kind, bits, dimensions) of each array of a shape."""
    return [
        (kind, int(bits or 8), [int(n) for n in dims.split(",") if n]) for kind, bits, dims in re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", shape)
    ]


def size(shape: str) -> int:
    """Returns the bytes of a shape."""
    return sum(max(bits // 8, 1) * math.prod(dims) for kind, bits, dims in _arrays(shape) if kind != "token")


def elements(shape: str) -> int:
    """Returns how many numbers a shape holds."""
    return sum(math.prod(dims) for _, _, dims in _arrays(shape))


def part_of(text: str, sampling: bool) -> str:
    """Returns the part of a step that an instruction belongs to, by its text."""
    op = re.search(r'op_name="([^"]*)"', text)
    name = op[1] if op else ""
    return "sampling" if sampling else "backward" if "transpose(jvp" in name else "forward" if "jvp(" in name else "update and the rest"


def seconds(text: str, lines, gpu: Gpu) -> dict[str, float]:
    """Returns for how long a GPU is at work on a compiled program, by part; what GPUs send each other is not in it.

    Args:
      text: the program.
      lines: `compiled.run_lines` of it.
    """
    program, found = Program(text), dict.fromkeys(PARTS, 0.0)
    for line in lines:
        one = None if line.fused else re.match(rf"\s+(?:ROOT )?{NAME} = ", line.text)
        moved, multiplied = program.kernel(line.computation, one[1]) if one else (0, 0.0)
        if one and moved:
            part = part_of(program.labelled(line.computation, one[1]), line.sampling)
            found[part] += line.times * (START_S + max(moved / (REACHED_BANDWIDTH * gpu.bandwidth * 1e12), multiplied / (REACHED_FLOPS * gpu.tflops * 1e12)))
    return found
