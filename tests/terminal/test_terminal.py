"""What commands print: names as they are, in any encoding and width, and how commands end."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from jaxneurons.qrnca import views as qrnca_views
from jaxneurons.relspec import views as relspec_views
from jaxneurons.storage.printable import counted, encodable
from jaxneurons.terminal import console as terminal
from jaxneurons.terminal.stopping import BROKEN_PIPE, PROMISE, too_much

HOSTILE = (
    "[bold]x[/]",
    "[/nothing]",
    ":bug:",
    "a\nb\x1b[31mred\x07",
    "\u202eabc",
    "{task}",
    "生物±",
)
AS_SHOWN = ("[bold]x[/]", "[/nothing]", ":bug:", "a b\\x1b[31mred\\x07", "\\u202eabc", "{task}")
PROGRAM = (sys.executable, "-m", "jaxneurons.cli")


def printed(show, monkeypatch, *, encoding="utf-8", width=80):
    """What a function of `terminal` prints, as bytes in an encoding, decoded."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    for module in (terminal, qrnca_views, relspec_views):
        monkeypatch.setattr(module, "console", terminal.Plain(file=file, width=width))
    show()
    file.flush()
    return raw.getvalue().decode(encoding)


def comparison(name):
    return [
        {
            "relation": name,
            "neurons": 120,
            "other_neurons": 130,
            "shared": 17,
            "shared_others": 3.5,
            "same_wording": True,
        }
    ]


def prediction(groups):
    return [
        {"group": group, "readout": readout, "pool": pool, "accuracy": 0.125 * (1 + i % 4)}
        for i, group in enumerate(groups)
        for readout, pool in (("chance", None), ("ridge", "own"))
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "latin-1", "shift_jis"])
@pytest.mark.parametrize("name", HOSTILE)
def test_tables_hold_names_as_they_are(monkeypatch, name, encoding):
    text = printed(
        lambda: relspec_views.show_comparison(comparison(name)), monkeypatch, encoding=encoding
    )
    line = next(line for line in text.splitlines() if "17" in line)
    shown = AS_SHOWN[HOSTILE.index(name)] if name in HOSTILE[:-1] else None
    if shown is None:
        escapes = {"utf-8": "生物±", "shift_jis": "生物±", "ascii": "\\u751f\\u7269+/-"}
        shown = escapes.get(encoding, "\\u751f\\u7269±")
    cells = re.sub(" +", " ", line.replace("|", " ")).strip()  # the frame of an ASCII table
    assert cells == f"{shown} 120, 130 17 4 the same"
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_long_name_leaves_room_for_the_numbers(monkeypatch, width):
    rows = comparison("of which " * 40)
    text = printed(lambda: relspec_views.show_comparison(rows), monkeypatch, width=width)
    assert max(map(cell_len, text.splitlines())) <= max(width, terminal.LEAST)
    if width == 80:
        assert re.search(r"of which of .*….* 120, 130 +17 +4 +the same", text)


def test_a_name_of_escapes_leaves_room_for_the_numbers(monkeypatch):
    """Twelve letters of a script that the terminal lacks are 72 columns of escapes."""
    rows = comparison("\u751f\u7269" * 6)
    text = printed(lambda: relspec_views.show_comparison(rows), monkeypatch, encoding="ascii")
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    assert re.search(r"\\u751f\\u7269.*\| *120, 130 \| *17 \| *4 \| *the same", text)


def test_readouts_of_many_groups_are_rows(monkeypatch):
    few = printed(lambda: qrnca_views.show_prediction(prediction("abc")), monkeypatch)
    assert re.search(r"ridge, own +12% +25% +38%", few)
    groups = [f"group {i}" for i in range(40)]
    many = printed(lambda: qrnca_views.show_prediction(prediction(groups)), monkeypatch)
    assert re.findall(r"^ +group (\d+) ", many, re.MULTILINE) == [str(i) for i in range(40)]
    assert re.search(r"group 1 +25% +25%", many)


def test_an_evaluation_of_queries_fits_80_columns_whole(monkeypatch):
    numbers = {"related": 12.345, "unrelated": -0.5, "pcr": 12.3, "pcr_low": 10.1, "share": 1.01,
               "pcr_high": 123.4, "absolute_pcr": 12.3, "beyond": -0.45}  # fmt: skip
    methods = ("QRNCA", "with common neurons")
    rows = [{"method": m, "change": "suppressed", "group": "all", **numbers} for m in methods]
    text = printed(lambda: qrnca_views.show_evaluation(rows), monkeypatch)
    title, _, header, *lines = text.splitlines()
    assert title == "Suppressed: relative change of the answer's probability, in %"
    assert header.split() == [
        *("method", "related", "unrelated", "PCR", "95", "%", "abs.", "share", "beyond")
    ]
    (line,) = (line for line in lines if "with common neurons" in line)
    assert line.split()[3:] == ["+1,234.5", "-50.0", "12", "10", "to", "123", "12", "101%", "-45.0"]
    assert max(map(cell_len, text.splitlines())) <= 80
    rows = [row | {"pcr_low": 1e9, "pcr_high": 1e10} for row in rows]
    wide = printed(lambda: qrnca_views.show_evaluation(rows), monkeypatch)
    assert "1,000,000,000 to 10,000,000,000" in wide
    assert max(map(cell_len, wide.splitlines())) <= 80


def test_loading_says_fetched_only_of_what_is(monkeypatch, tmp_path):
    import contextlib

    from jaxneurons.checkpoints import loading
    from jaxneurons.errors import SourceError

    said = []

    def load(source, **unused):
        raise SourceError("not here")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(
        terminal.Plain, "busy", lambda self, what: said.append(what) or contextlib.nullcontext()
    )
    for source in ("lab", f"{tmp_path}", "smollm2-135m", "org/name"):
        with pytest.raises(SourceError):
            terminal.load_and_say(source)
    fetched = " (fetched once, then cached)"
    assert [what.removeprefix("Loading ") for what in said] == [
        *("lab ...", f"{tmp_path} ...", f"smollm2-135m{fetched} ...", f"org/name{fetched} ..."),
    ]


def test_warnings_end_at_words_in_a_terminal_and_are_one_line_in_a_file(monkeypatch, capsys):
    words = " ".join(["neighbourhood"] * 12)
    for is_terminal in (True, False):
        errors = terminal.Plain(stderr=True, width=40, force_terminal=is_terminal, no_color=True)
        monkeypatch.setattr(terminal, "errors", errors)
        terminal.warn(words)
        text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)
        assert text.split() == ["warning:", *words.split()]
        assert (len(text.splitlines()) == 1) is not is_terminal


def test_counts():
    assert [counted(n, "edit") for n in (0, 1, 2, 1000)] == [
        *("0 edits", "1 edit", "2 edits", "1,000 edits"),
    ]
    assert [counted(n, "query", "queries") for n in (1, 2)] == ["1 query", "2 queries"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [1, 30, 80])
def test_bars_show_names_as_they_are(monkeypatch, encoding, width):
    """On a terminal, where they are drawn: markup in a stage's name was obeyed, or an error."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    shown = terminal.Plain(file=file, width=width, force_terminal=True)
    monkeypatch.setattr(terminal, "errors", shown)
    with terminal.stages() as tell:
        for name in HOSTILE:
            tell(name, 1, 2)
    with terminal.counting("[/x] {y}") as count:
        count(1, 2)
    with terminal.counting_bytes("[/x] {y}") as count:
        count(1000)
    with shown.busy("Loading [/x] 生物"):
        pass
    file.flush()
    text = raw.getvalue().decode(encoding)
    if width == 80:
        for name in AS_SHOWN:
            assert name in text
        assert "[/x] {y}" in text
    assert "\x1b[31mred" not in text


def test_encodable_keeps_what_it_can():
    assert encodable("± – … 生 é", "latin-1") == "± - ... \\u751f é"
    assert encodable("± – … 生 é", "utf-8") == "± – … 生 é"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 6.5 GiB"), "not enough memory .*6.5 GiB"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            "not enough memory",
        ),
        (OverflowError("int too large to convert to float"), "too large to compute with"),
        (RuntimeError("a defect"), None),
        (ValueError("a defect"), None),
    ],
)
def test_memory_and_numbers_beyond_bounds_are_errors_of_the_input(error, said):
    found = too_much(error)
    assert found is None if said is None else re.search(said, found)


def test_want_of_memory_is_one_line(run, monkeypatch):
    def describe(source, **_):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr("jaxneurons.checkpoints.description.describe", describe)
    code, out, err = run("inspect", "lab")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: not enough memory \(Unable to allocate 9 GiB\); ask .*\n", err)


# --- as a program ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def heeded():
    """A shell that runs tests in the background makes them, and their children, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*arguments, env=(), **how):
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        env={**os.environ, **dict(env)},
        stdout=how.pop("stdout", subprocess.PIPE),
        stderr=how.pop("stderr", subprocess.PIPE),
        **how,
    )


def test_ascii_streams(tmp_path):
    """A table, help and an error, where a terminal shows nothing but ASCII."""
    env = {"PYTHONIOENCODING": "ascii"}
    table = start("inspect", "lab", env=env, cwd=tmp_path)
    wrong = start("inspect", "生物[/x]\x1b[31m", env=env, cwd=tmp_path)
    out, err = table.communicate()
    assert (table.returncode, err) == (0, b"")
    assert b"FFN neurons" in out
    out, err = wrong.communicate()
    assert (wrong.returncode, out) == (1, b"")
    assert err.startswith(b"error: unknown model '\\u751f\\u7269[/x]\\x1b[31m'")
    assert err.count(b"\n") == 1


def test_nobody_reads_on(tmp_path):
    """`jaxneurons inspect lab | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = start("inspect", "lab", stdout=writer, cwd=tmp_path)
    os.close(writer)
    _, err = done.communicate()
    assert (done.returncode, err) == (BROKEN_PIPE, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_room_for_the_output(tmp_path):
    with open("/dev/full", "wb") as full:
        done = start("inspect", "lab", stdout=full, cwd=tmp_path)
        _, err = done.communicate()
    assert (done.returncode, err) == (1, b"error: the output: No space left on device\n")


LAB = ("qrnca", "locate", "--model", "lab", "--queries", "lab-cloze")


def ready(process):
    """Wait until the model has been loaded, and return what was said of it."""
    return process.stdout.readline()


@pytest.mark.parametrize(
    ("number", "times", "code", "after"),
    [(signal.SIGINT, 1, 130, 1.5), (signal.SIGINT, 3, 130, 0.0), (signal.SIGTERM, 1, 143, 1.0)],
    ids=["ctrl-c", "thrice", "terminated"],
)
def test_a_signal_ends_cleanly(tmp_path, number, times, code, after):
    """While it encodes and compiles, or computes: no crash of threads that still compute."""
    process = start(*LAB, "--out", tmp_path / "run")
    assert ready(process).startswith(b"lab: 6 layers")
    time.sleep(after)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.decode()) == (code, PROMISE + "\n")


def listens(process):
    """Whether a process has a handler for SIGTERM, as Linux shows it."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return caught >> (signal.SIGTERM - 1) & 1


def test_a_failure_ends_without_a_shutdown_of_what_it_left_in_threads(tmp_path):
    """Threads of a writer that failed print tracebacks then."""
    program = (
        "import atexit, sys, jaxneurons.__main__\n"
        "atexit.register(print, 'a traceback', file=sys.stderr)\n"
        "sys.argv[1:] = ['inspect', 'nothing']\n"
        "jaxneurons.__main__.main()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error: unknown model 'nothing'")
    assert found.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the moment")
@pytest.mark.parametrize("after", [0.0, 0.5])
def test_a_signal_while_libraries_are_loaded(after):
    """No traceback, and the command ends instead of going on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxneurons", "qrnca", "locate", "--help"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not listens(process):
        time.sleep(0.005)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err in (b"stopped\n", f"{PROMISE}\n".encode())


def test_a_signal_that_a_callback_swallows_comes_again(tmp_path):
    """Python drops what is raised in a callback of its garbage collector, as JAX has one."""
    script = """
import gc, os, signal, time
from jaxneurons.terminal.stopping import until_stopped

def callback(phase, info):
    if phase == "start" and not asked:
        asked.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass

def command():
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)

asked = []
until_stopped(command, print)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, PROMISE + "\n", "")


def test_on_a_terminal(tmp_path):
    """Through a pseudo-terminal: bars are drawn, and Ctrl-C is a key."""
    own, other = pty.openpty()
    process = start(*LAB, "--out", tmp_path / "[/x]", stdout=other, stderr=other, stdin=other)
    os.close(other)
    seen = b""

    def read():
        nonlocal seen
        while True:
            try:
                more = os.read(own, 4096)
            except OSError:
                return
            if not more:
                return
            seen += more

    reader = threading.Thread(target=read)
    reader.start()
    while b"Attributing" not in seen and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    reader.join(10)
    os.close(own)
    assert PROMISE.split(";")[0].encode() in seen
    assert b"Traceback" not in seen
