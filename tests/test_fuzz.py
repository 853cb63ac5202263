"""Bad inputs of every kind end with exit code 2 and one line, or with the right result; see fuzz.py."""

import subprocess
import sys
from pathlib import Path


def test_bad_inputs(request):
    """In a process of its own, because what watches it can never be taken off again."""
    script, count = Path(__file__).with_name("fuzz.py"), request.config.getoption("--fuzz")
    done = subprocess.run([sys.executable, str(script), str(count)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} inputs, 0 wrong" in done.stdout
