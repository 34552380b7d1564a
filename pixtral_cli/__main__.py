"""The process's first and last lines: arguments in, exit code out. Knows nothing of what the commands do."""

import os
import signal
import sys


def main() -> None:
    """Run `pixtral` with the process's arguments and leave with its exit code.

    Until the command proper begins an interrupt ends the process at once: there is nothing to tidy up, and
    a traceback out of half an import would help nobody.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else: started with interrupts ignored
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(130))
    from pixtral_cli.cli import run_program

    sys.exit(run_program(sys.argv[1:]))


if __name__ == "__main__":
    main()
