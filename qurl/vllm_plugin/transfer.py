"""vLLM's weight-transfer engine "qurl": the worker's end of the weight stream.

    start_weight_update()
    update_weights({"version": v, "bucket": bucket})          any number of times
    update_weights({"version": v, "manifest": [records]})     verifies and installs; the update counts only from here
    finish_weight_update()

Whether everything came and is right is decided by the manifest message, because vLLM leaves an update open for ever when
finish_weight_update fails, but closes it when update_weights does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from qurl.vllm_plugin.installer import WeightInstaller

if TYPE_CHECKING:
    from qurl.sync import InstallReport, WeightReceiver, WireBucket
    from qurl.types import TensorRecord


@dataclass
class QurlInitInfo(WeightTransferInitInfo):
    """Nothing: buckets say how they travel."""


@dataclass
class QurlUpdateInfo(WeightTransferUpdateInfo):
    """One message of an update. Exactly one of bucket and manifest is set; ValueError otherwise."""

    version: int
    bucket: WireBucket | None = None
    manifest: list[TensorRecord] | None = None

    def __post_init__(self) -> None:
        if (self.bucket is None) == (self.manifest is None):
            raise ValueError("a weight update message carries a bucket or a manifest, one of them")


class QurlWeightTransferEngine(WeightTransferEngine[QurlInitInfo, QurlUpdateInfo]):
    """Hands buckets to a WeightReceiver and keeps its report."""

    init_info_cls = QurlInitInfo
    update_info_cls = QurlUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.report: InstallReport | None = None  # of the last complete update
        self._begun_version: int | None = None
        self._installer: WeightInstaller | None = None
        self._receiver: WeightReceiver | None = None

    @property
    def installer(self) -> WeightInstaller:
        """Made on first use: engines that never get an update may run any quantization method."""
        if self._installer is None:
            self._installer = WeightInstaller(self.model, self.vllm_config)
        return self._installer

    @property
    def receiver(self) -> WeightReceiver:
        """Holds the version of the installed weights."""
        if self._receiver is None:
            from qurl.sync import WeightReceiver

            self._receiver = WeightReceiver(self.installer)
        return self._receiver

    def init_transfer_engine(self, init_info: QurlInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """The version comes with the first message."""
        self._begun_version = None

    def receive_weights(self, update_info: QurlUpdateInfo) -> None:
        """One message. Raises what the receiver raises; the engine then needs a whole new update."""
        if self._begun_version != update_info.version:
            self.receiver.begin(update_info.version)
            self._begun_version = update_info.version
        if update_info.bucket is not None:
            self.receiver.receive(update_info.bucket)
        elif update_info.manifest is not None:
            self.report = self.receiver.commit(update_info.version, update_info.manifest)

    def finish_weight_update(self) -> None:
        """Nothing left to fail here."""

    def shutdown(self) -> None:
        """Forget an unfinished update."""
        self._begun_version = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """qurl's learners send through qurl.sync.WeightSender."""
        raise NotImplementedError("use qurl.sync.WeightSender")


def install_report(worker: Any) -> InstallReport | None:
    """For collective_rpc: what the last complete update of this worker reported."""
    return worker.weight_transfer_engine.report


def read_back(worker: Any, module_names: list[str]) -> dict[str, Tensor]:
    """For collective_rpc: WeightInstaller.read_back, which the first rank returns; others return nothing."""
    held = worker.weight_transfer_engine.installer.read_back(module_names)
    return held if get_tensor_model_parallel_rank() == 0 else {}
