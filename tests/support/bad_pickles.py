"""Pickles that a reader of checkpoints must refuse: such as run code, and such as lie or grow.

Assembled from pickle's instructions, so that each is exactly what it says.
"""

import struct
from collections.abc import Iterator


def text(value: str) -> bytes:
    """Push a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """Push a whole number."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(values: tuple[int, ...]) -> bytes:
    """Push a tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def name(dotted: str) -> bytes:
    """Push a class or function."""
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted: str, *arguments: bytes) -> bytes:
    """Call a class or function."""
    return name(dotted) + b"(" + b"".join(arguments) + b"tR"


def dictionary(**values: bytes) -> bytes:
    """Push a dictionary."""
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def storage(key: str = "0", kind: str = "torch.FloatStorage", count: int = 4) -> bytes:
    """Push a storage."""
    return b"(" + text("storage") + name(kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    of: bytes = storage(),
    start: int = 0,
    shape: tuple[int, ...] = (2, 2),
    strides: tuple[int, ...] = (2, 1),
) -> bytes:
    """Push a tensor; by default the one of float32 that `archive` has the bytes of."""
    hooks = call("collections.OrderedDict")
    return call(
        "torch._utils._rebuild_tensor_v2",
        *(of, number(start), numbers(shape), numbers(strides), b"\x89", hooks),
    )


def state_dict(**extra: bytes) -> bytes:
    """Make a whole pickle of a good tensor and what else is given."""
    return b"\x80\x02" + dictionary(weight=tensor(), **extra) + b"."


def running(canary: str) -> Iterator[tuple[str, bytes, str]]:
    """Go through pickles that make the file `canary` when Python's unpickler reads them.

    Gives each one's name, the pickle, and what the message must say.
    """
    command = f"touch {canary}"
    system = call("posix.system", text(command))
    python = text(f"open({canary!r}, 'w').close()")
    refused = r"names posix\.system at byte \d+"
    yield "GLOBAL and REDUCE", b"\x80\x02" + system + b".", refused
    yield (
        "STACK_GLOBAL",
        b"\x80\x04" + text("posix") + text("system") + b"\x93" + text(command) + b"\x85R.",
        refused,
    )
    yield "INST", b"(" + text(command) + b"iposix\nsystem\n.", refused
    yield "OBJ", b"(" + name("posix.system") + text(command) + b"o.", refused
    mapped = name("builtins.map") + name("posix.system") + b"](" + text(command) + b"e\x86\x81"
    yield (
        "NEWOBJ",
        b"\x80\x02" + name("builtins.bytes") + mapped + b"\x85\x81.",
        refused,
    )
    yield (
        "BUILD",
        b"\x80\x02"
        + call("types.SimpleNamespace")
        + dictionary(__setstate__=name("posix.system"))
        + b"b"
        + text(command)
        + b"b.",
        refused,
    )
    yield "in a state dict", state_dict(bias=system), refused
    yield "in a list in a list", state_dict(other=b"](](" + system + b"ee"), refused
    yield "a key", b"\x80\x02}" + system + tensor() + b"s.", refused
    yield "thrown away", b"\x80\x02" + system + b"0" + state_dict()[2:], refused
    yield "after the memo", b"\x80\x02]q\0" + system + b"ah\0.", refused
    yield "the type of a storage", state_dict(bias=b"(" + text("storage") + system + b"tQ"), refused
    yield "an argument of a tensor", state_dict(b=tensor(of=system)), refused
    yield "a hook", state_dict(b=call("collections.OrderedDict", system)), refused
    yield "eval", state_dict(b=call("builtins.eval", python)), r"names builtins\.eval"
    yield "exec", state_dict(b=call("builtins.exec", python)), r"names builtins\.exec"
    yield "exec of Python 2", state_dict(b=call("__builtin__.eval", python)), "__builtin__.eval"
    yield (
        "getattr",
        b"\x80\x02"
        + call("builtins.getattr", call("importlib.import_module", text("os")), text("system"))
        + text(command)
        + b"\x85R.",
        r"names importlib\.import_module",
    )
    yield (
        "subprocess",
        state_dict(b=call("subprocess.call", b"](" + text("touch") + text(canary) + b"e")),
        r"names subprocess\.call",
    )
    inner = b"B" + struct.pack("<I", len(system) + 1) + system + b"."
    yield "loads", state_dict(b=call("_pickle.loads", inner)), r"names _pickle\.loads"
    yield (
        "partial",
        b"\x80\x02" + call("functools.partial", name("posix.system"), text(command)) + b")R.",
        refused,
    )
    yield (
        "a dotted name",
        b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(command) + b"\x85R.",
        r"names os\.path\.os\.system",
    )
    yield "runpy", state_dict(b=call("runpy._run_code", python, b"}")), r"names runpy\._run_code"


LABEL = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
REFUSED: dict[str, tuple[bytes, str]] = {
    "torch.load": (state_dict(b=call("torch.load", text("x"))), r"names torch\.load at"),
    "torch.storage._load_from_bytes": (
        state_dict(b=call("torch.storage._load_from_bytes", b"C\1.")),
        r"names torch\.storage\._load_from_bytes",
    ),
    "torch.hub.load": (state_dict(b=call("torch.hub.load", text("x"))), r"names torch\.hub\.load"),
    "a module": (state_dict(b=name("torch.nn.Linear")), r"names torch\.nn\.Linear"),
    "an attribute of a known class": (
        b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93.",
        r"names collections\.OrderedDict\.fromkeys",
    ),
    "a label is called": (state_dict(b=call(LABEL)), f"names {LABEL}"),
    "a whole state dict": (
        b"\x80\x02"
        + dictionary(state_dict=call("mine.StateDict"), other=dictionary(w=tensor()))
        + b".",
        r"names mine\.StateDict",
    ),
    "objects and no tensors": (
        b"\x80\x02" + dictionary(state_dict=b"}", other=call("mine.Model")) + b".",
        r"names mine\.Model",
    ),
    "an object filled in": (state_dict(b=call("mine.Dict") + b"}b(" + text("a") + b"Nu"), "mine"),
    "an object extended": (state_dict(b=call("mine.List") + b"(Ne"), r"names mine\.List"),
    "a tensor of an object": (state_dict(b=tensor(of=call("mine.Storage"))), "mine.Storage"),
    "an object's parameter": (
        state_dict(b=call("torch._utils._rebuild_parameter", call("mine.Tensor"))),
        r"names mine\.Tensor",
    ),
    "a system's name beside": (
        b"\x80\x02" + dictionary(state_dict=dictionary(w=tensor()), hook=name("os.system")) + b".",
        r"names os\.system",
    ),
    "complex numbers": (
        state_dict(b=storage(kind="torch.ComplexFloatStorage")),
        r"holds values of torch\.ComplexFloatStorage",
    ),
    "a storage class is called": (
        state_dict(b=call("torch.FloatStorage", number(2**40))),
        r"calls torch\.FloatStorage",
    ),
    "a text is called": (b"\x80\x02" + text("print") + b")R.", "calls a str"),
    "NEWOBJ_EX": (b"\x80\x04" + name("torch.Size") + b")}\x92.", "instruction NEWOBJ_EX"),
    "EXT1": (b"\x80\x02\x82\1.", "instruction EXT1"),
    "EXT2": (b"\x80\x02\x83\1\0.", "instruction EXT2"),
    "EXT4": (b"\x80\x02\x84\1\0\0\0.", "instruction EXT4"),
    "INST of a known class": (b"(icollections\nOrderedDict\n.", "instruction INST"),
    "OBJ of a known class": (b"(" + name("collections.OrderedDict") + b"o.", "instruction OBJ"),
    "BUILD of a class": (
        b"\x80\x02" + name("torch.FloatStorage") + b"}b.",
        r"changes torch\.FloatStorage",
    ),
    "BUILD of a tensor": (b"\x80\x02" + tensor() + b"}b.", "changes a StoredTensor"),
    "BUILD of a dictionary": (b"\x80\x02}}b.", "changes a dict"),
    "PERSID": (b"Pstorage\n.", "instruction PERSID"),
    "a buffer": (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    "a bytearray": (b"\x80\x05\x96" + bytes(8) + b".", "instruction BYTEARRAY8"),
    "a persistent id of code": (state_dict(b=text("os.system") + b"Q"), "no storage's"),
}


def doubled(levels: int) -> bytes:
    """Nest lists so that each holds the one before twice: 2 ** levels ways lead to the first."""
    lists = [b"](" + get(i) * 2 + b"e" + put(i + 1) for i in range(levels)]
    pickled = number(1) + put(0) + b"".join(lists)
    return b"\x80\x02" + pickled + dictionary(a=get(levels)) + b"."


def put(index: int) -> bytes:
    """Move a value from the stack to the memo."""
    return b"r" + struct.pack("<I", index) + b"0"


def get(index: int) -> bytes:
    """Push a value of the memo."""
    return b"j" + struct.pack("<I", index)


GROWING: dict[str, tuple[bytes, str]] = {
    "doubled lists": (doubled(40), "too many or too deep"),
    "a list in itself": (b"\x80\x02}" + text("a") + b"]q\0h\0as.", "too many or too deep"),
    "a dictionary in itself": (b"\x80\x02}q\0" + text("a") + b"h\0s.", "too many or too deep"),
    "a deep list": (b"\x80\x02}" + text("a") + b"]" * 50_000 + b"a" * 49_999 + b"s.", "too deep"),
    "a deep tuple": (b"\x80\x02}" + text("a") + b")" + b"\x85" * 50_000 + b"s.", "too deep"),
    "long names": (
        b"\x80\x02" + (b"}" + text("n" * 100_000)) * 3 + b"](" + number(1) * 2000 + b"e" + b"sss.",
        "too many",
    ),
    "too many instructions": (b"\x80\x02" + b"}" * 2_000_001 + b".", "more than 2000000 instruc"),
    "too many marks": (b"\x80\x02" + b"(" * 2_000_001 + b".", "more than 2000000 instructions"),
    "a long number": (
        b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\1" * 10**6 + b".",
        "256 bits",
    ),
    "a number of 4 GB": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "cannot be read at byte"),
    "a number of many digits": (b"L" + b"9" * 5000 + b"L\n.", "cannot be read at byte"),
    "a text of 2**62 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".", "cannot be read"),
    "a memo of nothing": (b"\x80\x02j\xff\xff\xff\xff.", "cannot be read at byte 2"),
    "a stack of nothing": (b"\x80\x02R.", "cannot be read at byte 2"),
    "a mark of nothing": (b"\x80\x02t.", "cannot be read at byte 2"),
    "an unknown instruction": (b"\x80\x02\xff.", "cannot be read"),
    "no end": (b"\x80\x02}", "cannot be read"),
    "values left": (b"\x80\x02}}.", "belong to nothing"),
    "an open mark": (b"\x80\x02}(}.", "belong to nothing"),
    "a key that is a list": (b"\x80\x02}]Ns.", "a key that is a list"),
    "a key twice": (b"\x80\x02}(" + (text("a") + b"N") * 2 + b"u.", "'a' twice in a dictionary"),
    "pairs for a list": (b"\x80\x02]NNs.", "pairs for a list"),
    "items for a dictionary": (b"\x80\x02}Na.", "items for a dict"),
    "a key without a value": (b"\x80\x02}(" + text("a") + b"u.", "pairs for a dict"),
    "arguments that are none": (
        b"\x80\x02" + name("torch.Size") + b"]R.",
        "arguments that are a list",
    ),
    "many arguments": (b"\x80\x02" + call("torch.Size", b"N" * 1000) + b".", "1000 arguments"),
    "half a character": (b"\x80\2X\3\0\0\0\xed\xa0\x80.", "a text .* no valid Unicode"),
    "a name that is no text": (b"\x80\x04NN\x93.", "a name that is no text"),
}
