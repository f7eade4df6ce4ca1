"""Run as a process that has imported everything, and writes files in forks of its own that get a signal on the way.

Requests are lines of JSON on stdin: the writer, the folder, the moment, the signal. A moment is what the writer says
then, or the n-th call of a function of `os`, such as `replace:2`. Answers are the fork's number, and how it ended.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from writers import KILLED

from vitrail import cli

sys.path.append(str(Path(__file__).parents[1]))
from translations import remember_translations

torch.set_num_threads(1)
remember_translations()


def child(name, folder, moment, number):
    """Write as a command does: `cli.main` turns the signal to terminate into an exception."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background has it ignored
    function, _, count = moment.partition(":")
    calls = 0

    def strike():
        os.kill(os.getpid(), number)

    def say(text):
        if text == moment:
            strike()
        if text.startswith("building"):
            Path(f"{folder}.building").touch()

    def struck(*args):
        nonlocal calls
        calls += 1
        if calls == int(count):
            strike()
        return real(*args)

    if hasattr(os, function):
        real = getattr(os, function)
        setattr(os, function, struck)

    def run(argv):
        KILLED[name](Path(folder) / name, given, say)
        return 0

    cli._run = run
    return cli.main([])


given = Path(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:  # what is first done here is quicker in the forks
    for name in ("verified.onnx", "int8.onnx"):
        KILLED[name](Path(folder) / name, given, lambda text: None)
print("ready", flush=True)
for line in sys.stdin:
    name, folder, moment, number = json.loads(line)
    pid = os.fork()
    if not pid:
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        code = 99
        try:
            code = child(name, folder, moment, number)
        finally:
            os._exit(code)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
