"""The process's first and last lines: arguments in, exit code out. Knows nothing of what the commands do."""

import os
import signal
import sys

from pixtral_cli import process_environment

INTERRUPTED = 130


def main() -> None:
    """Run `pixtral` with the process's arguments and leave with its exit code.

    Until the command proper begins an interrupt ends the process at once: there is nothing to tidy up, and a
    traceback out of half an import would help nobody. After an interrupt the process leaves without Python's own
    closing: a KeyboardInterrupt that passed through `exec`, as it does in many imports, would there still turn
    the exit code into a death by signal.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else: started with interrupts ignored
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(INTERRUPTED))
    process_environment.prepare()
    from pixtral_cli.cli.main import run_program

    code = run_program(sys.argv[1:])
    if code == INTERRUPTED:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
