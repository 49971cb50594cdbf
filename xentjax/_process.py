"""How the process of a command ends before its time: at Ctrl-C, and where nobody reads on.

`python -m xentjax` imports the package, JAX with it, before it runs `__main__`; so the package
imports this module first, which takes care of a Ctrl-C from then on.
"""

import functools
import os
import signal
import socket
import sys
import threading

EXIT_CODE = 128 + signal.SIGINT
SHOW_CURSOR = b"\x1b[?25h"  # A progress bar hides it.


@functools.cache
def end_quietly() -> None:
    """Makes this process end without a traceback at Ctrl-C and at a closed pipe.

    Ctrl-C prints one line, and the exit code is 130. Python's own handler raises
    KeyboardInterrupt, which waits for the end of a compilation, is lost in callbacks, and lets the
    interpreter shut down while threads of XLA still work, which ended in segmentation faults (jax
    0.10.2). Here a thread waits for the signal, and ends the process at once.
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    # Python's handler would raise in the main thread beside the waiting one.
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_wait, args=(reader, writer), daemon=True).start()


def _wait(reader: socket.socket, writer: socket.socket) -> None:
    """Ends the process at the first SIGINT; `writer` stays open as long as this waits."""
    while reader.recv(1)[0] != signal.SIGINT:
        pass
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), SHOW_CURSOR + b"\n")
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(EXIT_CODE)


# While Python looks for the module to run, `-m` stands in the place of its name.
if sys.argv[:1] == ["-m"] and "xentjax" in sys.orig_argv:
    end_quietly()
