"""`quantization.precision` for a model: the cheapest whole-network setting of Ax-BxP under a bound, then each layer and operand.

    calibration documents   the search. What must not grow is the divergence from full precision: on text that the model itself
                            would write, the logarithm of the factor that perplexity grows by, without the noise of losses
    confirmation documents  whether the network's setting stands, or the next dearer one takes its place; and which of the cheaper
                            precisions does: the cheapest that keeps perplexity a standard error within the bound
    test documents          a table of all candidates and of what was found; they have no say in it

Matrices that an engine runs as one have one setting. All that is measured is kept in a folder, so that a killed search goes on:

    settings.json           what was asked for
    search.jsonl            divergence on the calibration documents, by precision
    confirmation/, test/    losses of these documents, a file for each precision
    search.json             the rows, the settings
    precision.yaml          pattern -> setting; written last"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qurl.config.precision_file import write_precision
from qurl.ptq.checkpoint import check_fusion, folder_digest
from qurl.ptq.evaluation import Text, load_float32
from qurl.ptq.journal import journaled_losses
from qurl.ptq.perplexity import DocumentLoss
from qurl.ptq.statistics import Estimate, divergence, perplexity, ratio
from qurl.ptq.switched import SwitchedModel
from qurl.quantization.axbxp import Precision, parse
from qurl.quantization.axbxp.cost import Cost, network_cost
from qurl.quantization.axbxp.search import Layers, Loss, cheapest, describe, engine_matrices, ladder, last_within
from qurl.quantization.source import checked_targets, source_of_folder

INT8 = "k2-w4-a4"
"""All blocks of both operands."""
CANDIDATES = (
    INT8, "k4-w2-a2-noll", "k2-w3g16-a3g1", "k2-w3-a3", "k4-w1-a2", "k4-w2-a1", "k2-w2g16-a3g1", "k2-w2g1-a2g1", "k1-w4g16-a4g1",
    "k1-w3g16-a3g1",
)  # fmt: skip
PRECISION, REPORT, FOUND = "precision.yaml", "search.json", "found"
FREE = {"max_loss", "candidates", "num_confirmation", "confirmation"}
"""What may change while nothing has been found."""
COMPUTE_SHARE = 0.5
"""Of INT8's energy that the model of energy gives to products."""

Progress = Callable[[str, int, int | None], None]  # (what, done, total or None where nobody knows)
Growth = Callable[[str, Mapping[str, Precision]], Estimate]
"""Perplexity over that of full precision, by a name and the precision of every layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """What decides the result, besides the documents."""

    max_loss: float  # relative increase in perplexity, e.g. 0.01
    num_calibration: int  # documents: the first of the text
    num_confirmation: int  # documents: the next ones; all others are for the test
    candidates: tuple[str, ...] = CANDIDATES  # settings for the network
    ignore: tuple[str, ...] = ()  # patterns of qurl.quantization.select_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRow:
    """A precision on the test documents. Gains are those of a model of a machine; see qurl.quantization.axbxp.cost."""

    precision: str  # a setting, or FOUND
    products: float  # bit products over INT8's
    weight_bits: float  # stored for a weight, without scales
    perplexity: float
    increase: float  # relative to full precision
    standard_error: float  # of the increase, over documents
    divergence: float  # nats per token
    energy_gain: float  # with COMPUTE_SHARE
    memory_bound_gain: float
    compute_bound_gain: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchReport:
    """What was found; search.json."""

    network: str  # the single setting that the search began with
    settings: dict[str, str]  # pattern -> setting
    rung: int  # that was confirmed: so far down the ladder from `network`
    num_rungs: int  # below `network` that meet the bound on the calibration documents
    calibration_divergence: float  # nats per token
    confirmation_increase: float  # of perplexity, relative
    num_measured: int  # precisions, on the calibration documents, in this run or one before
    rows: list[SearchRow]  # the candidates by products, dearest first; then FOUND


def search_precision(
    model: Path, text: Text, out: Path, settings: SearchSettings, progress: Progress = lambda what, done, total: None
) -> SearchReport:
    """Search, confirm, write `out`; the same call goes on where an earlier one was killed.

    Raises ValueError where the text is too short, the model cannot be quantized, `out` is something else or of other arguments, and
    where no candidate meets the bound."""
    calibration, confirmation, test = _split(text, settings)
    with ExitStack() as stack:
        source = source_of_folder(model, stack)
        targets = sorted(checked_targets(source, settings.ignore))
        check_fusion(source, frozenset(targets), settings.ignore)
        matrices = engine_matrices({name: math.prod(source.shapes[f"{name}.weight"]) for name in targets})
    question = _begin(model, out, settings, {"calibration": calibration, "confirmation": confirmation})
    switched = SwitchedModel(load_float32(model), targets)
    journal = _Journal(out / "search.jsonl")
    similar = _by_length(calibration)

    def measure(layers: Mapping[str, Precision]) -> float:
        progress("precisions, calibration", len(journal), None)
        return divergence([loss for documents in similar for loss in switched.losses(_settings(layers), documents)]).value

    def loss(layers: Mapping[str, Precision]) -> float:
        return journal.get(describe(layers), lambda: measure(layers))

    def losses(part: str, documents: list[Any], name: str, precision: str | Mapping[str, str] | None) -> list[DocumentLoss]:
        what = f"{part} documents, {name}"
        progress(what, 0, len(documents))
        shown = partial(_shown, progress, what, len(documents))
        asked = {**question, "precision": precision}
        path = out / part / f"{name}.jsonl"
        return journaled_losses(path, asked, documents, lambda skip: shown(skip, switched.losses(precision, documents[skip:])))

    grown = _growth(partial(losses, "confirmation", confirmation))
    network, rungs = _search(matrices, loss, settings, grown)
    rung, confirmed = _confirmed(rungs, network, settings.max_loss, grown)
    layers = rungs[rung]
    measured = {candidate: dict.fromkeys(matrices, parse(candidate)) for candidate in settings.candidates} | {FOUND: layers}
    baseline = losses("test", test, "none", None)
    rows = [
        _row(name, network_cost(each, matrices), losses("test", test, name, _settings(each)), baseline)
        for name, each in measured.items()
    ]
    rows.sort(key=lambda row: (row.precision == FOUND, -row.products))
    report = SearchReport(
        network=str(network), settings=_settings(layers), rung=rung, num_rungs=len(rungs) - 1, calibration_divergence=loss(layers),
        confirmation_increase=confirmed, num_measured=len(journal), rows=rows,
    )  # fmt: skip
    _write(out, settings, report)
    return report


def _split(text: Text, settings: SearchSettings) -> tuple[list[Any], list[Any], list[Any]]:
    """Documents for calibration, confirmation and test."""
    first, count = settings.num_calibration, settings.num_calibration + settings.num_confirmation
    if len(text.documents) < count + 2:
        raise ValueError(
            f"--text has {len(text.documents)} documents; the search takes {first}, its confirmation "
            f"{settings.num_confirmation}, and the test two or more; give more text, or fewer by --num-calibration and "
            "--num-confirmation"
        )
    return text.documents[:first], text.documents[first:count], text.documents[count:]


def _by_length(documents: Sequence[Any]) -> list[list[Any]]:
    """Documents of similar length together, so that little is padded; a search runs them a hundred times."""
    groups: list[list[Any]] = []
    for document in sorted(documents, key=lambda windows: len(windows[0])):
        if not groups or len(document[0]) > 1.5 * len(groups[-1][0][0]):
            groups.append([])
        groups[-1].append(document)
    return groups


def _begin(model: Path, out: Path, settings: SearchSettings, documents: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What decides a loss besides precision and document. Raises ValueError where `out` holds something else.

    documents: that decide what is found. A search that found nothing may go on with what decides no loss on the calibration
    documents: another bound, other candidates, another confirmation."""
    question = {"model": folder_digest(model), "ignore": list(settings.ignore)}
    wanted = {**json.loads(json.dumps(asdict(settings))), **question}
    wanted |= {part: hashlib.sha256(json.dumps(each).encode()).hexdigest() for part, each in documents.items()}
    file = out / "settings.json"
    if file.is_file():
        found = json.loads(file.read_text())
        decisive = set(wanted) - (set() if (out / PRECISION).is_file() else FREE)
        if different := [key for key in wanted if key in decisive and found.get(key) != wanted[key]]:
            key = different[0]
            raise ValueError(
                f"{out} holds a search of other arguments ({key}: {found.get(key)} there, {wanted[key]} now); name a new "
                "folder, or delete that one"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no folder of `qurl search`; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps(wanted, indent=1) + "\n")
    partial_file.replace(file)
    return question


def _search(matrices: Mapping[str, float], loss: Loss, settings: SearchSettings, grown: Growth) -> tuple[Precision, list[Layers]]:
    """The cheapest candidate that meets the bound on the documents of the calibration and of the confirmation, and the ladder from
    it. Raises ValueError where INT8 itself or every candidate is above the bound."""
    bound = math.log1p(settings.max_loss)
    if not (whole := loss(dict.fromkeys(matrices, parse(INT8)))) <= bound:
        raise ValueError(
            f"--max-loss {settings.max_loss:g}: INT8 with all blocks, {INT8}, is {math.expm1(whole):.2g} by divergence "
            "from full precision, so nothing cheaper meets it; give a larger one, or --ignore the layers that suffer"
        )
    candidates = [parse(candidate) for candidate in settings.candidates]
    refused = ""
    while candidates:
        try:
            network = cheapest(candidates, matrices, loss, bound)
        except ValueError as error:
            told = f"--max-loss {settings.max_loss:g}, {bound:.4g} nats: {refused}{error}; add {INT8} to --candidates"
            raise ValueError(told) from error
        found = grown(str(network), dict.fromkeys(matrices, network))
        if _meets(found, settings.max_loss):
            return network, ladder(matrices, loss, bound, network)
        candidates.remove(network)
        refused = f"{network} has {found.value - 1:.2g} +- {found.standard_error:.2g} on the confirmation documents, and "
    raise ValueError(
        f"--max-loss {settings.max_loss:g}: {refused}no other candidate is left; give more of --num-calibration and "
        f"--num-confirmation, a larger --max-loss, or {INT8} among the --candidates"
    )


def _growth(losses: Callable[[str, Any], list[DocumentLoss]]) -> Growth:
    """losses: of documents, by a name and a quantization.precision."""
    return lambda name, layers: ratio(perplexity(losses(name, _settings(layers))), perplexity(losses("none", None)))


def _confirmed(rungs: Sequence[Layers], network: Precision, max_loss: float, grown: Growth) -> tuple[int, float]:
    """(number, relative increase in perplexity) of the last rung that meets the bound, as `network`, the first, does. A handful are
    measured."""

    def growth(rung: int) -> Estimate:
        return grown(f"{network}_rung_{rung}" if rung else str(network), rungs[rung])

    confirmed = last_within(lambda rung: _meets(growth(rung), max_loss), len(rungs) - 1)
    return confirmed, growth(confirmed).value - 1


def _meets(growth: Estimate, max_loss: float) -> bool:
    """By a standard error, since what seems to is chosen, and chance is on the side of what is chosen."""
    return growth.value - 1 + growth.standard_error <= max_loss


def _row(name: str, price: Cost, losses: Sequence[DocumentLoss], baseline: Sequence[DocumentLoss]) -> SearchRow:
    ours = perplexity(losses)
    grown = ratio(ours, perplexity(baseline))
    return SearchRow(
        precision=name, products=price.products, weight_bits=price.weight_bits, perplexity=ours.value, increase=grown.value - 1,
        standard_error=grown.standard_error, divergence=divergence(losses).value, energy_gain=price.energy_gain(COMPUTE_SHARE),
        memory_bound_gain=price.performance_gain(True), compute_bound_gain=price.performance_gain(False),
    )  # fmt: skip


def _write(out: Path, settings: SearchSettings, report: SearchReport) -> None:
    (out / REPORT).write_text(json.dumps(asdict(report), indent=1) + "\n")
    row = report.rows[-1]
    ignored = "".join(f" --ignore {pattern}" for pattern in settings.ignore)
    write_precision(
        out / PRECISION, report.settings,
        f"quantization.precision of quantization=axbxp{ignored}: perplexity {100 * row.increase:+.2f} % +- "
        f"{100 * row.standard_error:.2f} % on test documents, bound {100 * settings.max_loss:g} %;\n"
        f"{row.products:.3f} of INT8's bit products, {row.weight_bits:.2f} bits per weight.",
    )  # fmt: skip


def _settings(layers: Mapping[str, Precision]) -> dict[str, str]:
    return {name: str(precision) for name, precision in layers.items()}


def _shown(progress: Progress, what: str, total: int, done: int, losses: Iterator[DocumentLoss]) -> Iterator[DocumentLoss]:
    for count, loss in enumerate(losses, start=done + 1):
        yield loss
        progress(what, count, total)


class _Journal:
    """Numbers on disk, a line each; half a line, of a process that was killed, is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        self.entries: dict[str, float] = dict(json.loads(line) for line in lines)
        path.write_text("".join(f"{line}\n" for line in lines))

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """What is there, or else is measured now."""
        if key not in self.entries:
            value = measure()
            with self.path.open("a") as file:
                file.write(json.dumps([key, value]) + "\n")
            self.entries[key] = value
        return self.entries[key]

    def __len__(self) -> int:
        return len(self.entries)
