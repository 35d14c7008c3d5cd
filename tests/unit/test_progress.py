"""Progress on a real (pseudo) terminal and off it."""

import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

from llmmpq.progress import Silent, Terminal, duration

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PRELUDE = """
import sys, time
from llmmpq import progress
from llmmpq.progress import Terminal
progress.SHOWN_AFTER_S = 0.3
terminal = Terminal()
"""


def on_a_terminal(code, **environment):
    """stdout, and everything ever drawn on stderr, of a program whose stderr is a terminal."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=writer,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"} | environment,
    )
    os.close(writer)
    drawn = bytearray()
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # what Linux answers when the other end has closed
            break
        if not piece:
            break
        drawn += piece
    os.close(reader)
    out = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0, drawn.decode()
    return out.decode(), drawn.decode()


def lines_of(drawn):
    return [line.rstrip() for line in re.split(r"[\r\n]+", CONTROL.sub("", drawn)) if line.strip()]


def test_silent_says_nothing(capsys):
    progress = Silent()
    progress.note("hello")
    with progress.task("work", 3, "blocks") as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_off_a_terminal_only_notes_appear_one_per_line_on_stderr(capsys):
    progress = Terminal()
    progress.note("first [bold]note[/bold]")
    with progress.task("work", 3, "blocks") as advance, progress.task("inner", 1) as advance_inner:
        progress.note("second note " * 20)
        advance_inner(1)
        advance(3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "first [bold]note[/bold]\n" + "second note " * 20 + "\n"


def test_colour_forced_on_a_log_file_draws_no_bars_there(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Terminal().task("work", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_a_long_task_shows_count_time_and_memory_and_leaves_one_line():
    out, drawn = on_a_terminal("""
        with terminal.task("measure", 4, "blocks") as advance:
            for _ in range(4):
                time.sleep(0.2)
                advance(1)
            print("a result")
        """)
    lines = lines_of(drawn)
    assert any(re.fullmatch(r"measure .* [1-4] of 4 blocks 0:00:0\d left \S+ [\d.]+ MB", line) for line in lines)
    assert re.fullmatch(r"measure: 4 blocks in \d\.\d s", lines[-1])
    assert out == "a result\n"


def test_a_short_task_shows_nothing():
    _, drawn = on_a_terminal("""
        for _ in range(3):
            with terminal.task("measure", 1, "blocks") as advance:
                advance(1)
        """)
    assert lines_of(drawn) == []
    assert "\n" not in drawn


def test_nested_tasks_and_notes_above_them():
    _, drawn = on_a_terminal("""
        with terminal.task("outer", 2, "blocks") as advance:
            for index in range(2):
                with terminal.task(f"inner {index}", 3, "linears") as advance_inner:
                    for _ in range(3):
                        time.sleep(0.2)
                        advance_inner(1)
                terminal.note(f"note [{index}] " + "long " * 30)
                advance(1)
        terminal.note("end")
        """)
    lines = lines_of(drawn)
    for shown in ("outer .* of 2 blocks", r"inner 0 .* of 3 linears", r"inner 1 .* of 3 linears"):
        assert any(re.match(shown, line) for line in lines), shown
    assert [line for line in lines if line.startswith("note")] == [f"note [{n}] {'long ' * 30}".rstrip() for n in "01"]
    assert re.match("outer: 2 blocks in", lines[-2])
    assert lines[-1] == "end"
    assert not any(re.match("inner .: ", line) for line in lines)


def test_bytes_are_readable():
    _, drawn = on_a_terminal("""
        with terminal.task("write", 3_000_000_000, "bytes") as advance:
            advance(1_500_000_000)
            time.sleep(0.6)
        """)
    assert "1.5 GB of 3.0 GB" in drawn
    assert re.match(r"write: 3\.0 GB in", lines_of(drawn)[-1])


def test_a_failed_task_frees_the_terminal_and_claims_nothing():
    _, drawn = on_a_terminal("""
        try:
            with terminal.task("measure", 4, "blocks") as advance:
                time.sleep(0.5)
                raise ValueError
        except ValueError:
            pass
        with terminal.task("again", 1) as advance:
            time.sleep(0.5)
        """)
    lines = lines_of(drawn)
    assert not any(line.startswith("measure:") for line in lines)
    assert re.match(r"again: 1 in", lines[-1])
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") > 0  # the cursor is back


def test_a_dumb_terminal_gets_notes_only():
    _, drawn = on_a_terminal(
        """
        with terminal.task("measure", 1) as advance:
            time.sleep(0.5)
        terminal.note("end")
        """,
        TERM="dumb",
    )
    assert drawn == "end\r\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (11220, "3 h 07 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
