"""Files of torch.save, read without running anything in them: values that come out, inert objects, refusals."""

import argparse
import collections
import datetime
import functools
import importlib
import itertools
import json
import os
import pathlib
import pickle
import runpy
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from smooseg_fast.backbones.weights import Inert, is_pickle, read
from smooseg_fast.errors import UserError
from smooseg_fast.segment.published import settings_in

FORMATS = {"zip": True, "legacy": False}


def saved(path, value, form="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=FORMATS[form])
    return path


def error_of(path, *words):
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    for word in words:
        assert word in line, line
    return line


@pytest.fixture(autouse=True)
def torchs_list_of_safe_names_is_left_alone():
    """Every test must leave it as it was: nothing of a file may count as safe for the next torch.load."""
    before = set(torch.serialization.get_safe_globals())
    yield
    assert set(torch.serialization.get_safe_globals()) == before


# ----------------------------------------------------------------------------------------------------------- values


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
    }
    floats = (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors |= {str(dtype): torch.arange(-2, 3).to(dtype) for dtype in floats + whole}
    values = read(saved(tmp_path / "file.pt", tensors, form))
    assert values.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert values[name].dtype == tensor.dtype, name
        assert values[name].stride() == tensor.stride(), name
        assert torch.equal(values[name], tensor), name
        assert not values[name].requires_grad
    values["base"][2, 0] = 7.0
    assert values["view"][0, 0] == 7.0  # one storage, as saved


@pytest.mark.parametrize("form", FORMATS)
def test_plain_values(tmp_path, form):
    value = {
        "numbers": [1, -(2**70), 2.5, True, None],
        "text": "é\n",
        "bytes": b"a\xff",
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "set": {1, 2},
        "ordered": collections.OrderedDict(b=1, a=2),
        "counter": collections.Counter("aab"),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        ("key", 1): 0,
    }
    value["self"] = value["numbers"]
    values = read(saved(tmp_path / "file.pt", value, form))
    assert values == value
    assert list(values["ordered"]) == ["b", "a"]
    assert type(values["size"]) is torch.Size
    assert values["self"] is values["numbers"]


def test_objects_of_other_classes_are_inert_and_keep_their_content(tmp_path):
    value = [
        argparse.Namespace(a=1, b=[2]),
        pathlib.PurePosixPath("/data/x"),
        datetime.date(2023, 1, 2),
        torch.nn.Linear(2, 3),
        np.float64(2.5),
        functools.partial(torch.optim.Adam, lr=1.0),
        torch.nn.Linear,
        collections.defaultdict(list),
    ]
    values = read(saved(tmp_path / "file.pt", value))
    assert all(isinstance(item, Inert) or issubclass(item, Inert) for item in values)
    assert values[0].state == {"a": 1, "b": [2]}
    settings = dict(settings_in(values))
    assert (settings["0.a"], settings["0.b.0"], settings["1"], settings["2"]) == (1, 2, "/data/x", "<datetime.date>")
    assert settings["5"] == "<functools.partial>"


def test_other_libraries_safe_names_stay_inert(tmp_path):
    """A library may declare its functions safe for the whole process; here they are not."""
    path = saved(tmp_path / "file.pt", {"a": np.float64(2.5), "calls": Calls(touch, str(tmp_path / "ran"))})
    with torch.serialization.safe_globals([touch, np._core.multiarray.scalar, np.dtype]):
        values = read(path)
        assert isinstance(values["calls"], Inert)
        assert isinstance(values["a"], Inert)
        assert touch in torch.serialization.get_safe_globals()
    assert not (tmp_path / "ran").exists()


def test_the_attributes_of_dicts_are_dropped(tmp_path):
    """A state dict carries `_metadata`; a file may as well shadow the methods that readers call."""
    weights = torch.nn.Linear(2, 2).state_dict()
    weights.get = torch.Size
    values = read(saved(tmp_path / "file.pt", weights))
    assert not vars(values)
    assert values.get("bias").shape == (2,)


def test_settings_that_have_no_text_or_no_end():
    long = 10**5000
    shown = {"0": "<int>", "a": "x" * 2000, "2": "<bytes>"}
    assert dict(settings_in({long: long, "a": "x" * 10**6, ("b", 1): b"x"})) == shown
    assert json.dumps(dict(settings_in({long: long, Inert(): {1, 2}, (1, 2): [Inert]})))
    loop, doubled, empty = [], "x", []
    loop.append(loop)
    for _ in range(60):
        doubled, empty = [doubled, doubled], [empty, empty]
    assert len(list(settings_in(loop))) == 1
    for endless in (doubled, empty):
        assert len(list(itertools.islice(settings_in(endless), 1000))) == 1000


# ------------------------------------------------------------------------------------------------------ hostile files


def packed(path, content, records=(), form="zip", compression=zipfile.ZIP_STORED):
    """A file around the pickle `content`, laid out as torch.save does."""
    if form == "zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
            for name, data in records:
                archive.writestr(f"archive/{name}", data)
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
        tail = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + content + tail)
    return path


class Calls:
    """Pickles to a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def touch(path):
    open(path, "w").close()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile(target):
    """Pickles that create the file `target` when plain pickle loads them; every way in that pickle has."""
    command = f"touch {target}"
    code = f"open({str(target)!r}, 'w')"
    script = target.parent / "script.py"
    shell = text(command)
    reduced = b"cos\nsystem\n" + shell + b"\x85R."
    return {
        "system": pickle.dumps(Calls(os.system, command), 2),
        "eval": pickle.dumps(Calls(eval, code), 2),
        "exec": pickle.dumps({"state_dict": {}, "x": Calls(exec, code)}, 2),
        "exec-of-protocol-4": pickle.dumps(Calls(exec, code), 4),
        "popen": pickle.dumps(Calls(subprocess.Popen, ["touch", str(target)]), 2),
        "check-output": pickle.dumps(Calls(subprocess.check_output, ["touch", str(target)]), 2),
        "open": pickle.dumps(Calls(open, str(target), "w"), 2),
        "run-path": pickle.dumps(Calls(runpy.run_path, str(script)), 2),
        "own-function": pickle.dumps(Calls(touch, str(target)), 2),
        "hub": pickle.dumps(Calls(torch.hub.load, str(target.parent), "x", "", "local"), 2),
        "unrestricted-load": pickle.dumps(Calls(torch.load, str(script), None, None), 2),
        "load-from-bytes": pickle.dumps(Calls(torch.storage._load_from_bytes, reduced), 2),
        "getattr": pickle.dumps(Calls(getattr, Calls(importlib.import_module, "os"), "system"), 2),
        "import": pickle.dumps(Calls(importlib.import_module, "antigravity"), 2),
        "inst": b"(" + shell + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + shell + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + shell + b"\x85\x81.",
        "stack-global": b"\x80\x04" + text("os") + text("system") + b"\x93" + shell + b"\x85R.",
        "dotted-path": b"\x80\x02cpathlib\nos.system\n" + shell + b"\x85R.",
        "python-2": b"\x80\x02c__builtin__\neval\n" + text(code) + b"\x85R.",
        "setstate": b"\x80\x02clib\nThing\n)\x81}"
        + text("__setstate__")
        + b"cos\nsystem\nsb"
        + shell
        + b"b0"
        + reduced,
        "method": b"\x80\x02ccollections\nOrderedDict\n)R" + shell + b"\x85R.",
        "result-of-a-call": b"\x80\x02clib\nThing\n)R" + shell + b"\x85R.",
        "extension": b"\x80\x02\x82\x01" + shell + b"\x85R.",
        "persistent": b"\x80\x02" + shell + b"Q.",
        "module-source": b"\x80\x02(" + text("module") + b"cos\nsystem\n" + shell + shell + b"tQ.",
        "rebuild": b"\x80\x02ctorch._utils\n_rebuild_parameter\n" + shell + b"\x85R.",
        "from-type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(clib\nrun\nclib\nThing\n" + shell + b"\x85NtR.",
        "wrapper": b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n(clib\nThing\nNtR.",
        "sparse": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n(clib\nThing\nNtR.",
    }


INERT = {"own-function", "hub", "unrestricted-load", "load-from-bytes"}  # zips come out, with an inert object


@pytest.mark.parametrize("form", [*FORMATS, "bare"])
@pytest.mark.parametrize("case", hostile(pathlib.Path("x")))
def test_nothing_in_a_hostile_file_runs(tmp_path, monkeypatch, case, form):
    target, content = tmp_path / "ran", hostile(tmp_path / "ran")[case]
    for name in ("script.py", "hubconf.py"):
        (tmp_path / name).write_text(f"open({str(target)!r}, 'w')")
    path = tmp_path / "file.pth"
    path.write_bytes(content) if form == "bare" else packed(path, content, form=form)
    for name in ("system", "popen"):
        monkeypatch.setattr(os, name, None)
    before = set(sys.modules)
    if form == "zip" and case in INERT:
        assert isinstance(read(path), Inert)
    else:
        error_of(path)
    assert not target.exists()
    assert {name for name in sys.modules if not name.startswith("encodings.")} <= before


def test_the_corpus_is_hostile(tmp_path):
    """The plain cases do run where pickle itself loads them, or the corpus proves nothing."""
    cases = ["system", "eval", "exec", "exec-of-protocol-4", "popen", "check-output", "open", "run-path", "inst", "obj"]
    cases += ["stack-global", "python-2"]
    (tmp_path / "script.py").write_text("")
    code = "import os, pickle, sys\nos.chdir(sys.argv[1])\n"
    for case in cases:
        content = hostile(tmp_path / case)[case]
        (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'run-path')!r}, 'w')")
        code += f"try: getattr(pickle.loads({content!r}), 'wait', int)()\nexcept Exception as error: print(error)\n"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=True)
    assert [case for case in cases if not (tmp_path / case).exists()] == []


def test_the_call_is_named(tmp_path):
    corpus = hostile(tmp_path / "ran")
    for case, name in {"system": f"{os.name}.system", "exec": "builtins.exec", "popen": "subprocess.Popen"}.items():
        error_of(packed(tmp_path / "a.pth", corpus[case]), f"asks for {name}", "nothing was run")
    error_of(packed(tmp_path / "a.pth", corpus["from-type"]), "asks for torch._tensor._rebuild_from_type_v2")
    error_of(packed(tmp_path / "a.pth", corpus["exec-of-protocol-4"]), "protocol 4")


def test_an_object_keeps_its_state_and_sets_no_attributes(tmp_path):
    state = b"}(" + text("__class__") + b"clib\nOther\n" + text("args") + text("x") + b"u"
    for twice in (state, b"N" + state + b"\x86"):  # also as (state, slots)
        content = b"\x80\x02clib\nThing\nK\x01\x85R" + twice + b"b."
        value = read(packed(tmp_path / "file.pth", content))
        assert (value.kind, value.args) == ("lib.Thing", (1,))
        assert type(value).__setstate__ is Inert.__setstate__


@pytest.mark.parametrize("name", ["FloatTensor", "Tensor", "storage.UntypedStorage", "storage.TypedStorage"])
def test_torchs_own_classes_that_take_any_amount_of_memory(tmp_path, name):
    module, _, kind = f"torch.{name}".rpartition(".")
    content = f"\x80\x02c{module}\n{kind}\n".encode("latin1") + HUGE + b"\x85R."
    for form in FORMATS:
        error_of(packed(tmp_path / "file.pth", content, form=form), f"torch.{name}")


def test_bytes_that_grow_without_end(tmp_path):
    doubled = b"c_codecs\nencode\n" * 40 + text("x") + text("latin1") + (b"\x86R" + text("HEX codec")) * 39 + b"\x86R."
    for form in FORMATS:
        error_of(packed(tmp_path / "file.pth", b"\x80\x02" + doubled, form=form), "bytes to be packed")
    error_of(packed(tmp_path / "file.pth", b"\x80\x02cbuiltins\nbytearray\n" + HUGE + b"\x85R."), "builtins.bytearray")


# -------------------------------------------------------------------------------------------- lies, damage, other files

FLOATS = b"ctorch\nFloatStorage\n"
HUGE = b"\x8a\x08" + struct.pack("<q", 2**60)  # LONG1
LARGE = b"\x8a\x08" + struct.pack("<q", 2**26)


def tensor(
    form, kind=FLOATS, key="0", count=b"K\x04", offset=b"K\x00", size=b"K\x04\x85", stride=b"K\x01\x85", storage=None
):
    view = b"N" if form == "legacy" else b""
    storage = storage or b"(" + text("storage") + kind + text(key) + text("cpu") + count + view + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89NtR."


@pytest.mark.parametrize(
    "lie",
    [
        dict(count=b"J\xff\xff\xff\xff"),
        dict(size=HUGE + b"\x85"),
        dict(size=LARGE + b"\x85"),
        dict(size=b"K\x05\x85"),
        dict(size=HUGE + b"\x85", stride=b"K\x00\x85"),
        dict(size=LARGE + b"\x85", stride=b"K\x00\x85"),
        dict(offset=b"K\x05"),
        dict(offset=b"J\xff\xff\xff\xff"),
        dict(stride=b"J\xff\xff\xff\xff\x85"),
        dict(stride=b"K\x02\x85"),
        dict(size=text("a")),
        dict(key="../../etc/passwd"),
        dict(key="1"),
        dict(kind=b"clib\nStorage\n"),
        dict(kind=b"ctorch\nQInt8Storage\n"),
        dict(count=b"G?\xf0\x00\x00\x00\x00\x00\x00"),
        dict(storage=b"K\x01Q"),
    ],
    ids=lambda lie: "-".join(f"{name}{len(value)}" for name, value in lie.items()),
)
@pytest.mark.parametrize("form", FORMATS)
def test_lies_about_sizes(tmp_path, form, lie):
    honest = packed(tmp_path / "honest.pth", tensor(form), [("data/0", bytes(16))], form)
    assert torch.equal(read(honest), torch.zeros(4))
    error_of(packed(tmp_path / "file.pth", tensor(form, **lie), [("data/0", bytes(16))], form))


@pytest.mark.parametrize("count", [HUGE, LARGE], ids=["huge", "large"])
def test_a_storage_said_to_be_too_large_takes_no_memory(tmp_path, count):
    value = read(packed(tmp_path / "file.pth", tensor("zip", count=count), [("data/0", bytes(16))]))
    assert torch.equal(value, torch.zeros(4))
    assert value.untyped_storage().nbytes() < 10_000  # of the file
    error_of(packed(tmp_path / "file.pth", tensor("legacy", count=count), form="legacy"))


@pytest.mark.parametrize("form", FORMATS)
def test_storages_that_share_bytes_are_counted(tmp_path, form):
    """Many storages, each as large as the file could hold."""
    many = b"\x80\x02](" + b"".join(tensor(form, key=str(n), count=b"M\x00\x01")[2:-1] for n in range(50)) + b"e."
    error_of(packed(tmp_path / "file.pth", many, [("data/0", bytes(1024))], form))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # BINUNICODE of 2 GB
        b"\x80\x02\x8b\xff\xff\xff\x7fabc.",  # LONG4 of 2 GB
        b"\x80\x02T\xff\xff\xff\x7fabc.",  # BINSTRING of 2 GB
        b"\x80\x02\x8e" + struct.pack("<Q", 2**60) + b"abc.",  # BINBYTES8
        b"\x80\x02\x8d" + struct.pack("<Q", 2**63) + b"abc.",  # BINUNICODE8
        b"\x80\x02\x96" + struct.pack("<Q", 2**60) + b"abc.",  # BYTEARRAY8
        b"\x80\x02h\x05.",
        b"\x80\x02R.",
        b"\x80\x02)",
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02\xff.",
        b"",
        b"\x80\x02](K\x01]u.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02clib two\nThing\n.",
        b"\x80\x02clib\nThing",
        b"\x80\x04K\x01.",
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_broken_opcodes(tmp_path, content, form):
    error_of(packed(tmp_path / "file.pth", content, form=form))


def test_a_memo_of_any_number_takes_no_memory(tmp_path):
    assert read(packed(tmp_path / "file.pth", b"\x80\x02K\x07r\xff\xff\xff\x7f.")) == 7


def test_values_nested_deep(tmp_path):
    depth = 100_000
    value = read(packed(tmp_path / "lists.pth", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."))
    assert len(list(settings_in(value))) == 1
    things = b"\x80\x02" + b"clib\nThing\n" * 2_000 + b")" + b"R\x85" * 2_000 + b"."
    assert len(list(settings_in(read(packed(tmp_path / "objects.pth", things))))) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_keys_nested_without_end(tmp_path, form):
    """Python's hash of a tuple calls itself and checks no depth: such a key crashes the interpreter."""
    nested = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."
    error_of(packed(tmp_path / "file.pth", nested, form=form), "holds 1,000,000 tuples")
    flat = b"\x80\x02})" + b"\x85" * 14_000 + b"K\x01s."
    assert len(read(packed(tmp_path / "file.pth", flat))) == 1


def test_zips_that_torch_save_does_not_make(tmp_path):
    content = pickle.dumps({"a": 1}, 2)
    for records, content_of_bomb in (([], content + bytes(10**6)), ([("data/0", bytes(10**7))], content)):
        bomb = packed(tmp_path / "bomb.pth", content_of_bomb, records, compression=zipfile.ZIP_DEFLATED)
        error_of(bomb, "not stored as torch.save does")
    error_of(packed(tmp_path / "script.pth", content, [("constants.pkl", b"")]), "TorchScript")
    # torch looks names up whatever their case, and would run the second
    error_of(packed(tmp_path / "case.pth", content, [("DATA.PKL", content)]), "no file of torch.save")
    with zipfile.ZipFile(tmp_path / "none.pth", "w") as archive:
        archive.writestr("readme.txt", "x")
    error_of(tmp_path / "none.pth", "no file of torch.save")
    with zipfile.ZipFile(tmp_path / "none.pth", "w"):
        pass
    error_of(tmp_path / "none.pth")
    # two names for the same bytes
    path = saved(tmp_path / "file.pth", {"a": torch.randn(1000), "b": torch.randn(1000)})
    raw = path.read_bytes()
    first, second = (raw.index(b"file/data/" + name) - 30 for name in (b"0", b"1"))
    offset = raw.rindex(b"file/data/1") - 4  # the record's place, in the directory at the end
    assert struct.unpack("<I", raw[offset : offset + 4]) == (second,)
    path.write_bytes(raw[:offset] + struct.pack("<I", first) + raw[offset + 4 :])
    error_of(path, "cut short or damaged")


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_or_changed_anywhere(tmp_path, form):
    ordered = collections.OrderedDict(x=torch.ones(2, dtype=torch.bfloat16))
    value = {"a": torch.randn(300), "b": [1, 2.5, "text"], "c": ordered}
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
            read(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 (it may as well be read: not every byte matters)


def test_a_changed_number_is_noticed(tmp_path):
    path = saved(tmp_path / "file.pt", {"a": torch.full((50,), 1.0)})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<f", 1.0) * 50, struct.pack("<f", 1.0) * 49 + struct.pack("<f", 2.0)))
    error_of(path, "cut short or damaged", "checksum")


def test_old_files_with_more_than_weights(tmp_path):
    path = saved(tmp_path / "file.pt", {"a": torch.ones(1), "args": argparse.Namespace(x=1)}, "legacy")
    error_of(path, "before PyTorch 1.6", "argparse.Namespace", "save its state_dict alone again")


def test_dict_classes_of_others_are_refused(tmp_path):
    """PyTorch's loader sets the items of its own dicts alone."""
    error_of(saved(tmp_path / "file.pt", collections.defaultdict(list, a=[1])), "holds more than weights", "SETITEM")


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
        error_of(tmp_path / "bare.pth", "is no file of torch.save")
    (tmp_path / "old.pth").write_bytes(bytes(257) + b"ustar" + bytes(300))
    error_of(tmp_path / "old.pth", "is no file of torch.save")
    error_of(tmp_path / "absent.pth", "No such file")
