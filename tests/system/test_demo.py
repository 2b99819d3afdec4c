"""`./run` as a newcomer uses it: the demo, the stack that stays, README's transcript. One epoch on a tiny dataset."""

import os
import pty
import re
import select
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.stack import free_port

pytestmark = pytest.mark.system
TOP = Path(__file__).parents[2]
LIMIT_S = 300
QUICK = ("--epochs", "1", "--variants", "onnx-fp32")


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """Three classes of 60 noisy images, one colour each."""
    folder = tmp_path_factory.mktemp("data") / "flowers"
    rng = np.random.default_rng(0)
    for label, color in (("rose", (200, 40, 60)), ("iris", (80, 60, 200)), ("leaf", (60, 160, 50))):
        (folder / label).mkdir(parents=True)
        for i in range(60):
            pixels = np.clip(rng.normal(color, 40, (32, 32, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


class Here:
    """A state folder and port of its own for `./run`."""

    def __init__(self, state: Path):
        self.state = state
        self.env = {**os.environ, "LANNER_STATE": str(state), "PORT": str(free_port()), "DEVICE": "cpu",
                    "TERM": "xterm"}

    def run(self, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run([TOP / "run", *args], env=self.env, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=LIMIT_S)

    def processes(self) -> list[str]:
        """Command lines of the live processes that know this state folder."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                try:
                    environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
                except OSError:
                    continue
                if str(self.state).encode() in environment + command:
                    found.append(command.replace(b"\0", b" ").decode())
        return found


@pytest.fixture
def here(tmp_path):
    made = Here(tmp_path / "state")
    yield made
    made.run("down")


def read_until(terminal: int, words: str) -> str:
    """What a terminal shows until `words` stand there."""
    text, end = "", time.monotonic() + LIMIT_S
    while words not in text:
        assert time.monotonic() < end, text
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"{words!r} never came:\n{text}") from None
    return text


def test_without_a_terminal_the_demo_ends_by_itself_and_leaves_no_process(here, flowers):
    demo = here.run("demo", "--data", str(flowers), *QUICK)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    for words in ("uploaded", "preprocess: 100 %  succeeded", "train: 100 %  succeeded", "optimize: 100 %  succeeded",
                  "onnx-fp32", "a held-out image of", "from data to endpoint"):
        assert words in demo.stdout
    assert here.processes() == []


def test_on_a_terminal_it_serves_until_ctrl_c_and_leaves_no_process(here, flowers):
    ours, theirs = pty.openpty()
    demo = subprocess.Popen([TOP / "run", "demo", "--data", str(flowers), *QUICK], env=here.env, stdin=theirs,
                            stdout=theirs, stderr=theirs, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    os.close(theirs)  # above: tests that run as a shell's background job ignore SIGINT, and so would the demo
    shown = read_until(ours, "until Ctrl-C")
    assert "━" in shown
    assert here.run("lanner", "--url", f"http://127.0.0.1:{here.env['PORT']}", "models").stdout.count("production") == 1
    os.killpg(demo.pid, signal.SIGINT)
    read_until(ours, "Lanner is down")
    assert demo.wait(60) == 0
    os.close(ours)
    assert here.processes() == []


def test_a_dataset_that_can_t_work_ends_the_demo_with_its_sentence(here, flowers, tmp_path):
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for path in (flowers / "rose").iterdir():
            archive.write(path, f"rose/{path.name}")
    demo = here.run("demo", "--data", str(tmp_path / "one.zip"))
    assert demo.returncode == 1
    assert "preprocess failed" in demo.stderr
    assert "class" in demo.stderr
    assert here.processes() == []


def test_the_readme_s_transcript_runs_on_a_stack_that_stays_up(here, flowers, tmp_path):
    text = re.search(r"<!-- transcript.*?```bash\n(.*?)```", (TOP / "README.md").read_text(), re.S)[1]
    with zipfile.ZipFile(tmp_path / "flowers.zip", "w") as archive:
        for path in flowers.rglob("*.png"):
            archive.write(path, path.relative_to(flowers))
    assert here.run("up").returncode == 0
    script = "set -eu\n" + text.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{here.env['PORT']}")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert '"probability"' in done.stdout
    assert here.run("status").returncode == 0
    assert here.run("down").returncode == 0
    assert here.processes() == []
