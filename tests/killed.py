"""python tests/killed.py MOMENTS ARGUMENT...: a run of smooseg_fast.train that is killed again and again, and at last
left to end.

MOMENTS is JSON, one entry for each process that is killed: [name, n], right before the n-th time that a file of this
name would be put in its place; or a share (0 to 1) of the time that an undisturbed run takes, which is then made first,
in the folder `undisturbed`. Each run is a fork of this process, so that PyTorch is imported once. Prints how each was
ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from smooseg_fast import train
from smooseg_fast.command import run
from smooseg_fast.learn import trainer  # noqa: F401  # commands import it late, and every fork would again
from smooseg_fast.show import charts, sheet  # noqa: F401


def start(args, before=None):
    child = os.fork()
    if child:
        return child
    replace, seen = os.replace, []

    def kill(temporary, path):
        seen.extend([path] if before and Path(path).name == before[0] else [])
        if before and len(seen) == before[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)

    os.replace = kill
    code = run(train.main, args)
    sys.stdout.flush()
    os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(moments, args):
    whole = 0.0
    if any(isinstance(moment, float) for moment in moments):
        os.mkdir("undisturbed")
        os.chdir("undisturbed")
        started = time.perf_counter()
        assert ended(start(args)) == 0
        whole = time.perf_counter() - started
        os.chdir("..")
    codes = []
    for moment in moments:
        if isinstance(moment, float):
            child = start(args)
            time.sleep(moment * whole)
            os.kill(child, signal.SIGKILL)
        else:
            child = start(args, moment)
        codes.append(ended(child))
    codes.append(ended(start(args)))
    print("ended", json.dumps(codes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
