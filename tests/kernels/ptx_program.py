"""From PTX text to what ptx_machine.cc runs: a program for each kernel. What isn't known here is refused by name."""

import dataclasses
import re

import numpy as np

KINDS = {"b": 0, "u": 1, "s": 2, "f": 3, "bf16": 4, "f16": 5, "pred": 6, "bf16x2": 7}
SPACES = {"global": 1, "shared": 2, "local": 3, "param": 4}
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]
COMPARISONS = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5, "lo": 2, "ls": 3, "hi": 4, "hs": 5}
ATOMICS = {"add": 0, "min": 1, "max": 2, "exch": 3, "cas": 4, "and": 5, "or": 6, "inc": 7}
SHUFFLES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}
VOTES = {"all": 0, "any": 1, "ballot": 2}
ROUNDINGS = {"rzi": 0, "rni": 1, "rmi": 2, "rpi": 3}
# What changes neither results nor what is checked: caching, rounding to nearest (the only one there is), scopes.
IGNORED = set(
    (
        "nc volatile weak relaxed acquire release cta gpu sys ca cg cs cv wb lu evict_first evict_last "
        "no_allocate L1::evict_last L1::evict_first L1::no_allocate L1::evict_normal L2::64B L2::128B "
        "L2::256B L2::evict_last L2::evict_first rn uni aligned sync acq_rel noftz cta::"
    ).split()
)
# Alignment, type, name, number of elements.
PARAMETER = re.compile(
    r"\s*\.param\s+(?:\.align (\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align \d+\s+)?)?"
    r"(\w+)(?:\[(\d+)\])?\s*"
)
ARGUMENTS = 24
FIELDS = 8 + ARGUMENTS  # int32 of an `Instruction`


@dataclasses.dataclass
class Program:
    """A kernel: `code` int32 [instructions, FIELDS], `slots` uint64: what a thread starts with."""

    name: str
    code: np.ndarray
    slots: np.ndarray
    parameters: np.ndarray  # int32 [parameters, 2]: bytes, alignment
    shared: int
    local: int
    most_threads: int


def programs(ptx: str, operations: dict[str, int]) -> list[Program]:
    """All kernels of a module. `operations`: the machine's numbers. Raises NotImplementedError for what isn't known."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    bodies = list(re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)([^{;]*)\n\{\n(.*?)\n\}\n", ptx + "\n", re.DOTALL))
    outside = ptx
    for body in bodies:
        outside = outside.replace(body.group(0), "")
    outside = re.sub(r"\.version \S+\s+\.target [\w, ]+\s+\.address_size 64|\.(visible|weak|extern)\s", " ", outside)
    names = []  # of shared memory that is as large as a launch says, behind all other
    for statement in filter(None, (" ".join(s.split()) for s in outside.split(";"))):
        found = re.fullmatch(r"\.shared \.align \d+ \.b8 (\w+)\[\]", statement)
        if not found:
            raise NotImplementedError(f"outside kernels: {statement[:200]}")
        names.append(found[1])
    return [_Kernel(operations, names).program(*body.groups()) for body in bodies]


class _Kernel:
    def __init__(self, operations, dynamic):
        self.operations, self.dynamic = operations, dynamic
        self.addresses = {}  # of names: parameters, shared and local arrays
        self.shared, self.local, self.most_threads = 0, 0, 0
        self.slots = {name: i for i, name in enumerate(SPECIAL)}
        self.start = [0] * len(SPECIAL)
        self.code, self.labels, self.tables = [], {}, {}

    def program(self, name, parameters, attributes, body):
        sizes, at = [], 0
        for parameter in filter(str.strip, parameters.split(",")):
            found = PARAMETER.fullmatch(parameter)
            if not found:
                raise NotImplementedError(f"parameter: {parameter}")
            element = int(re.sub(r"\D", "", found[2])) // 8
            size, alignment = element * int(found[4] or 1), int(found[1] or element)
            at = -(-at // alignment) * alignment
            self.addresses[found[3]] = at
            at += size
            sizes.append((size, alignment))
        if most := re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", attributes):
            self.most_threads = int(np.prod([int(n) for n in most.groups() if n]))
        for alignment, array, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", body):
            self.addresses[array] = -(-self.shared // int(alignment)) * int(alignment)
            self.shared = self.addresses[array] + int(size)
        self.shared = -(-self.shared // 16) * 16
        self.addresses |= dict.fromkeys(self.dynamic, self.shared)
        branches = []
        for statement in re.sub(r"([$\w]+):(?!:)", r" LABEL \1 ;", body).split(";"):
            statement = " ".join(statement.split()).strip("{ ") if "LABEL" in statement else " ".join(statement.split())
            # Braces of inline assembly; those of vectors have an operand before or behind.
            statement = re.sub(r"^[{}\s]+(?=[.@a-z]|$|LABEL)", "", statement)
            if not statement:
                continue
            if statement.startswith("LABEL"):
                label = statement.split()[1]
                if label in self.labels:
                    raise NotImplementedError(f"label {label} is there twice")
                self.labels[label] = len(self.code)
            elif statement.startswith((".reg", ".pragma", ".loc", ".shared")):
                continue
            elif found := re.fullmatch(r"\.local \.align (\d+) \.b8 (\w+)\[(\d+)\]", statement):
                self.local = -(-self.local // int(found[1])) * int(found[1])
                self.addresses[found[2]] = self.local
                self.local += int(found[3])
            else:
                try:
                    branches.append((len(self.code), self.instruction(statement)))
                except NotImplementedError as error:
                    raise NotImplementedError(f"{error}, in: {statement}") from None
        for index, label in branches:
            if label is not None:
                self.code[index][6] = self.labels[label]
        return Program(
            name,
            np.array(self.code, np.int32),
            np.array(self.start, np.uint64),
            np.array(sizes, np.int32).reshape(-1, 2),
            self.shared,
            self.local,
            self.most_threads,
        )

    # --- Operands --------------------------------------------------------------------------------

    def constant(self, value):
        return self.slot(("constant", value & (1 << 64) - 1), value & (1 << 64) - 1)

    def slot(self, key, value=0):
        if key not in self.slots:
            self.slots[key] = len(self.start)
            self.start.append(value)
        return self.slots[key]

    def operand(self, text):
        text = text.strip()
        if text == "_":
            return -1
        if text in self.slots and text.startswith("%"):
            return self.slots[text]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return self.constant(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self.constant(int(text.rstrip("U"), 0))
        if text in self.addresses:
            return self.constant(self.addresses[text])
        if text == "WARP_SZ":
            return self.constant(32)
        if re.fullmatch(r"%\w+|[a-zA-Z_]\w*", text):  # a register; those of inline assembly have no %
            if re.match(r"%(clock|globaltimer|smid|nsmid|gridid|lanemask|dynamic_smem|total_smem|envreg)", text):
                raise NotImplementedError(f"special register {text}")
            return self.slot(text)
        raise NotImplementedError(f"operand {text!r}")

    def address(self, text):
        """Slots of base and offset of `[base+offset]`."""
        base, _, offset = text.strip("[] ").partition("+")
        return [self.operand(base), self.operand(offset or "0")]

    # --- Instructions ----------------------------------------------------------------------------

    def instruction(self, statement):
        """Appends it; the label that it branches to, if any."""
        guard, negated = -1, 0
        if found := re.match(r"@(!?)([%\w]+)\s+(.*)", statement):
            guard, negated, statement = self.operand(found[2]), int(found[1] == "!"), found[3]
        name, _, rest = statement.partition(" ")
        base, *modifiers = name.split(".")
        # Vectors and addresses are one operand.
        operands = [a.strip() for a in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{\[]+", rest) if a.strip()]
        types = [t for m in modifiers if (t := _type(m)) is not None]
        rest_of = [m for m in modifiers if _type(m) is None and m not in IGNORED]
        op, mode, target, arguments, label = self.translate(base, rest_of, types, operands, modifiers)
        types = [*types, 0, 0]
        if len(arguments) > ARGUMENTS:
            raise NotImplementedError(f"{len(arguments)} operands")
        if op not in self.operations:
            raise NotImplementedError(f"instruction {name}")
        row = [self.operations[op], types[0], types[1], mode, guard, negated, target, len(arguments)]
        self.code.append(row + arguments + [-1] * (ARGUMENTS - len(arguments)))
        return label

    def translate(self, base, modifiers, types, operands, all_modifiers):
        """Operation, mode, target, arguments, label."""

        def only(*known):
            if unknown := [m for m in modifiers if m not in known]:
                raise NotImplementedError(f"{base}.{'.'.join(all_modifiers)}: {', '.join(unknown)}")

        vector = lambda text: [self.operand(part) for part in text.strip("{}").split(",")]
        plain = lambda: [self.operand(o) for o in operands]
        match base:
            case "ret" | "exit":
                return "ret", 0, 0, [], None
            case "trap":
                return "trap", 0, 0, [], None
            case "membar" | "fence" | "prefetch" | "prefetchu" | "discard" | "griddepcontrol":
                return "nop", 0, 0, [], None
            case "bra":
                return "bra", 0, 0, [], operands[0]
            case "ld" | "st" | "ldu":
                if base == "st":
                    operands = operands[::-1]
                space = next((m for m in modifiers if m.split("::")[0] in SPACES), None)
                only("v2", "v4", "v8", "param::entry", "shared::cta", *SPACES)
                values = vector(operands[0])
                mode = SPACES[space.split("::")[0]] if space else 0
                return base.replace("ldu", "ld"), mode, len(values), [*self.address(operands[1]), *values], None
            case "mov":
                only()
                if operands[0].startswith("{"):
                    return "unpack", 0, 0, [*vector(operands[0]), self.operand(operands[1])], None
                if operands[1].startswith("{"):
                    return "pack", 0, 0, [self.operand(operands[0]), *vector(operands[1])], None
                return "mov", 0, 0, plain(), None
            case "cvta":
                only("to", "global", "shared", "local", "param", "param::entry")
                if "shared" in modifiers:
                    return ("to_shared" if "to" in modifiers else "from_shared"), 0, 0, plain(), None
                if "local" in modifiers:
                    raise NotImplementedError("generic addresses of local memory")
                return "mov", 0, 0, plain(), None
            case "cvt":
                only(*ROUNDINGS, "rz", "sat")
                if "rz" in modifiers or "sat" in modifiers:
                    raise NotImplementedError(f"cvt.{'.'.join(all_modifiers)}")
                return "cvt", next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), 0), 0, plain(), None
            case "mul" | "mad":
                only("lo", "hi", "wide")
                floating = types[0] >> 8 in (KINDS["f"], KINDS["bf16"], KINDS["bf16x2"])
                which = next(iter(modifiers), None)
                if floating or which is None:
                    return ("fma" if base == "mad" else "mul_lo"), 0, 0, plain(), None
                return f"{base}_{which}", 0, 0, plain(), None
            case "add" | "sub" | "fma" | "div" | "rem" | "min" | "max" | "neg" | "abs" | "shl" | "shr":
                only("full", "approx") if base == "div" else only()
                return base, 0, 0, plain(), None
            case "not" | "and" | "or" | "xor":
                only()
                return f"{base}_", 0, 0, plain(), None
            case "bfi" | "bfe" | "popc" | "clz" | "brev" | "bfind" | "prmt" | "lop3" | "selp":
                only("b32") if base == "prmt" else only()
                return base, 0, 0, plain(), None
            case "shf":
                only("l", "r", "wrap", "clamp")
                return f"shf_{'l' if 'l' in modifiers else 'r'}", int("clamp" in modifiers), 0, plain(), None
            case "setp" | "set":
                comparison = next(
                    (m for m in modifiers if m.removesuffix("u") in COMPARISONS or m in COMPARISONS), None
                )
                if comparison is None:
                    raise NotImplementedError(f"comparison of {base}.{'.'.join(all_modifiers)}")
                only(comparison)
                unordered = comparison not in COMPARISONS
                mode = COMPARISONS[comparison.removesuffix("u") if unordered else comparison] | 16 * unordered
                first, _, second = operands[0].partition("|")
                if len(operands) > 3:
                    raise NotImplementedError("a comparison combined with another predicate")
                if base == "set" and types[0] != _type("u32"):
                    raise NotImplementedError("set to anything but u32")
                if base == "set":
                    types.pop(0)
                return base, mode, 0, [*map(self.operand, (first, second or "_", *operands[1:]))], None
            case "atom" | "red":
                space = next((m for m in modifiers if m in SPACES), "global")
                only("global", "shared", "noftz", *ATOMICS)
                which = next(m for m in modifiers if m in ATOMICS)
                first = [self.operand(operands[0])] if base == "atom" else []
                address, *values = operands[len(first) :]
                arguments = [*first, *self.address(address), *map(self.operand, values)]
                return base, ATOMICS[which], SPACES[space], arguments, None
            case "cp":
                return self.asynchronous(modifiers, operands)
            case "bar" | "barrier":
                if operands and operands[0] == "warp" or "warp" in modifiers:
                    return "warp_sync", 0, 0, plain(), None
                only("cta")
                if operands != ["0"]:
                    raise NotImplementedError("a barrier of some threads, or another than 0")
                return "bar", 0, 0, [], None
            case "shfl":
                only("b32", *SHUFFLES)
                first, _, second = operands[0].partition("|")
                which = next(SHUFFLES[m] for m in modifiers if m in SHUFFLES)
                return "shfl", which, 0, [*map(self.operand, (first, second or "_", *operands[1:]))], None
            case "vote":
                only(*VOTES)
                negated = operands[1].startswith("!")
                operands = [operands[0], operands[1].lstrip("!"), operands[2]]
                which = next(VOTES[m] for m in modifiers if m in VOTES)
                return "vote", which, int(negated), [self.operand(o) for o in operands], None
            case "match":
                only("any")
                return "match_any", 0, 0, plain(), None
            case "redux":
                which = next(m for m in modifiers)
                only(which)
                return "redux", self.operations[which if which in self.operations else f"{which}_"], 0, plain(), None
            case "ldmatrix":
                only("m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
                values = vector(operands[0])
                arguments = [*values, *self.address(operands[1])]
                return "ldmatrix", int("trans" in modifiers), len(values), arguments, None
            case "mma":
                only("m16n8k16", "m16n8k8", "row", "col")
                if types != [_type("f32"), _type("bf16"), _type("bf16"), _type("f32")] or modifiers[-2:] != [
                    "row",
                    "col",
                ]:
                    raise NotImplementedError(f"mma.{'.'.join(all_modifiers)}")
                return "mma", 0, int(modifiers[0].split("k")[1]), [a for o in operands for a in vector(o)], None
        raise NotImplementedError(f"instruction {base}.{'.'.join(all_modifiers)}")

    def asynchronous(self, modifiers, operands):
        if modifiers[:1] != ["async"] or "bulk" in modifiers:
            raise NotImplementedError(f"cp.{'.'.join(modifiers)}")
        if "commit_group" in modifiers:
            return "commit", 0, 0, [], None
        if "wait_all" in modifiers:
            return "wait_all", 0, 0, [], None
        if "wait_group" in modifiers:
            return "wait_group", 0, 0, [self.operand(operands[0])], None
        if unknown := set(modifiers) - {"async", "shared", "shared::cta", "global"}:
            raise NotImplementedError(f"cp.async: {unknown}")
        sizes = [self.operand(o) for o in operands[2:]]
        return "cp_async", 0, 0, [*self.address(operands[0]), *self.address(operands[1]), *sizes], None


def _type(modifier):
    """Bits and kind of `.u32`, `.pred`, ...; None for other modifiers."""
    if modifier == "pred":
        return KINDS["pred"] << 8 | 1
    if modifier in ("bf16", "f16"):
        return KINDS[modifier] << 8 | 16
    if modifier == "bf16x2":
        return KINDS["bf16x2"] << 8 | 32
    if found := re.fullmatch(r"([busf])(8|16|32|64)", modifier):
        return KINDS[found[1]] << 8 | int(found[2])
    return None
