"""Files made to crash, hang or fill the memory of who reads them, or that chance made; and a process that reads them.

Run as a script, this reads every file of a folder and prints one line of JSON for each; where a file kills the process,
the lines end.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MEMORY = 2**32  # bytes that the reading process may map, to spare the machine that runs the tests


# -- pickles by hand -------------------------------------------------------------------------------------------------


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def value(data: Any) -> bytes:
    """Plain data, without the memo, which would get into the way of others'."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 3)
    pickler.fast = True
    pickler.dump(data)
    return file.getvalue().removeprefix(b"\x80\x03").removesuffix(b".")


def together(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + together(*arguments) + b"R"


def build(thing: bytes, *state: bytes) -> bytes:
    return thing + together(*state) + b"b"


def raw(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


ADDRESS = raw(b"\x01" * 8)
NUMBERS = raw(bytes(8))
DTYPE = name("numpy", "dtype")
RECONSTRUCT = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), value((0,)), value(b"b"))
SCALAR = name("numpy.core.multiarray", "scalar")
FLOAT = call(DTYPE, value("f4"))
OBJECT = call(DTYPE, value("O"))
# eight bytes without flags, in which a field says that they are a pointer
HIDDEN = build(
    call(DTYPE, value("V8")),
    *(value(3), value("|"), value(None), value(("f",)), b"}" + value("f") + together(OBJECT, value(0)) + b"s"),
    *(value(8), value(1), value(0)),
)
ORDERED_DICT = call(name("collections", "OrderedDict"))
LOAD_STORAGE = name("torch.storage", "_load_from_bytes")
PARAMETER = name("torch._utils", "_rebuild_parameter")


def array(shape: Any, dtype: bytes = FLOAT, data: bytes = NUMBERS) -> bytes:
    return build(RECONSTRUCT, value(1), value(shape), dtype, value(False), data)


def from_buffer(shape: Any, dtype: bytes = FLOAT, data: bytes = NUMBERS) -> bytes:
    return call(name("numpy.core.numeric", "_frombuffer"), data, dtype, value(shape), value("C"))


def storage_file(
    length: int = 2,
    data: bytes = bytes(8),
    *,
    kind: str = "FloatStorage",
    magic: int = 0x1950A86A20F9469CFC6C,
    keys: Any = ("0",),
    view: Any = None,
) -> bytes:
    """A storage as `torch.save` wrote it before PyTorch 1.6, and as pickles of tensors have it."""
    reference = together(*(value("storage"), name("torch", kind), value("0"), value("cpu"), value(length), value(view)))
    parts = value(magic), value(1001), value({"little_endian": True}), reference + b"Q", value(list(keys))
    return b"".join(b"\x80\x03" + part + b"." for part in parts) + struct.pack("<q", length) + data


def storage(*arguments: Any, **others: Any) -> bytes:
    return call(LOAD_STORAGE, raw(storage_file(*arguments, **others)))


def tensor(
    offset: Any = 0,
    shape: Any = (2,),
    strides: Any = (1,),
    of: bytes = storage(),
    hooks: bytes = ORDERED_DICT,
) -> bytes:
    arguments = of, value(offset), value(shape), value(strides), value(False), hooks
    return call(name("torch._utils", "_rebuild_tensor_v2"), *arguments)


def doubled(opening: bytes, closing: bytes, times: int = 60) -> bytes:
    """A container of the same container twice, of the same container twice, …"""
    thing = value(None)
    for _ in range(times):
        thing = opening + thing + b"q\x00h\x00" + closing
    return thing


def called_again(function: bytes, *arguments: bytes, times: int = 10**4) -> bytes:
    """A list of the results of many equal calls."""
    return b"(" + function + b"q\x00" + together(*arguments) + b"q\x01" + b"h\x00h\x01R" * times + b"t"


def repeated(thing: bytes, times: int = 10**4) -> bytes:
    return b"](" + thing + b"q\x00" + b"h\x00" * times + b"e"


def size8(size: int) -> bytes:
    return struct.pack("<Q", size)


ATTACKS: dict[str, bytes] = {
    # pointers that the file chose
    "ndarray_called": call(name("numpy", "ndarray"), value((1,)), OBJECT, ADDRESS),
    "ndarray_called_hidden": call(name("numpy", "ndarray"), value((1,)), HIDDEN, ADDRESS),
    "object_array": array((1,), OBJECT, ADDRESS),
    "object_array_of_list": array((1,), OBJECT, value([1])),
    "object_buffer": from_buffer((1,), OBJECT, ADDRESS),
    "object_scalar": call(SCALAR, OBJECT, ADDRESS),
    "hidden_array": array((1,), HIDDEN, ADDRESS),
    "hidden_buffer": from_buffer((1,), HIDDEN, ADDRESS),
    "hidden_scalar": call(SCALAR, HIDDEN, ADDRESS),
    "dtype_of_fields": build(FLOAT, *map(value, (3, "<", None, ("f",), {"f": (1, 0)}, 4, 4, 0))),
    "dtype_with_flags": build(FLOAT, *map(value, (3, "<", None, None, None, 8, 8, 63))),
    "dtype_big_endian": array((2,), build(FLOAT, *map(value, (3, ">", None, None, None, -1, -1, 0)))),
    "dtype_from_text": call(DTYPE, value("O,O")),
    "dtype_from_dict": call(DTYPE, value({"names": ["a"], "formats": ["O"]})),
    "dtype_of_text": array((1,), call(DTYPE, value("U2"))),
    "dtype_in_the_data": FLOAT,
    "array_subclass": call(
        name("numpy.core.multiarray", "_reconstruct"), name("numpy", "matrix"), value((0,)), value(b"b")
    ),
    # memory beyond what the file has
    "array_larger_than_data": array((10**6,)),
    "array_smaller_than_data": array((1,)),
    "array_of_negative_size": array((-2,)),
    "array_of_real_size": array((2.0,)),
    "array_size_overflows": array((2**62, 4)),
    "array_set_twice": build(array((2,)), value(1), value((9,)), FLOAT, value(False), NUMBERS),
    "array_of_a_text": array((2,), data=value("aaaaaaaa")),
    "array_without_dtype": array((2,), value("f4")),
    "array_of_a_mentioned_class": array((2,), name("numpy", "ndarray")),
    "buffer_larger_than_data": from_buffer((10**6,)),
    "buffer_with_guessed_size": from_buffer((-1,)),
    "scalar_larger_than_data": call(SCALAR, FLOAT, raw(b"")),
    "tensor_larger_than_storage": tensor(shape=(10**6,)),
    "tensor_beyond_storage": tensor(offset=10**6, shape=(1,)),
    "tensor_strides_beyond_storage": tensor(strides=(10**6,)),
    "tensor_of_negative_offset": tensor(offset=-1),
    "tensor_of_negative_stride": tensor(offset=1, strides=(-1,)),
    "tensor_of_negative_size": tensor(shape=(-1,)),
    "tensor_of_real_size": tensor(shape=(2.0,)),
    "tensor_size_overflows": tensor(shape=(2**62, 4), strides=(4, 2**62)),
    "tensor_stride_overflows": tensor(strides=(2**64,)),
    "tensor_empty_far_away": tensor(offset=2**62, shape=(0,)),
    "tensor_of_other_strides": tensor(strides=(1, 1)),
    "tensor_of_text": tensor(of=value("a")),
    "tensor_of_a_dtype": tensor(of=name("torch", "float32")),
    "storage_longer_than_data": tensor(of=storage(10**6), shape=(10**6,)),
    "storage_of_negative_length": tensor(of=storage(-2)),
    "storage_of_quantised_numbers": tensor(of=storage(kind="QInt8Storage")),
    "storage_untyped": tensor(of=storage(kind="UntypedStorage")),
    "storage_of_another_format": storage(magic=1),
    "storage_with_other_keys": storage(keys=("0", "1")),
    "storage_view": storage(view=("0", 0, 10**6)),
    "storage_in_the_data": storage(),
    "storage_of_text": call(LOAD_STORAGE, value("a")),
    "storage_in_a_tar": call(LOAD_STORAGE, raw(b"sys_info" + bytes(92) + bytes(1024))),
    # memory on demand
    "expanded_tensor": tensor(shape=(10**6, 10**6), strides=(0, 0)),
    "bytes_on_demand": call(name("__builtin__", "bytes"), value(10**11)),
    "bytearray_on_demand": call(name("builtins", "bytearray"), value(10**11)),
    "storage_on_demand": call(name("torch", "FloatStorage"), value(10**11)),
    "tensor_on_demand": call(name("torch", "FloatTensor"), value(10**11)),
    "bytes8": b"\x8e" + size8(2**40) + b"a",
    "bytes8_beyond_all": b"\x8e" + size8(2**64 - 1) + b"a",
    "bytearray8": b"\x96" + size8(2**33) + b"a",
    "bytearray8_beyond_all": b"\x96" + size8(2**64 - 1) + b"a",
    "text8": b"\x8d" + size8(2**40) + b"a",
    "bytes4": b"B" + b"\xff" * 4 + b"a",
    "frame": b"\x95" + size8(2**40) + b"N",
    "memo": b"Nr" + b"\xff" * 4,
    "memo_missing": b"j" + b"\xff" * 4,
    "long4": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a",
    "long4_negative": b"\x8b" + struct.pack("<i", -1),
    "decimal": b"I" + b"9" * 10**6 + b"\n",
    "lists": b"]" * 10**7,
    "marks": b"(" * 10**7,
    "text_encoded_again": called_again(name("_codecs", "encode"), value("a" * 10**6), value("latin1")),
    "storage_loaded_again": called_again(LOAD_STORAGE, raw(storage_file(250_000, bytes(10**6)))),
    "dtype_made_again": called_again(DTYPE, value("f4"), times=10**6),
    # data without end
    "list_in_itself": b"]q\x00h\x00a",
    "dict_in_itself": b"}q\x00" + value("a") + b"h\x00s",
    "lists_doubled": doubled(b"](", b"e"),
    "tuples_doubled": doubled(b"(", b"t"),
    "tuples_doubled_as_key": b"}" + doubled(b"(", b"t") + b"Ns",
    "keys_of_equal_hash": b"}("
    + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(2 * 10**5))
    + b"u",
    "keys_of_tuples": b"}" + value((1, 2)) + b"Ns",
    "size_repeated": repeated(call(name("torch", "Size"), value((1,) * 10**5)), times=10**5),
    "lists_nested": b"](" * 10**5 + b"e" * 10**5,
    "tuples_nested": b"(" * 10**5 + b"t" * 10**5,
    "tuples_nested_as_key": b"}" + b"(" * 10**5 + b"t" * 10**5 + b"Ns",
    "dicts_nested": b"}K\x01" * 10**5 + b"N" + b"s" * 10**5,
    "array_repeated": b"}" + value("m") + repeated(array((10**6,), data=raw(bytes(4 * 10**6)))) + b"s",
    "text_repeated": repeated(value("a" * 10**6)),
    "errors_without_number": b"}" + value("a") + b"\x8a\xff" + b"\x7f" * 255 + b"s",
    # names, calls, objects
    "eval": call(name("builtins", "eval"), value("1")),
    "getattr": name("builtins", "getattr"),
    "attribute_of_a_class": b"\x8c\x05torch\x8c\x0cSize.__new__\x93",
    "size_of_text": call(name("torch", "Size"), value("ab")),
    "size_of_floats": call(name("torch", "Size"), value((0.5,))),
    "device": call(name("torch", "device"), value("cuda:99")),
    "dtype_called": call(name("torch", "float32")),
    "list_called": call(b"]"),
    "call_without_tuple": name("torch", "Size") + b"]R",
    "function_in_the_data": name("torch", "Size"),
    "class_in_the_data": name("numpy", "ndarray"),
    "state_of_a_function": build(name("torch", "Size"), value({"a": 1})),
    "state_of_a_list": build(b"]", value({"__class__": 1})),
    "state_of_a_number": build(value(1), value({"real": 1})),
    "state_of_a_tensor": build(tensor(), storage(), value(0), value((9,)), value((1,))),
    "state_of_a_parameter": build(call(PARAMETER, tensor(), value(False), ORDERED_DICT), value({"data": 1})),
    "ordered_dict_of_pairs": call(name("collections", "OrderedDict"), value([(1, 2)])),
    "default_dict": call(name("collections", "defaultdict"), name("builtins", "list")),
    "hooks_of_a_tensor": tensor(hooks=value({1: 2})),
    "hooks_of_a_parameter": call(PARAMETER, tensor(), value(True), value({1: 2})),
    "parameter_of_text": call(PARAMETER, value("a"), value(True), ORDERED_DICT),
    "append_to_an_array": array((2,)) + b"Na",
    "append_to_bytes": b"\x96" + size8(1) + b"a" + b"(K\x01e",
    "set_item_of_an_array": array((2,)) + value(0) + value(5) + b"s",
    "set_item_of_a_tensor": tensor() + value(0) + value(5) + b"s",
    "set_items_odd": b"}(K\x01K\x02K\x03u",
    "new_object": name("torch", "Size") + b")\x81",
    "new_object_of_text": value("a") + b")\x81",
    "new_object_ex": name("torch", "Size") + b")}\x92",
    "inst": b"(itorch\nSize\n",
    "obj": b"(" + name("torch", "Size") + b"o",
    "extension1": b"\x82\x01",
    "extension2": b"\x83\x01\x00",
    "extension4": b"\x84\x01\x00\x00\x00",
    "persistent_text": b"Pa\n",
    "persistent": value(("storage", 1)) + b"Q",
    "next_buffer": b"\x97",
    "read_only_buffer": b"N\x98",
    "duplicate": b"N2",
    "global_of_numbers": b"K\x01K\x02\x93",
    "long_name": name("a" * 10**6, "b" * 10**6),
    "name_with_escapes": name("\x1b[31m", "red"),
    "codec": call(name("_codecs", "encode"), value("a"), value("rot13")),
    "codec_of_a_number": call(name("_codecs", "encode"), value(1), value("latin1")),
    "protocol": b"\x80\xff",
    "nothing": b"",
    "pop_nothing": b"0",
    "mark_missing": b"t",
}


def write_attacks(folder: Path) -> None:
    for attack, code in ATTACKS.items():
        (folder / f"{attack}.pkl").write_bytes(b"\x80\x04" + code + b".")


# -- chance ----------------------------------------------------------------------------------------------------------


# what stands in pickles of data; names of different lengths can stand for each other in protocols 2 and 3
_WORDS = (b"f4", b"f8", b"i8", b"O8", b"V8", b"U2", b"ndarray", b"dtype", b"_reconstruct", b"scalar", b"_frombuffer")
_WORDS += (b"OrderedDict", b"_rebuild_tensor_v2", b"_rebuild_parameter", b"_load_from_bytes", b"Size", b"float32")
_WORDS += (b"FloatStorage", b"DoubleStorage", b"HalfStorage", b"BoolStorage")


def mutate(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """A few changes of the kinds that reach other code than noise does."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        if not result:
            break
        at, length = chance.randrange(len(result)), chance.choice((1, 1, 2, 4, 8, 40))
        kind = chance.randrange(8)
        if kind == 0:
            result[at] = chance.randrange(256)
        elif kind == 1:
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del result[at : at + length]
        elif kind == 3:
            result[at:at] = result[at : at + length] * chance.choice((1, 2, 50))
        elif kind == 4:  # sizes, counts, offsets
            extreme = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            result[at : at + length] = bytes([extreme]) * min(length, 8)
        elif kind == 5:  # a piece of another file
            other = chance.choice(others)
            start = chance.randrange(len(other))
            result[at : at + length] = other[start : start + chance.choice((1, 4, 40, 200))]
        elif kind == 6:
            result = result.replace(chance.choice(_WORDS), chance.choice(_WORDS), chance.choice((1, -1)))
        else:  # an opcode where chance might hit one
            result[at] = ord(chance.choice("(]}t)lRbasueQhqcN\x81\x85\x86\x87\x93\x94"))
    return bytes(result)


# -- reading ---------------------------------------------------------------------------------------------------------


def read_all(folder: Path) -> list[dict[str, Any]]:
    """What became of each file, in a process of its own.

    Raises:
        AssertionError: a file killed that process.
        TimeoutExpired: the process did not end.
    """
    command = [sys.executable, __file__, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    results = [json.loads(line) for line in process.stdout.splitlines()]
    files = sorted(folder.iterdir())
    assert len(results) == len(files), f"{files[len(results)].name}: exit status {process.returncode}: {process.stderr}"
    return results


def _read(path: Path) -> None:
    if path.suffix == ".ckpt":
        from bacinfer.policies import load_policy

        load_policy(path)
        return
    from bacinfer import bacinfer_files, files

    if path.suffix == ".npz":
        repr(files.read_arrays(path))
        return
    repr(bacinfer_files.read_pickle(path))
    for read in (bacinfer_files.read_steps, bacinfer_files.read_block_errors):
        with suppress(ValueError):
            read(path)
    bacinfer_files.read_activations(path)


def peak_memory() -> int:
    """Bytes at this process's peak. (Linux' ``ru_maxrss`` is also that of the process which started it.)"""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024


def main(folder: Path) -> None:
    import torch

    from bacinfer import bacinfer_files  # noqa: F401  before the clock runs

    paths = sorted(folder.iterdir())
    if any(path.suffix == ".ckpt" for path in paths):
        import bacinfer.policies  # noqa: F401
    torch.set_num_threads(1)
    with suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for path in paths:
        start = time.process_time()
        try:
            _read(path)
            kind, message = "data", ""
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        result = {"file": path.name, "kind": kind, "message": message[:5000], "memory": peak_memory()}
        print(json.dumps(result | {"seconds": time.process_time() - start}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
