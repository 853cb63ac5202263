"""Command lines: the list of commands, flags and their values, help, completion, errors, Ctrl-C, the next command."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import shtab
import torch

import smooseg_fast
from smooseg_fast import __main__ as smooseg
from smooseg_fast import cache, command, completion, data, train
from smooseg_fast.command import end, predict_command, run
from smooseg_fast.config import PRESETS, TrainConfig, preset, with_changes
from smooseg_fast.errors import UserError, WriteError
from smooseg_fast.learn.runfolder import RunFolder
from smooseg_fast.predict import PredictConfig
from smooseg_fast.segment.kmeans import spherical_kmeans
from smooseg_fast.system.commandline import MODULES, command_line, parse, parser_of, read, starter
from smooseg_fast.system.fields import check_fields, fields_of, helps_of
from smooseg_fast.system.signals import Interrupted, importing

PATHS = os.pathsep.join([str(Path(smooseg_fast.__file__).parents[1]), *sys.path])
ALL_SETTINGS = completion.SETTINGS.values()


def raises(error):
    def main(args):
        raise error

    return main


def test_an_error_of_the_users_is_one_line(capsys):
    assert run(raises(UserError("--data x:\n  is odd; give y")), []) == 2
    assert capsys.readouterr() == ("", "error: --data x: is odd; give y\n")


AGAIN = "python -m test_command --out 'my runs'"


def test_ctrl_c_says_what_resumes(capsys):
    assert run(raises(KeyboardInterrupt()), ["--out", "my runs"]) == 130
    assert capsys.readouterr() == ("", f"interrupted; what was finished is kept\nresume     {AGAIN}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_knows_what_is_kept_says_it(capsys, number):
    assert run(raises(Interrupted(number, "step 3 is saved")), ["--out", "my runs"]) == 128 + number
    assert capsys.readouterr() == ("", f"interrupted; step 3 is saved\nresume     {AGAIN}\n")


def test_sigterm_anywhere_is_said_like_ctrl_c(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run(lambda args: signal.raise_signal(signal.SIGTERM), []) == 143
    assert "resume     python -m test_command" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_import_does_not_hide_ctrl_c():
    def half_imported():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("half imported") from None  # as NumPy does

    with pytest.raises(KeyboardInterrupt), importing():
        half_imported()
    with pytest.raises(KeyboardInterrupt), importing(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ImportError), importing():
        raise ImportError("nosuch")


def test_a_full_disk_says_what_resumes(capsys):
    assert run(raises(WriteError("a.png: cannot be written (full); free some space")), ["--out", "my runs"]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: a.png: cannot be written (full); free some space; to resume then: {AGAIN}\n",
    )


def test_a_reader_that_has_gone_is_no_news():
    """The reader ends as in `... --help | head -1`: later output, and what Python flushes at its end, is dropped."""
    end, write = os.pipe()
    os.close(end)
    done = subprocess.run(
        [sys.executable, "-m", "smooseg_fast.choose", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS},
        timeout=100,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raises(ZeroDivisionError()), [])


# the program


def test_without_arguments_it_lists_its_commands(capsys):
    assert smooseg.main([]) == 0
    listed = capsys.readouterr().out
    assert smooseg.main(["--help"]) == 0
    assert capsys.readouterr().out == listed
    for name, about in smooseg.COMMANDS.items():
        assert re.search(rf"^    {name} +{about.split()[0]}", listed, re.MULTILINE)


def test_every_command_is_listed_and_completed():
    files = Path(smooseg_fast.__file__).parent.glob("*.py")
    modules = {path.stem for path in files if re.search(r"sys\.exit\((end\()?run\(main", path.read_text())}
    assert modules == {MODULES.get(name, name) for name in smooseg.COMMANDS}
    assert {path.split()[0] for path in completion.SETTINGS} == set(smooseg.COMMANDS)


def test_version(capsys):
    assert smooseg.main(["--version"]) == 0
    assert capsys.readouterr().out == f"smooseg {smooseg_fast.__version__}\n"


def test_a_command_that_is_none_is_answered_with_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/smooseg"])
    assert smooseg.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: trian: is not a command of smooseg; did you mean train\n"
    assert smooseg.main(["xyz"]) == 2
    assert "; there are train, predict, evaluate," in capsys.readouterr().err
    assert smooseg.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean smooseg train --data {tmp_path}\n")


def test_it_runs_a_command(tmp_path, capsys):
    assert smooseg.main(["cache", "ls", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: holds no features\n"
    assert smooseg.main(["cache"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed if line.startswith("    ")] == ["ls", "rm", "verify"]
    assert smooseg.main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    """Every page of --help, in a process where the heavy packages cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'matplotlib', 'scipy', 'triton'): sys.modules[name] = None\n"
        "from smooseg_fast import completion\n"
        "from smooseg_fast.__main__ import main\n"
        "paths = [[], *(path.split() for path in completion.SETTINGS), ['cache'], ['data']]\n"
        "assert not any(main([*path, '--help']) for path in paths) and not main(['completion', 'bash'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS},
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") == 3 + len(completion.SETTINGS)


@pytest.mark.parametrize("arguments", [["-m", "smooseg_fast.train"], ["-m", "smooseg_fast", "train"]], ids=" ".join)
def test_both_ways_to_start_a_command_print_their_own_name(arguments):
    done = subprocess.run(
        [sys.executable, *arguments, "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS, "COLUMNS": "80"},
        timeout=100,
    )
    assert done.stdout.startswith(f"usage: python {' '.join(arguments)} [--flag value ...]\n")


# the next command

STARTS = [
    ("/venv/bin/smooseg", 1, "smooseg train"),
    ("C:/Scripts/smooseg-script.py", 1, "smooseg train"),
    ("/lib/smooseg_fast/__main__.py", 1, "python -m smooseg_fast train"),
    ("/lib/smooseg_fast/train.py", 1, "python -m smooseg_fast.train"),
    ("/lib/pytest/__main__.py", 1, "python -m smooseg_fast.train"),
    ("/venv/bin/smooseg", 2, "torchrun --nproc-per-node=2 --no-python smooseg train"),
    ("/lib/smooseg_fast/__main__.py", 2, "torchrun --nproc-per-node=2 -m smooseg_fast train"),
    ("/lib/smooseg_fast/train.py", 2, "torchrun --nproc-per-node=2 -m smooseg_fast.train"),
]


@pytest.mark.parametrize(("script", "processes", "words"), STARTS)
def test_commands_are_printed_as_the_program_was_started(script, processes, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    assert " ".join(starter("smooseg_fast.train", processes)) == words


@pytest.mark.parametrize(
    ("script", "words"), [("smooseg", "smooseg backbones"), ("x", "python -m smooseg_fast.backbonelist")]
)
def test_a_command_whose_module_has_another_name(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/venv/bin/{script}"])
    assert command_line("backbones") == words == " ".join(starter("smooseg_fast.backbonelist"))


def test_next_and_resume_are_commands_of_smooseg(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/smooseg"])
    assert command_line("choose", "--run", "my runs") == "smooseg choose --run 'my runs'"
    assert predict_command(Path("c"), Path("i"), Path("o"), "a:b").startswith(
        "smooseg predict --checkpoint c --images i"
    )
    assert predict_command(Path("c"), Path("i"), Path("o"), "a:b").endswith(" --backbone a:b")

    def stopped(args):
        raise KeyboardInterrupt

    stopped.__module__ = "smooseg_fast.train"
    assert run(stopped, ["--data", "photos"]) == 130
    assert capsys.readouterr().err.endswith("\nresume     smooseg train --data photos\n")


# flags

# a legal value of every setting that is not the default of any preset
OTHER = {
    "data": "photos",
    "ignore": "0 7",
    "preset": "cityscapes",
    "size": "64",
    "eval_size": "72",
    "crops": "center",
    "resample": "bilinear",
    "scale": "0.5 0.25",
    "intensity": "image",
    "bands": "4 3 2",
    "pages": "all",
    "margin": "24",
    "backbone": "facebook/dino-vits16",
    "backbone_precision": "float16",
    "device": "cuda:1",
    "cache": "features",
    "cache_limit": "50GB",
    "prototypes": "7",
    "groups": "6",
    "granularity": "0.01 -0.02",
    "threshold_within": "0.15",
    "threshold_across": "0.25",
    "temperature": "0.3",
    "steps": "17",
    "batch_size": "6",
    "patches": "19",
    "lr": "0.002",
    "lr_prototypes": "0.003",
    "dropout": "0.4",
    "teacher_decay": "0.9",
    "channels": "33",
    "code_dim": "12",
    "init": "random",
    "heads": "3",
    "seed": "5",
    "data_seed": "6",
    "on_drift": "stop",
    "impl": "dense",
    "precision": "bfloat16",
    "out": "runs/x",
    "log": "tensorboard",
    "log_every": "21",
    "checkpoint_every": "22",
}
# settings that a run may change when it resumes: outputs, and what the machine does
NOT_LEARNING = {"out", "cache", "cache_limit", "log", "log_every", "checkpoint_every", "verbose", "device", "impl"}
NOT_LEARNING |= {"backbone_precision", "precision", "deterministic"}


@pytest.mark.parametrize("field", fields_of(TrainConfig).values(), ids=lambda field: field.name)
def test_every_flag_arrives_in_the_settings_and_in_the_identity_of_a_run(field):
    switch = field.kind is bool
    words = [field.label] if switch else [field.label, *OTHER[field.name].split()]
    expected = not field.bounds and switch
    if not switch:
        items = tuple(map(field.kind, words[1:]))
        expected = items if field.many else items[0]
    base = ["--data", "photos", *(["--steps", "9"] if field.name == "init" else [])]
    if field.name.startswith("threshold"):
        other = {"threshold_within": "--threshold-across", "threshold_across": "--threshold-within"}[field.name]
        base += [other, "0.33"]
        before = dataclasses.replace(PRESETS["folder"], data="photos", granularity=None, threshold_within=0.33)
        before = dataclasses.replace(before, threshold_across=0.33)
    else:
        before = train.configure(["--preset", "demo"] if field.name == "data" else base)
    config = train.configure([*base, *words])
    assert getattr(config, field.name) == expected
    assert getattr(before, field.name) != expected
    if field.name != "preset":
        assert {name for name in fields_of(TrainConfig) if getattr(config, name) != getattr(before, name)} >= {
            field.name
        }
    identity = config.learning() != before.learning() and config.learning().get(field.name) == expected
    assert identity == (field.name not in NOT_LEARNING)


@pytest.mark.parametrize("field", fields_of(TrainConfig).values(), ids=lambda field: field.name)
def test_a_flag_changes_its_own_setting_alone(field):
    if field.name in ("data", "preset", "granularity", "threshold_within", "threshold_across"):
        return  # they decide about others
    words = [field.label] if field.kind is bool else [f"{field.label}={OTHER[field.name].split()[0]}"]
    base = ["--data", "photos", *(["--steps", "9"] if field.name == "init" else [])]
    before, after = (vars(train.configure([*base, *more])) for more in ([], words))
    assert {name for name in before if before[name] != after[name]} == {field.name}


def test_a_preset_is_the_start_and_flags_go_before_it():
    config = train.configure(["--steps", "9", "--data", "d", "--preset=potsdam"])
    assert config == dataclasses.replace(PRESETS["potsdam"], steps=9, data="d")
    assert train.configure([]) == PRESETS["demo"]
    assert train.configure(["--data", "d"]) == dataclasses.replace(PRESETS["folder"], data="d")
    # a value that is the preset's, but given: thresholds go before the granularity
    given = train.configure(["--data", "d", "--threshold-within", "-0.02", "--threshold-across", "5e-1"])
    assert (given.granularity, given.threshold_within, given.threshold_across) == (None, -0.02, 0.5)


def test_forms_of_flags():
    for words in (
        ["--batch-size", "6"],
        ["--batch_size", "6"],
        ["--batch-size=6"],
        ["--batch-size", "5", "--batch-size", "6"],
    ):
        assert read(TrainConfig, words, "x") == {"batch_size": 6}
    assert read(TrainConfig, ["--deterministic"], "x") == {"deterministic": True}
    assert read(TrainConfig, ["--no-deterministic"], "x") == {"deterministic": False}
    assert read(TrainConfig, ["--granularity", "0.1", "-1e-3", "-2"], "x") == {"granularity": (0.1, -0.001, -2.0)}
    assert read(TrainConfig, ["--prototypes", "None", "--log=None"], "x") == {"prototypes": None, "log": None}
    assert read(TrainConfig, ["--granularity", "None"], "x") == {"granularity": None}
    assert read(TrainConfig, ["--out", "-strange"], "x") == {"out": "-strange"}
    assert parse(cache.Remove, ["a", "b", "--cache", "c"], "x") == cache.Remove(keys=("a", "b"), cache="c")
    assert parse(data.CheckConfig, ["--sample", "3", "DIR"], "x") == data.CheckConfig(data="DIR", sample=3)


WRONG = [
    ("--granularty 0.1", "--granularty: is not a flag; did you mean --granularity"),
    ("--granularty=0.1", "--granularty: is not a flag; did you mean --granularity"),
    ("--qqq 1", "--qqq: is not a flag; smooseg train --help lists the flags"),
    ("-x", "-x: is not a flag; smooseg train --help lists the flags"),
    ("my_photos", "my_photos: belongs to no flag; did you mean --data my_photos\n"),
    ("--steps 3 my_photos", "my_photos: belongs to no flag; did you mean --data my_photos\n"),
    ("--data a.jpg b.jpg", "b.jpg: belongs to no flag; put names with spaces in quotes\n"),
    ("--gran 0.1", "--gran: is not a flag; "),  # no abbreviations
    ("--steps", "--steps: expected one argument; smooseg train --help lists the flags\n"),
    (
        "--granularity --steps 3",
        "--granularity: expected at least one argument; smooseg train --help lists the flags\n",
    ),
    ("--impl --steps 3", "--impl: expected one argument; smooseg train --help lists the flags\n"),
    ("--deterministic=yes", "--deterministic: ignored explicit argument 'yes'; smooseg train --help "),
    ("--granularity 0.1 x", "--granularity: must be a number, got 'x'"),
    ("--steps 2.5", "--steps: must be a whole number, got '2.5'"),
    ("--lr fast", "--lr: must be a number, got 'fast'"),
    ("--lr nan", "--lr: must be between 0 and 1000, got nan"),
    ("--lr -1e-3", "--lr: must be between 0 and 1000, got -0.001"),
    ("--size 65537", "--size: must be at most 65,536 pixels, got 65537"),
    ("--size 7", "--size: must be at least 8, got 7"),
    ("--log paper", "--log: 'paper' is not known; choose one of tensorboard, wandb"),
    ("--on-drift run", "--on-drift: 'run' is not known; choose one of warn, stop"),
    ("--cache-limit 50", "--cache-limit 50: no size; give a number above 0 with its unit, such as 50GB"),
    ("--seed 9223372036854775807 --heads 2", "--seed: must be below 2^63, got 9223372036854775808"),
    ("--out=", "--out: is empty; give a folder, or leave it out"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_what_is_typed_wrong_is_answered_in_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/smooseg"])
    assert smooseg.main(["train", *words.split(" ")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "flag"),
    [("train", "data"), ("predict", "images"), ("evaluate", "data"), ("similarity", "data"), ("choose", "run")],
)
def test_a_bare_folder_is_answered_with_its_flag(command, flag, capsys):
    assert smooseg.main([command, "my photos"]) == 2
    assert capsys.readouterr().err == f"error: my photos: belongs to no flag; did you mean --{flag} 'my photos'\n"


def test_a_flag_that_is_needed_is_named(capsys):
    assert smooseg.main(["predict", "--images", "x", "--out", "y"]) == 2
    assert capsys.readouterr().err.startswith("error: --checkpoint: missing; ")
    assert smooseg.main(["convert", "--out", "y"]) == 2
    assert capsys.readouterr().err.startswith("error: FILE: missing; ")


IN_PYTHON = [
    (dict(impl="cuda"), "--impl: 'cuda' is not known; choose one of auto, triton, torch, dense"),
    (dict(steps=-1), "--steps: must be at least 0, got -1"),
    (dict(steps=2.0), "--steps: must be a whole number, got 2.0"),
    (dict(steps=True), "--steps: must be a whole number, got True"),
    (dict(batch_size=None), "--batch-size: must be a whole number, got None"),
    (dict(temperature="hot"), "--temperature: must be a number, got 'hot'"),
    (dict(granularity=["a"]), "--granularity: must be "),
    (dict(granularity="0.1"), "--granularity: must be "),
    (dict(granularity=object), "--granularity: must be "),
    (dict(deterministic=1), "--deterministic: must be True or False, got 1"),
    (dict(crops=None), "--crops: must be text, got None"),
    (dict(granularty=0.1), "granularty: is not a setting; did you mean granularity"),
    (dict(tree=1), "tree: is not a setting; known are data,"),  # not near to preset
    (dict(qqq=0.1), "qqq: is not a setting; known are data, preset, ignore,"),
]


@pytest.mark.parametrize(("settings", "message"), IN_PYTHON, ids=[message[:50] for _, message in IN_PYTHON])
def test_settings_from_python_are_held_against_the_same_declarations(settings, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        with_changes(preset("folder"), **settings)


def test_presets_are_legal_and_named():
    for name, config in PRESETS.items():
        assert config.preset == name
        check_fields(config)
    assert fields_of(TrainConfig)["preset"].choices == tuple(PRESETS)
    with pytest.raises(UserError, match=r"^--preset: 'x' is not known; choose one of demo, folder"):
        preset("x")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--cache", ""], "--cache: is empty; give a folder, or leave it out"),
        (["--data", "in\0x"], "--data: holds a NUL character"),
        (["--granularity", "-1e308"], "--granularity: must be between -2 and 2, got -1e+308"),
        (["--heads", "100000"], "--heads: must be at most 1,000, got 100000"),
        (["--code-dim", "1000000000"], "--code-dim: must be at most 4,096, got 1000000000"),
        (["--device", "meta", "--data", "in", "--backbone", "filterbank"], "--device meta: cannot be used here ("),
    ],
)
def test_values_that_no_run_can_have(folder, capsys, words, line):
    Path("in").symlink_to(folder)
    assert run(train.main, ["--out", "out", *words]) == 2
    assert f"error: {line}" in capsys.readouterr().err
    assert not Path("out").exists()


def test_any_legal_seed_draws():
    rows = torch.nn.functional.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    assert len(spherical_kmeans(rows, 2, starts=4, seed=2**63 - 1).centres) == 2


# help


def test_help_shows_groups_choices_ranges_and_the_defaults_of_the_preset(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert smooseg.main(["train", "--preset", "cocostuff27", "--help"]) == 0
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines() if line and line[0].islower()][1:]
    assert titles == ["options:", "data:", "features:", "learning:", "output:"]
    assert "  --impl {auto,triton,torch,dense}\n" in shown
    words = " ".join(shown.split())
    assert "--prototypes N Number of fine groups" in words
    assert "16 without labels]. (2 to 255) [27] --groups N" in words
    assert "where they hurt. (at least 0) [8000] --batch-size N" in words
    assert "Seed of the initial weights. (at least 0) [0]" in shown
    assert "  --deterministic  " in shown


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda settings: settings.__name__)
def test_help_is_as_wide_as_the_terminal(settings, monkeypatch):
    for width in (50, 80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = parser_of(settings, "smooseg x").format_help().splitlines()
        assert all(len(line) <= width or line.startswith("  --") for line in lines)
        flags = {line.split()[0] for line in lines if line.startswith("  --")}
        off = {"--no-mirror": "--mirror", "--no-measure": "--measure"}
        expected = {field.label for field in fields_of(settings).values() if not field.value.positional}
        assert {off.get(name, name) for name in flags} == expected
        assert any(line.startswith("  -h, --help ") for line in lines)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda settings: settings.__name__)
def test_every_setting_is_explained(settings):
    helps = helps_of(settings)
    for name, field in fields_of(settings).items():
        assert re.search(r"[.\])|]$", helps[name]), name
        assert not re.match(r"(Of|What|As|Where) ", helps[name]), name
        assert field.group


def test_a_switch_is_shown_as_what_it_changes(capsys):
    shown = parser_of(PredictConfig, "x").format_help()
    assert "  --no-mirror  " in shown
    assert "--mirror" not in shown
    assert "  --mirror  " in parser_of(PredictConfig, "x", {"mirror": False}).format_help()
    assert read(PredictConfig, ["--mirror"], "x") == {"mirror": True}
    assert read(PredictConfig, ["--no-mirror"], "x") == {"mirror": False}


# completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "plan.ckpt").touch()
    (tmp_path / "smooseg.bash").write_text(shtab.complete(completion.tree(), "bash") + "\n")
    questions = {
        "": set(smooseg.COMMANDS),
        "-": {"-h", "--help", "--version"},
        "tr": {"train"},
        "cache ": {"ls", "rm", "verify"},
        "cache rm --o": {"--older"},
        "data check --": {
            "--ignore",
            "--intensity",
            "--bands",
            "--pages",
            "--sample",
            "--pictures",
            "--backbone",
            "--device",
            "--help",
        },
        "train --impl ": {"auto", "triton", "torch", "dense"},
        "train --impl tr": {"triton"},
        "train --data photos --granul": {"--granularity"},
        "train --granularity 0.1 0.2 --granul": {"--granularity"},
        "train --deter": {"--deterministic"},
        "evaluate --no-": {"--no-mirror"},
        "train --data p": {"photos"},  # folders alone
        "data check p": {"photos"},
        "predict --images p": {"photos", "plan.ckpt"},
        "predict --backbone p": {"photos", "plan.ckpt"},
        "convert p": {"photos", "plan.ckpt"},
        "train --steps p": set(),
        "completion ": {"bash", "zsh", "fish", "tcsh"},
    }
    lines = ["source ./smooseg.bash", "complete -p smooseg"]
    for words in questions:
        split = words.split(" ") if words else [""]
        quoted = " ".join(f"'{word}'" for word in split)
        lines.append(f"COMP_WORDS=(smooseg {quoted}); COMP_CWORD={len(split)}; _shtab_smooseg")
        lines.append('echo "${COMPREPLY[*]}"')
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stderr == ""
    registered, *answers = done.stdout.splitlines()
    assert registered == "complete -o bashdefault -F _shtab_smooseg smooseg"
    for (words, expected), answer in zip(questions.items(), answers, strict=True):
        assert set(answer.split()) == expected, words


@pytest.mark.parametrize(("shell", "prefix"), [("bash", "--"), ("zsh", "--"), ("tcsh", ""), ("fish", "")])
def test_completion_knows_every_flag_in_every_shell(shell, prefix, capsys):
    assert run(completion.main, [shell]) == 0
    script = capsys.readouterr().out
    assert {path.split()[0] for path in completion.SETTINGS} <= set(re.findall(r"[a-z]+", script))
    for settings in completion.SETTINGS.values():
        for field in fields_of(settings).values():
            for flag in field.flags:
                nothing_new = (
                    "--mirror",
                    "--measure",
                    "--no-deterministic",
                    "--no-verbose",
                    "--no-all",
                    "--no-instances",
                    "--no-whole",
                    "--no-probes",
                    "--no-from-labels",
                    "--no-confidence",
                    "--no-probabilities",
                )
                if flag not in nothing_new:
                    assert re.search(rf"[\s\"'(]{prefix}{flag[2:]}\b(?!-)", script), flag


# the output folder


def test_the_output_folder_is_said_first_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("smooseg_fast.datasets.demo.datasets_of", lambda config: raises(UserError("no data"))([]))

    def first_line(*args):
        assert run(train.main, list(args)) == 2
        return capsys.readouterr().out.splitlines()[0]

    def hold(path, *args):
        held = RunFolder(Path(path), train.configure(["--data", "photos", *args]))
        held.settle("filterbank")
        held.claim()

    assert first_line("--data", "photos") == "output     runs/photos"
    assert first_line("--data", "photos", "--out", "mine") == "output     mine"
    hold("runs/photos", "--prototypes", "5")
    reason = "runs/photos holds another run, --prototypes 5 against 16"
    assert first_line("--data", "photos", "--prototypes", "5") == "output     runs/photos"
    assert first_line("--data", "photos", "--prototypes", "16") == f"output     runs/photos-2: {reason}"
    hold("runs/photos-2", "--prototypes", "16", "--steps", "7")
    assert first_line("--data", "photos", "--prototypes", "16") == f"output     runs/photos-3: {reason}"
    assert first_line("--data", "photos", "--prototypes", "5", "--granularity", "0.1", "0.2").endswith(
        "runs/photos holds another run, --granularity 0.0 against 0.1 0.2"
    )
    assert first_line("--data", "photos", "--prototypes", "5", "--backbone", "filterbank") == "output     runs/photos"
    reason = "runs/photos holds another run, --backbone filterbank against mine:colours"
    assert first_line("--data", "photos", "--prototypes", "5", "--backbone", "mine:colours").endswith(reason)
    Path("runs/demo").write_text("")
    assert first_line() == "output     runs/demo-2: runs/demo cannot be read (run.json: Not a directory)"
    assert RunFolder(Path("runs/photos"), train.configure(["--data", "photos", "--prototypes", "5"]))


def test_the_public_names():
    assert {"fit", "Segmenter", "UserError"} <= set(dir(smooseg_fast))
    with contextlib.suppress(AttributeError):
        assert not smooseg_fast.nonsense
    from smooseg_fast import Segmenter, fit

    assert callable(fit)
    assert callable(Segmenter.load)


def test_ctrl_c_while_pytorch_loads_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    assert run(train.main, []) == 130
    assert capsys.readouterr().err == "interrupted; nothing was begun\n"


def test_a_process_of_torchrun_ends_at_once_and_others_as_python_does(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert end(130) == 130
    assert ended == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    end(2)
    assert ended == [2]
