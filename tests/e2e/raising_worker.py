"""A worker of vLLM whose every step raises; named by rollout.engine_args.worker_extension_cls."""

from qurl.vllm_plugin.cpu_worker import QurlCpuWorker


class KernelError(RuntimeError):
    """Cannot be read again by pickle: its constructor wants more than its arguments."""

    def __init__(self, text: str, *, shape: tuple[int, ...]):
        super().__init__(text)
        self.shape = shape


class Extension:
    """Nothing: importing this module is what plants the fault."""


def _raise(self: QurlCpuWorker, *args: object, **kwargs: object) -> None:
    raise KernelError("no kernel for this shape", shape=(1, 2))


QurlCpuWorker.execute_model = _raise
