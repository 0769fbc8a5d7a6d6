"""`quantization.precision` for a model: the cheapest whole-network setting of Ax-BxP under a bound, then each layer and operand.

    calibration documents   the search. What must not grow is the divergence from full precision: on text that the model itself
                            would write, the logarithm of the factor that perplexity grows by, without the noise of losses
    confirmation documents  whether the network's setting stands, or the next dearer one takes its place; and how many of the steps
                            do: as many of the first as keep perplexity a standard error within the bound
    test documents          a table of all candidates and of what was found; they have no say in it

Matrices that an engine runs as one have one setting. All that is measured is kept in a folder, so that a killed search goes on:

    settings.json           what was asked for
    search.jsonl            divergence on the calibration documents, by precision
    confirmation/, test/    losses of these documents, a file for each precision
    search.json             the rows, the settings, the steps
    precision.yaml          pattern -> setting; written last"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
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
from qurl.quantization.axbxp.search import Found, cheaper, describe, engine_matrices, search
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
    num_steps: int  # taken from `network`; confirmed
    num_refused_steps: int  # that met the bound on the calibration documents alone
    calibration_divergence: float  # nats per token, after the confirmed steps
    confirmation_increase: float  # of perplexity, relative, after the confirmed steps
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

    def losses(part: str, documents: list[Any], name: str, precision: str | Mapping[str, str] | None) -> list[DocumentLoss]:
        what = f"{part} documents, {name}"
        progress(what, 0, len(documents))
        shown = partial(_shown, progress, what, len(documents))
        asked = {**question, "precision": precision}
        path = out / part / f"{name}.jsonl"
        return journaled_losses(path, asked, documents, lambda skip: shown(skip, switched.losses(precision, documents[skip:])))

    grown = _growth(partial(losses, "confirmation", confirmation))
    found = _search(matrices, measure, settings, journal, grown)
    layers, num_steps, confirmed = _confirmed(found, matrices, settings.max_loss, grown)
    measured = {candidate: dict.fromkeys(matrices, parse(candidate)) for candidate in settings.candidates} | {FOUND: layers}
    baseline = losses("test", test, "none", None)
    rows = [
        _row(name, network_cost(each, matrices), losses("test", test, name, _settings(each)), baseline)
        for name, each in measured.items()
    ]
    rows.sort(key=lambda row: (row.precision == FOUND, -row.products))
    report = SearchReport(
        network=str(found.network), settings={name: str(each) for name, each in layers.items()}, num_steps=num_steps,
        num_refused_steps=len(found.steps) - num_steps, calibration_divergence=journal[describe(layers)],
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


def _search(
    matrices: Mapping[str, float], measure: Callable[[Mapping[str, Precision]], float], settings: SearchSettings,
    journal: MutableMapping[str, float], grown: Growth,
) -> Found:  # fmt: skip
    """On the calibration documents, from the cheapest candidate that meets the bound there and on those of the confirmation. Raises
    ValueError where INT8 itself or every candidate is above it."""
    bound = math.log1p(settings.max_loss)
    whole = dict.fromkeys(matrices, parse(INT8))
    if INT8 not in journal:
        journal[INT8] = measure(whole)
    if not journal[INT8] <= bound:
        raise ValueError(
            f"--max-loss {settings.max_loss:g}: INT8 with all blocks, {INT8}, is {math.expm1(journal[INT8]):.2g} by divergence "
            "from full precision, so nothing cheaper meets it; give a larger one, or --ignore the layers that suffer"
        )
    candidates = [parse(candidate) for candidate in settings.candidates]
    refused = ""
    while candidates:
        try:
            network = search(matrices, measure, bound, candidates, steps=lambda precision: (), journal=journal).network
        except ValueError as error:
            told = f"--max-loss {settings.max_loss:g}, {bound:.4g} nats: {refused}{error}; add {INT8} to --candidates"
            raise ValueError(told) from error
        found = grown(str(network), dict.fromkeys(matrices, network))
        if _meets(found, settings.max_loss):
            return search(matrices, measure, bound, [network], steps=_steps, journal=journal)
        candidates.remove(network)
        refused = f"{network} has {found.value - 1:.2g} +- {found.standard_error:.2g} on the confirmation documents, and "
    raise ValueError(
        f"--max-loss {settings.max_loss:g}: {refused}no other candidate is left; give more of --num-calibration and "
        f"--num-confirmation, a larger --max-loss, or {INT8} among the --candidates"
    )


def _steps(precision: Precision) -> list[Precision]:
    """One block less of one operand, or one block alone of both: where a layer hardly matters, that saves rounds of the search."""
    found = cheaper(precision)
    lowest = precision
    while less := cheaper(lowest):
        lowest = less[0]
    return found if lowest in (precision, *found) else [*found, lowest]


def _growth(losses: Callable[[str, Any], list[DocumentLoss]]) -> Growth:
    """losses: of documents, by a name and a quantization.precision."""
    return lambda name, layers: ratio(perplexity(losses(name, _settings(layers))), perplexity(losses("none", None)))


def _confirmed(
    found: Found, matrices: Mapping[str, float], max_loss: float, grown: Growth
) -> tuple[dict[str, Precision], int, float]:
    """(precisions, number of steps, relative increase in perplexity) after all steps, or after so many of the first that the bound
    is met and after one more is not, by bisection: a handful of precisions are measured. The network's own setting meets it."""

    def after(count: int) -> dict[str, Precision]:
        return dict.fromkeys(matrices, found.network) | {step.layer: step.precision for step in found.steps[:count]}

    def growth(count: int) -> Estimate:
        return grown(f"{found.network}_{count}_steps" if count else str(found.network), after(count))

    confirmed, beyond = 0, len(found.steps)
    if _meets(growth(beyond), max_loss):
        confirmed = beyond
    while beyond - confirmed > 1:
        middle = (confirmed + beyond) // 2
        confirmed, beyond = (middle, beyond) if _meets(growth(middle), max_loss) else (confirmed, middle)
    return after(confirmed), confirmed, growth(confirmed).value - 1


def _meets(growth: Estimate, max_loss: float) -> bool:
    """By a standard error, since the first steps that seem to are chosen, and chance is on the side of what is chosen."""
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


class _Journal(MutableMapping[str, float]):
    """A dictionary on disk, a line an entry; half a line, of a process that was killed, is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        self.entries: dict[str, float] = dict(json.loads(line) for line in lines)
        path.write_text("".join(f"{line}\n" for line in lines))

    def __getitem__(self, key: str) -> float:
        return self.entries[key]

    def __setitem__(self, key: str, value: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([key, value]) + "\n")
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        raise TypeError("what was measured stays")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
