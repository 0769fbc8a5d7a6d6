"""The weight stream from learner ranks to engines: encoded, verified, in place.

    learner rank: WeightSender.send       engine: WeightReceiver.begin / receive / commit       driver: publish"""

from qurl.sync.bucket import WireBucket
from qurl.sync.fingerprint import fingerprint
from qurl.sync.protocol import EngineHandle, Installer, Payload, SyncError
from qurl.sync.publisher import PublishReport, publish
from qurl.sync.receiver import InstallReport, WeightReceiver
from qurl.sync.sender import SendReport, WeightSender, merge_send_reports
from qurl.sync.transports import TRANSPORTS, choose_transport
from qurl.types import TensorRecord

__all__ = [
    "TRANSPORTS", "EngineHandle", "InstallReport", "Installer", "Payload", "PublishReport", "SendReport", "SyncError",
    "TensorRecord", "WeightReceiver", "WeightSender", "WireBucket", "choose_transport", "fingerprint", "merge_send_reports",
    "publish",
]
