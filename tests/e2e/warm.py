"""Ray workers that are forked from a process which has imported what they need.

Nearly every end-to-end test starts a Ray with an engine and a learner, and importing vLLM, DeepSpeed and transformers costs either
more than all that it then does. Ray starts its workers with `sys.executable`; a test's driver names `warm_python` there instead, a
client of a few milliseconds that asks the server below for a fork. What runs after the imports is Ray's own worker, unchanged.

The client lives as long as the worker and the worker as long as the client, so whoever looks for a test's processes, or ends them,
finds the client. A worker has the environment that Ray gives it, but OpenMP has read the server's."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

SOCKET, PYTHON = "QURL_TEST_WARM_SOCKET", "QURL_TEST_PYTHON"
START = {
    "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "DS_ACCELERATOR": "cpu", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
}
CLIENT = f"""
import json, os, socket, sys
real = os.environ[{PYTHON!r}]
if not any(argument.endswith("setup_worker.py") for argument in sys.argv[1:3]):
    os.execv(real, [real, *sys.argv[1:]])
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ[{SOCKET!r}])
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
while server.recv(1):
    pass
"""


class WarmWorkers:
    """The server, started at once, and `environment`, with which a test's driver finds it."""

    def __init__(self, folder: Path) -> None:
        self.executable = folder / "warm_python"
        self.executable.write_text(f"#!{sys.executable} -ISs{CLIENT}")
        self.executable.chmod(0o755)
        address = folder / "warm.sock"
        self.environment = {SOCKET: str(address), PYTHON: sys.executable}
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(64)  # clients wait in it while the server imports
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._listener.fileno())],
            pass_fds=[self._listener.fileno()], stdin=subprocess.PIPE, env={**os.environ, **START, "PYTHONPATH": path},
        )  # fmt: skip

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._listener.close()


def serve(listener: socket.socket) -> None:
    """Fork a worker for every client, until standard input ends."""
    sys.modules["ray"] = None  # type: ignore[assignment]  # its library reads the environment once, when it is loaded
    import deepspeed  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    import vllm.model_executor.models.qwen2
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import qurl.learner.learner
    import qurl.rollout.vllm_engine
    import qurl.vllm_plugin.installer  # noqa: F401

    del sys.modules["ray"]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _become_worker(client)
        client.close()


def _become_worker(client: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, descriptors, _, _ = socket.recv_fds(client, 8, 3)
    request = b""
    while len(request) < int.from_bytes(head, "big"):
        request += client.recv(1 << 20)
    arguments, environment, folder = json.loads(request)
    if mark := environment.get("QURL_TEST_MARK"):  # /proc shows the environment of the server
        Path(environment[SOCKET]).with_name(f"mark-{os.getpid()}").write_text(mark)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    threading.Thread(target=lambda: (client.recv(1), os._exit(1)), daemon=True).start()
    context, worker = "{}", []
    for argument in arguments[arguments.index(next(a for a in arguments if a.endswith("setup_worker.py"))) + 1 :]:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = value
        elif name != "--language":
            worker.append(argument)
    from ray._private.runtime_env.context import RuntimeEnvContext  # only now, with its own environment
    from ray._private.utils import update_envs

    update_envs(RuntimeEnvContext.deserialize(context).env_vars)
    sys.argv = worker
    sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry not in sys.path]
    sys.executable = os.environ[PYTHON]
    runpy.run_path(worker[0], run_name="__main__")
    os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
