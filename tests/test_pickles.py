"""Files of torch.save read without running anything in them: what comes out whole, what comes out inert, what is refused."""

import argparse
import collections
import datetime
import enum
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from smooseg_fast.errors import UserError
from smooseg_fast.pickles import Global, Inert, is_pickle, machine, plain, read

FORMATS = {"zip": True, "legacy": False}


def saved(path, value, form="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=FORMATS[form])
    return path


def error_of(path, *words):
    with pytest.raises(UserError) as caught:
        read(path, "FILE")
    line = str(caught.value)
    assert line.startswith("FILE: ")
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


# --------------------------------------------------------------------------------------------------- what comes out whole


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_of_every_kind(tmp_path, form):
    base = torch.randn(10, 6)
    tensors = {
        "base": base,
        "view": base[2:5, ::2].t(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "expanded": torch.ones(1).expand(4, 5),
        **{
            str(dtype): torch.arange(-2, 3).to(dtype)
            for dtype in (
                *(
                    torch.float64,
                    torch.float16,
                    torch.bfloat16,
                    torch.int64,
                    torch.int32,
                    torch.int16,
                    torch.int8,
                    torch.uint8,
                    torch.bool,
                ),
                *(torch.complex64, torch.complex128),
            )
        },
    }
    if form == "zip":  # the older format has no name for these
        tensors |= {
            str(dtype): torch.arange(3).to(dtype) for dtype in (torch.uint16, torch.uint32, torch.float8_e4m3fn)
        }
    found = read(saved(tmp_path / "file.pt", tensors, form), "FILE")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].stride() == value.stride(), name
        assert (
            torch.equal(found[name].float(), value.float()) if "float8" in name else torch.equal(found[name], value)
        ), name
        assert not found[name].requires_grad
    found["base"][2, 0] = 7.0
    assert found["view"][0, 0] == 7.0  # one storage, as it was


@pytest.mark.parametrize("form", FORMATS)
def test_plain_values(tmp_path, form):
    value = {
        "numbers": [1, -(2**70), 2.5, True, None, 1 + 2j],
        "text": "é\n",
        "bytes": b"a\xff",
        "array": bytearray(b"xy"),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "sets": [{1, 2}, frozenset((3,))],
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        ("key", 1): 0,
    }
    value["self"] = value["numbers"]
    found = read(saved(tmp_path / "file.pt", value, form), "FILE")
    assert found == value
    assert list(found["ordered"]) == ["b", "a"]
    assert type(found["size"]) is torch.Size
    assert found["self"] is found["numbers"]


@pytest.mark.parametrize("form", FORMATS)
def test_numpy_values(tmp_path, form):
    value = [
        np.float64(2.5),
        np.int16(-3),
        np.bool_(True),
        np.arange(6.0).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.arange(3, dtype=">i4"),
    ]
    found = read(saved(tmp_path / "file.pt", value, form), "FILE")
    for one, other in zip(found, value):
        assert one.dtype == other.dtype.newbyteorder("=")  # numpy's own unpickling makes them native too
        np.testing.assert_array_equal(one, other)
    assert plain(found) == [2.5, -3, True, "float64 [2, 3]", "int64 [3, 2]", "int32 [3]"]


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(tmp_path, protocol):
    value = {
        "a": [1, 2.5, "text", b"bytes", (1, 2), {3}, np.arange(3), None, True],
        "b": collections.OrderedDict(x=torch.Size([1])),
    }
    value["c"] = argparse.Namespace(x=1)
    torch.save(value, tmp_path / "file.pt", pickle_protocol=protocol)
    found = read(tmp_path / "file.pt", "FILE")
    assert found["a"][:6] + found["a"][7:] == value["a"][:6] + value["a"][7:]
    np.testing.assert_array_equal(found["a"][6], np.arange(3))
    assert found["b"] == value["b"]
    assert plain(found["c"]) == {"x": 1}


class Attributes(dict):
    """As Lightning's own, of hyper-parameters."""


class Sequence(list):
    pass


class Slots:
    __slots__ = ("a",)


class Kind(enum.Enum):
    ONE = 1


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_all_builds_are_inert(tmp_path, protocol):
    slots = Slots()
    slots.a = 3
    value = {"attributes": Attributes(a=1, b=Attributes(c=2)), "list": Sequence([1]), "slots": slots, "kind": Kind.ONE}
    torch.save(value, tmp_path / "file.pt", pickle_protocol=protocol)
    found = read(tmp_path / "file.pt", "FILE")
    assert all(type(item) is Inert for item in found.values())
    assert plain(found) == {
        "attributes": {"a": 1, "b": {"c": 2}},
        "list": [1],
        "slots": "<test_pickles.Slots>",
        "kind": "<test_pickles.Kind>",
    }
    assert found["slots"].state == (None, {"a": 3})
    assert found["kind"].args == (1,)


def test_other_objects_are_inert_and_their_content_is_kept(tmp_path):
    value = [
        argparse.Namespace(a=1, b=[2]),
        pathlib.PurePosixPath("/data/x"),
        datetime.date(2023, 1, 2),
        torch.nn.Linear,
        len,
        os.system,  # a name is no call
    ]
    found = read(saved(tmp_path / "file.pt", value), "FILE")
    assert [type(item) for item in found] == [Inert, Inert, Inert, Global, Global, Global]
    assert found[0].state == {"a": 1, "b": [2]}
    assert str(found[5]) in ("posix.system", "nt.system")
    assert plain(found)[:2] == [{"a": 1, "b": [2]}, "/data/x"]
    assert plain(found)[2:5] == ["<datetime.date>", "torch.nn.modules.linear.Linear", "builtins.len"]


def test_plain_values_that_have_no_text():
    long = 10**5000
    assert plain({long: long, "a": "x" * 10**6, ("b", 1): b"x"}) == {
        "...": "...",
        "a": "x" * 2000,
        "['b', 1]": "<bytes>",
    }
    assert json.dumps(plain({long: long, Inert(Global("a", "B")): {1, 2}, (1, 2): [Global("c", "d")]}))


def test_plain_values_of_what_has_no_end():
    loop = []
    loop.append(loop)
    doubled = "x"
    for _ in range(60):
        doubled = [doubled, doubled]
    assert str(plain(loop)).count("[") < 100
    assert len(str(plain(doubled))) < 1_000_000


# ------------------------------------------------------------------------------------------------------- what is refused


def packed(path, content, records=(), form="zip", compression=zipfile.ZIP_STORED):
    """A file around the pickle `content`, as torch.save makes it."""
    if form == "zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", content)
            for name, data in records:
                archive.writestr(f"archive/{name}", data)
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + content + pickle.dumps([], 2))
    return path


class Calls:
    """Pickles to a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def hostile(target):
    """Pickles that make the file `target` when they are loaded in the usual way; every way in that pickle has."""
    command = f"touch {target}"
    code = f"open({str(target)!r}, 'w')"

    def text(value):
        return (
            b"\x8c" + bytes([len(value)]) + value.encode()
            if len(value) < 256
            else b"X" + struct.pack("<I", len(value)) + value.encode()
        )

    shell = text(command)
    reduced = b"cos\nsystem\n" + shell + b"\x85R."
    return {
        "system": pickle.dumps(Calls(os.system, command), 2),
        "eval": pickle.dumps(Calls(eval, code), 2),
        "exec": pickle.dumps({"state_dict": {}, "x": Calls(exec, code)}, 4),
        "popen": pickle.dumps(Calls(subprocess.Popen, ["touch", str(target)]), 2),
        "check-output": pickle.dumps(Calls(subprocess.check_output, ["touch", str(target)]), 2),
        "open": pickle.dumps(Calls(open, str(target), "w"), 2),
        "getattr": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system"), 2),
        "inst": b"(" + shell + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + shell + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + shell + b"\x85\x81.",
        "newobj-ex": b"\x80\x04cos\nsystem\n" + shell + b"\x85}\x92.",
        "stack-global": b"\x80\x04" + text("os") + text("system") + b"\x93" + shell + b"\x85R.",
        "dotted": b"\x80\x04" + text("collections") + text("abc.sys.modules") + b"\x93" + shell + b"\x85R.",
        "dotted-path": b"\x80\x04" + text("pathlib") + text("os.system") + b"\x93" + shell + b"\x85R.",
        "setstate": b"\x80\x02cbuiltins\nobject\n)\x81}"
        + text("__setstate__")
        + b"cos\nsystem\nsb"
        + shell
        + b"b0"
        + reduced,
        "call-of-a-method": b"\x80\x02ccollections\nOrderedDict\n)R" + shell + b"\x85R.",
        "call-of-a-call": b"\x80\x02cpathlib\nPosixPath\n)R" + shell + b"\x85R.",
        "extension": b"\x80\x02\x82\x01" + shell + b"\x85R.",
        "persistent": b"\x80\x02" + shell + b"Q.",
        "persistent-text": b"P" + command.encode() + b"\n.",
        "load-from-bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\n" + b"C" + b"\x04abcd" + b"\x85R.",
        "rebuild": b"\x80\x02ctorch._utils\n_rebuild_parameter\n" + shell + b"\x85R.",
        "from-type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + shell + b"\x85NtR.",
        "import": b"\x80\x02cbuiltins\n__import__\n" + text("antigravity") + b"\x85R.",
    }


CASES = list(hostile("x"))


@pytest.mark.parametrize("form", [*FORMATS, "bare"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_hostile_file_runs(tmp_path, monkeypatch, case, form):
    target, content = tmp_path / "ran", hostile(tmp_path / "ran")[case]
    path = tmp_path / "file.pth"
    path.write_bytes(content) if form == "bare" else packed(path, content, form=form)
    for name in ("system", "popen"):
        monkeypatch.setattr(os, name, None)
    before = set(sys.modules)
    error_of(path)
    assert not target.exists()
    assert {name for name in sys.modules if not name.startswith("encodings.")} <= before  # zipfile's own, for names


def test_the_corpus_is_hostile(tmp_path):
    """At least the plain cases do run where pickle itself loads them, or the corpus proves nothing."""
    ran = 0
    for case in (
        "system",
        "eval",
        "exec",
        "popen",
        "check-output",
        "open",
        "inst",
        "obj",
        "stack-global",
        "dotted-path",
    ):
        target = tmp_path / case
        code = f"import pickle,sys\nx = pickle.loads({hostile(target)[case]!r})\nwait = getattr(x, 'wait', None)\nwait and wait()"
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        ran += target.exists()
    assert ran == 10


def test_the_call_that_was_asked_for_is_named(tmp_path):
    error_of(
        packed(tmp_path / "a.pth", pickle.dumps(Calls(os.system, "true"), 2)),
        f"a call of {os.name}.system",
        "nothing was run",
    )
    error_of(packed(tmp_path / "b.pth", hostile("x")["extension"]), "EXT1", "nothing was run")
    error_of(packed(tmp_path / "c.pth", hostile("x")["popen"]), "a call of subprocess.Popen")


FLOATS = b"ctorch\nFloatStorage\n"


def storage_id(kind=FLOATS, key=b"0", count=b"K\x04"):
    return (
        b"(X\x07\x00\x00\x00storage"
        + kind
        + b"X"
        + struct.pack("<I", len(key))
        + key
        + b"X\x03\x00\x00\x00cpu"
        + count
        + b"tQ"
    )


def tensor(identifier, offset=b"K\x00", size=b"K\x04\x85", stride=b"K\x01\x85"):
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + identifier + offset + size + stride + b"\x89NtR."


HUGE = b"\x8a\x08" + struct.pack("<q", 2**60)  # LONG1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tensor(storage_id(count=HUGE)), "a storage of"),
        (tensor(storage_id(), size=HUGE + b"\x85"), "reaches beyond its storage"),
        (tensor(storage_id(), size=HUGE + b"\x85", stride=b"K\x00\x85"), "reaches beyond its storage"),
        (tensor(storage_id(), offset=b"K\x05"), "reaches beyond its storage"),
        (tensor(storage_id(), offset=b"J\xff\xff\xff\xff"), "a shape that is none"),
        (tensor(storage_id(), stride=b"J\xff\xff\xff\xff\x85"), "a shape that is none"),
        (tensor(storage_id(), stride=b"K\x02\x85"), "reaches beyond its storage"),
        (tensor(storage_id(), stride=b")"), "strides"),
        (tensor(storage_id(), size=b"X\x01\x00\x00\x00a"), "a shape that is none"),
        (tensor(storage_id(key=b"../../etc/passwd")), "there is no data/../../etc/passwd"),
        (tensor(storage_id(key=b"1")), "there is no data/1"),
        (tensor(storage_id(kind=b"cos\nsystem\n")), "numbers of a kind that is not read"),
        (tensor(storage_id(kind=b"ctorch\nQInt8Storage\n")), "numbers of a kind that is not read (torch.QInt8Storage)"),
        (tensor(storage_id(count=b"G?\xf0\x00\x00\x00\x00\x00\x00")), "in a way that torch.save does not"),
        (tensor(b"K\x01Q"), "in a way that torch.save does not"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "cut short or damaged"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", "cut short or damaged"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"abc.", "cut short or damaged"),
        (b"\x80\x02h\x05.", "cut short or damaged"),
        (b"\x80\x02R.", "cut short or damaged"),
        (b"\x80\x02)", "cut short or damaged"),
        (b"\x80\x02.", "cut short or damaged"),
        (b"\x80\x02t.", "cut short or damaged"),
        (b"\x80\x02\xff.", "cut short or damaged"),
        (b"", "cut short or damaged"),
        (b"\x80\x02]}(K\x01]u.", "cut short or damaged"),
        (b"\x80\x02}]K\x01s.", "stands as a key"),
        (b"\x80\x02}(K\x01u.", "cut short or damaged"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_lies_about_sizes_and_broken_opcodes(tmp_path, content, words, form):
    path = packed(tmp_path / "file.pth", content, [("data/0", bytes(16))], form)
    error_of(path, *([words] if form == "zip" else []))


def test_a_memo_of_any_number_takes_no_memory(tmp_path):
    assert read(packed(tmp_path / "file.pth", b"\x80\x02K\x07r\xff\xff\xff\x7f."), "FILE") == 7


def test_what_is_nested_deep(tmp_path):
    depth = 100_000
    found = read(packed(tmp_path / "lists.pth", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."), "FILE")
    assert str(plain(found)).count("[") < 100
    del found
    error_of(packed(tmp_path / "keys.pth", b"\x80\x02}" + b")" + b"\x85" * depth + b"K\x01s."), "stands as a key")
    inert = b"\x80\x02" + b"cpathlib\nPath\n" * 20_000 + b")" + b"R\x85" * 20_000 + b"."
    assert read(packed(tmp_path / "objects.pth", inert), "FILE")


def test_a_small_file_cannot_fill_the_memory(tmp_path, monkeypatch):
    many = b"\x80\x02](" + b"K\x01" * 100_000 + b"eq\x000"
    for kind in (b"list", b"tuple", b"dict"):
        copies = (b"cbuiltins\n" + kind + b"\nh\x00\x85R") * 5_000
        error_of(packed(tmp_path / f"{kind.decode()}.pth", many + b"(" + copies + b"l."), "far more memory")
    error_of(packed(tmp_path / "pairs.pth", many + b"cbuiltins\ndict\n](" + b"h\x00" * 100 + b"e\x85R."), "no pairs")
    text = b"\x80\x02X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"q\x000X\x06\x00\x00\x00latin1q\x010"
    error_of(
        packed(tmp_path / "text.pth", text + b"(" + b"c_codecs\nencode\nh\x00h\x01\x86R" * 5_000 + b"l."),
        "far more memory",
    )
    monkeypatch.setattr(machine, "STEPS", 10_000)
    error_of(packed(tmp_path / "steps.pth", b"\x80\x02" + b"N0" * 5_000 + b"N."), "steps")


def test_zips_that_torch_save_does_not_make(tmp_path):
    content = pickle.dumps({"a": 1}, 2)
    error_of(
        packed(tmp_path / "deflated.pth", content * 1000, compression=zipfile.ZIP_DEFLATED),
        "not stored as torch.save does",
    )
    error_of(packed(tmp_path / "script.pth", content, [("constants.pkl", b"")]), "TorchScript")
    error_of(packed(tmp_path / "big.pth", content, [("byteorder", b"big")]), "byte order")
    with zipfile.ZipFile(tmp_path / "none.pth", "w") as archive:
        archive.writestr("readme.txt", "x")
    error_of(tmp_path / "none.pth", "0 data.pkl")
    # many names for the same bytes
    path = saved(tmp_path / "file.pth", {"a": torch.randn(1000), "b": torch.randn(1000)})
    raw = path.read_bytes()
    first, second = (raw.index(b"file/data/" + name) - 30 for name in (b"0", b"1"))
    where = raw.rindex(b"file/data/1") - 4  # of the record's place, in the directory at the end
    assert struct.unpack("<I", raw[where : where + 4]) == (second,)
    path.write_bytes(raw[:where] + struct.pack("<I", first) + raw[where + 4 :])
    error_of(path, "cut short or damaged")


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_or_changed_anywhere(tmp_path, form):
    value = {
        "a": torch.randn(300),
        "b": [1, 2.5, "text"],
        "c": collections.OrderedDict(x=torch.ones(2, dtype=torch.bfloat16)),
    }
    whole = saved(tmp_path / "whole.pt", value, form).read_bytes()
    path = tmp_path / "file.pt"
    generator = np.random.default_rng(0)
    for length in sorted({0, 1, 3, 4, 10, 257, *generator.integers(0, len(whole), 60).tolist(), len(whole) - 1}):
        path.write_bytes(whole[:length])
        error_of(path)
    for _ in range(300):
        changed = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            changed[place] = generator.integers(0, 256)
        path.write_bytes(changed)
        try:
            read(path, "FILE")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 (it may as well be read: not every byte matters)


def test_only_pickles_and_torchs_zips_are_taken_for_pickles(tmp_path):
    from safetensors.torch import save_file

    for form in FORMATS:
        assert is_pickle(saved(tmp_path / form, {}, form))
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    # a header as long as the first bytes of a zip say
    (tmp_path / "b.safetensors").write_bytes(b"PK\x03\x04\0\0\0\0{" + bytes(8))
    (tmp_path / "c.safetensors").write_bytes(b"\x80\x02\0\0\0\0\0\0{" + bytes(8))
    assert not any(is_pickle(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "c.safetensors", "none"))
    for value in ({"a": 1}, np.arange(3), 1.0):
        (tmp_path / "bare.pth").write_bytes(pickle.dumps(value, 2))
        error_of(tmp_path / "bare.pth", "is a pickle, but none of torch.save")
    (tmp_path / "old.pth").write_bytes(bytes(257) + b"ustar" + bytes(300))
    error_of(tmp_path / "old.pth", "before 0.2")
