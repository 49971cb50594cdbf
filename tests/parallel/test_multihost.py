"""Two hosts of two devices each, as two processes on this machine that meet over a socket."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import multihost_worker
import numpy as np
import pytest
from meshes import NEAR, relative_difference

SECONDS = 100


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_hosts(tmp_path, seconds, *options):
    """Runs a worker for each host, and ends all of them when one fails or time is up.

    `options` has, for each host, the arguments after its number. Returns the exit code of each, and
    all that they wrote, once none is left.
    """
    port, paths = free_port(), [str(Path(__file__).parent), *sys.path]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    logs = [tmp_path / f"host {i}.log" for i in range(len(options))]
    hosts, deadline = [], time.monotonic() + seconds
    try:
        for i, (log, own) in enumerate(zip(logs, options, strict=True)):
            command = [
                sys.executable,
                multihost_worker.__file__,
                *map(str, (i, len(options), port)),
            ]
            with log.open("w") as out:
                hosts.append(
                    subprocess.Popen(
                        [*command, str(tmp_path / f"{i}.npz"), *own],
                        env=environment,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        while any(host.poll() is None for host in hosts) and time.monotonic() < deadline:
            if any(host.poll() for host in hosts):
                break
            time.sleep(0.05)
    finally:
        for host in hosts:
            host.kill()
        codes = [host.wait() for host in hosts]
    return codes, "\n".join(log.read_text() for log in logs)


@pytest.mark.timeout(SECONDS + 20)
def test_two_hosts_train_as_one_device(tmp_path):
    codes, log = run_hosts(tmp_path, SECONDS, (), ())
    assert codes == [0, 0], log
    losses, params = multihost_worker.train_on_one_device()
    assert relative_difference(params, multihost_worker.make_params()) > 0.1
    desired = {"losses": losses, **params}
    for host in range(2):
        results = np.load(tmp_path / f"{host}.npz")
        for split in ("examples", "classes"):
            actual = {name: results[f"{split} {name}"] for name in desired}
            assert relative_difference(actual, desired) <= NEAR


@pytest.mark.timeout(SECONDS + 20)
def test_when_one_host_dies_the_other_is_ended(tmp_path):
    start = time.monotonic()
    codes, log = run_hosts(tmp_path, SECONDS, (), ("--die",))
    # The first host would wait for the second for ever: it was ended, and before time was up.
    assert codes[1] == 7, log
    assert codes[0] != 0
    assert time.monotonic() - start < SECONDS / 2
    assert not list(tmp_path.glob("*.npz"))


def test_when_time_is_up_all_hosts_are_ended(tmp_path):
    start = time.monotonic()
    codes, log = run_hosts(tmp_path, 0.5, (), ())
    assert codes == [-9, -9], log
    assert time.monotonic() - start < 10
