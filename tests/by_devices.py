"""``--devices`` with a program of the test's own in the place of Python, in a process whose signals are its own:

preloaded.start(by_devices.main, PROGRAM, ["train", "m"], 2, said=FILE)
"""

import sys

from flipproof.launch import start_processes


def main(program, argv, devices):
    sys.executable = str(program)
    return start_processes(argv[0], argv, devices)
