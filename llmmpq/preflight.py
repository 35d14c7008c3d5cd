"""What a run would need and produce, in seconds and without reading weights.

Memory is counted from what the stream really holds at its peak: one block in the compute dtype (twice, when the
original is followed beside the quantized one), the second moments and factor of the widest input, the states, the
packed options of a block that is measured around a plan, and the states of all candidates where they are measured by
the model's output (on a GPU they may fit there instead); before all that, what learning a rotation holds. Time is the
number of multiplications over a rate measured on the spot, in float32 as the quantizer computes; a GPU runs the blocks
themselves faster in 16 bits. It is an estimate and says so.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from llmmpq import __version__
from llmmpq.allocate.budget import describe, parts_of
from llmmpq.allocate.problem import Problem
from llmmpq.allocate.solve import check_feasible
from llmmpq.budgets import budget_of
from llmmpq.errors import CalibrationError, CheckpointError, InfeasibleBudgetError, RecipeError
from llmmpq.measure.output_metric import NUM_DRAWS, num_tokens, piece_sizes
from llmmpq.measure.pairs import count_pairs, count_passes
from llmmpq.output import foresee_output
from llmmpq.planning import check_every_pair, pair_sizes
from llmmpq.quantize.descent import CHUNK_ELEMENTS
from llmmpq.records import LinearSpec, Scheme
from llmmpq.rotating import learning_nbytes, rotation_multiplications, rotation_nbytes
from llmmpq.selfmade import check_self_calibration
from llmmpq.session import Session
from llmmpq.tuning import TOKENS_PER_STEP
from llmmpq.workdir import DEFAULT_WORK_FOLDER

BASE_RAM_NBYTES = 450 << 20  # python, torch and transformers, imported
PROBE_SIZE = {"cpu": 768, "cuda": 4096}  # 4096: keeps a large GPU busy, and takes 0.2 GB of its memory
COPIES_OF_MOMENT = 4  # moment, cross moment (smaller where outputs land in a stream), damped copy, factor
# Of each weight of the block, measured: codes, what they were rounded from, latent, the two means of Adam, weight,
# gradients, and what Adam makes of one matrix on the way.
TUNING_NBYTES_PER_WEIGHT = 35
# On one core, with 2,048 and 4,096 inputs, three sweeps take as long as 10 products with the moment, GPTQ as long as
# 1.3. GPTQ counts as one product, and all products are doubled for what is element-wise.
SWEEP_IN_GPTQS = 1.5
DESCENT_NBYTES_PER_WEIGHT = 8  # of a chunk of rows, more than GPTQ: 4 copies in float32 in place of 2


def preflight(
    session: Session, problem: Problem, *, out: Path | None, work_dir: Path | None, overwrite: bool
) -> dict[str, Any]:
    skeleton, recipe = session.skeleton, session.recipe
    budget = budget_of(session)
    kept_nbytes = sum(tensor.nbytes for tensor in skeleton.kept)
    quantized_nbytes = max(min(budget["nbytes"], problem.largest_nbytes), problem.smallest_nbytes)
    output_nbytes = quantized_nbytes + kept_nbytes
    work_nbytes = _work_nbytes(session) + _options_nbytes(session) + rotation_nbytes(session)
    on_cpu = session.device.type == "cpu"
    states_nbytes = _states_nbytes(session)
    on_host = states_nbytes if recipe.run.activations == "host" else 0
    folder = Path.cwd() if out is None else out.resolve().parent
    work_dir = work_dir or folder / DEFAULT_WORK_FOLDER
    waiting_nbytes = max(_waiting_nbytes(session), _metric_states_nbytes(session))
    on_disk = waiting_nbytes if waiting_nbytes > recipe.measurement.memory_nbytes else 0
    journal_nbytes = quantized_nbytes + on_disk + metric_nbytes(session) + rotation_nbytes(session)
    disks = _disks(folder, work_dir, output_nbytes=output_nbytes, journal_nbytes=journal_nbytes)
    work_disk = disks[1] if len(disks) == 2 else None
    ram_free = psutil.virtual_memory().available
    ram_nbytes = BASE_RAM_NBYTES + (work_nbytes + states_nbytes if on_cpu else _largest_tensor(session) + on_host)
    ram_nbytes += waiting_nbytes - on_disk
    vram_nbytes = None if on_cpu else max(work_nbytes + states_nbytes - on_host, learning_nbytes(session))
    if on_cpu:
        ram_nbytes = max(ram_nbytes, BASE_RAM_NBYTES + learning_nbytes(session))
    vram_free = None if on_cpu else torch.cuda.mem_get_info(session.device)[0]
    problems, notes = [], []
    if out is not None:
        try:
            if foresee_output(out, overwrite=overwrite, recipe=recipe, provenance=_known_provenance(session)):
                notes.append(f"--out {out} seems to hold this result already: quantize will compare digests, then say")
        except CheckpointError as error:
            problems.append(str(error))
    try:
        if budget["kind"] != "bits":
            check_feasible(problem, budget["nbytes"], budget)
    except InfeasibleBudgetError as error:
        problems.append(str(error))
    longest = session.max_window()
    if budget["kind"] == "fit_vram" and longest is not None and budget["context"] > longest:
        notes.append(f"--context {budget['context']:,} is more than the {longest:,} tokens that the model is made for")
    if _is_measured(session) and recipe.allocation.method == "pairs":
        try:
            check_every_pair(session)
        except RecipeError as error:
            problems.append(str(error))
    try:
        check_self_calibration(session)
    except CalibrationError as error:
        problems.append(str(error))
    problems += [disk.problem for disk in disks if disk.free < disk.needed]
    for what, wanted, there in (
        ("memory", ram_nbytes, ram_free),
        ("GPU memory", vram_nbytes, vram_free),
    ):
        if wanted is not None and there is not None and wanted > there:
            problems.append(f"not enough {what}: about {wanted / 1e9:.2f} GB needed, {there / 1e9:.2f} GB free")
    size = recipe.quantizer.group_size
    short = [spec.name for spec in skeleton.linears if spec.shape[1] % size]
    if short:
        notes.append(f"{len(short)} linears have a last group of fewer than {size} channels, which costs a full scale")
    if skeleton.ignored:
        notes.append(f"{len(skeleton.ignored)} tensors of the checkpoint are not used by the model and are left out")
    if recipe.quantizer.rotate:
        notes.append("whether this model can be rotated is found when quantize begins, before anything is measured")
    return {
        "model": recipe.model,
        "architecture": type(skeleton.model).__name__,
        "num_blocks": len(skeleton.block_names),
        "num_linears": len(skeleton.linears),
        "num_weights": problem.num_weights,
        "source_nbytes": session.checkpoint.nbytes,
        "budget": describe(budget),
        "budget_parts": parts_of(budget, quantized_nbytes),
        "budget_total_nbytes": budget.get("total_nbytes"),
        "quantized_nbytes": quantized_nbytes,
        "kept_nbytes": kept_nbytes,
        "output_nbytes": output_nbytes,
        "smallest_bits": 8 * problem.smallest_nbytes / problem.num_weights,
        "largest_bits": 8 * problem.largest_nbytes / problem.num_weights,
        "device": str(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
        "ram_nbytes": ram_nbytes,
        "ram_free_nbytes": ram_free,
        "vram_nbytes": vram_nbytes,
        "vram_free_nbytes": vram_free,
        "disk_nbytes": disks[0].needed,
        "disk_free_nbytes": disks[0].free,
        "work_disk_nbytes": None if work_disk is None else work_disk.needed,
        "work_disk_free_nbytes": None if work_disk is None else work_disk.free,
        "seconds": _estimate_seconds(session),
        "kept": [
            {"name": kept.name, "shape": list(kept.shape), "nbytes": kept.nbytes, "reason": kept.reason}
            for kept in skeleton.kept
        ],
        "short_groups": short,
        "notes": notes,
        "problems": problems,
    }


@dataclass(frozen=True, kw_only=True)
class _Disk:
    """What one file system must hold."""

    folder: Path
    content: str
    flags: str
    needed: int

    @property
    def free(self) -> int:
        return shutil.disk_usage(_existing_parent(self.folder)).free

    @property
    def problem(self) -> str:
        return (
            f"not enough disk space in {self.folder}: {self.needed:,} bytes are needed for {self.content}, "
            f"{self.free:,} are free. Free some space or choose another {self.flags}."
        )


def check_disks(out: Path, work_dir: Path, *, output_nbytes: int, journal_nbytes: int) -> None:
    """Fail before spending: the output and the journal of finished blocks must fit, each on its disk."""
    for disk in _disks(out.resolve().parent, work_dir, output_nbytes=output_nbytes, journal_nbytes=journal_nbytes):
        if disk.free < disk.needed:
            raise CheckpointError(disk.problem)


def _disks(folder: Path, work_dir: Path, *, output_nbytes: int, journal_nbytes: int) -> list[_Disk]:
    """The output's disk, and that of the work folder when it is another."""
    model, journal = "the quantized model", "the journal of finished blocks"
    if _file_system(folder) == _file_system(work_dir):
        needed = output_nbytes + journal_nbytes
        return [_Disk(folder=folder, content=f"{model} and {journal}", flags="--out or --work-dir", needed=needed)]
    return [
        _Disk(folder=folder, content=model, flags="--out", needed=output_nbytes),
        _Disk(folder=work_dir, content=journal, flags="--work-dir", needed=journal_nbytes),
    ]


def _file_system(folder: Path) -> int:
    return _existing_parent(folder).stat().st_dev


def _known_provenance(session: Session) -> dict[str, Any]:
    """The provenance of a plan, without what takes long to find: digests of the model's files and of the tokens."""
    recipe = session.recipe
    return {
        "llmmpq": __version__,
        "model": recipe.model,
        "revision": recipe.revision,
        "numerics": session.numerics(),
    }


def _existing_parent(path: Path) -> Path:
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _work_nbytes(session: Session) -> int:
    recipe = session.recipe
    weights = max(sum(spec.num_weights for spec in specs) for specs in session.skeleton.linears_by_block)
    widest = session.skeleton.widest_in_features
    largest = max(spec.num_weights for spec in session.skeleton.linears)
    itemsize = session.dtype.itemsize
    # GPTQ holds the corrected weight, its transposed copy, the codes and the result of one matrix.
    rounding = COPIES_OF_MOMENT * 4 * widest**2 + 14 * largest
    if recipe.quantizer.sweeps:
        rounding += DESCENT_NBYTES_PER_WEIGHT * min(largest, CHUNK_ELEMENTS)
    if _shapes(session):
        # The rows that are still to come; G of all rows, mixed, and its factor; G of the whole block as it was read.
        pieces = max(_pieces_numbers([spec]) for spec in session.skeleton.linears)
        rounding += 4 * largest + 4 * (3 * pieces + max(map(_pieces_numbers, _blocks(session))))
    if recipe.quantizer.tune:
        rounding = max(rounding, TUNING_NBYTES_PER_WEIGHT * weights)
    quantizing = (1 + recipe.quantizer.sequential) * weights * itemsize + rounding
    return max(quantizing, weights * session.measuring_dtype.itemsize + _metric_pass_nbytes(session))


def _options_nbytes(session: Session) -> int:
    """All options of a block that is measured around a plan, packed."""
    if not _is_measured(session) or _num_rounds(session) == 1:
        return 0
    options = session.options()
    return max(
        sum(scheme.nbytes(spec.shape) for spec in specs for scheme in options[spec.name])
        for specs in session.skeleton.linears_by_block
    )


def _states_nbytes(session: Session) -> int:
    quantizer = session.recipe.quantizer
    copies = 1 + (quantizer.sequential and (quantizer.correction > 0 or quantizer.tune > 0)) + (quantizer.tune > 0)
    return copies * session.recipe.calibration.tokens * session.hidden_size * session.dtype.itemsize


def metric_nbytes(session: Session) -> int:
    """What the output metric of all blocks and their linears takes in the work folder."""
    if not _metric_tokens(session):
        return 0
    return sum(4 * (session.hidden_size**2 + _pieces_numbers(specs)) for specs in _blocks(session))


def _metric_pass_nbytes(session: Session) -> int:
    """Beside the weights of a block: the gradients of all windows, and the sums of a block's linears in float64."""
    tokens = _metric_tokens(session)
    if not tokens:
        return 0
    sums = max(map(_pieces_numbers, _blocks(session)))
    return NUM_DRAWS * tokens * session.hidden_size * session.measuring_dtype.itemsize + 8 * sums


def _blocks(session: Session) -> list[list[LinearSpec]]:
    """Without the head, which has no metric."""
    return session.skeleton.linears_by_block[: len(session.skeleton.block_names)]


def _pieces_numbers(specs: Sequence[LinearSpec]) -> int:
    return sum(size**2 for spec in specs for size in piece_sizes(spec.shape[0]))


def _metric_states_nbytes(session: Session) -> int:
    itemsize = session.measuring_dtype.itemsize
    return len(session.skeleton.block_names) * _metric_tokens(session) * session.hidden_size * itemsize


def _shapes(session: Session) -> bool:
    return session.recipe.quantizer.shape_errors and session.recipe.quantizer.algorithm == "gptq"


def _metric_tokens(session: Session) -> int:
    quantizer = session.recipe.quantizer
    if not _shapes(session) and (not quantizer.tune or quantizer.tune_metric == "plain"):
        return 0
    return min(num_tokens(session.hidden_size), session.recipe.calibration.tokens)


def _largest_tensor(session: Session) -> int:
    return max(entry.nbytes for entry in session.checkpoint.entries.values())


def _estimate_seconds(session: Session) -> float | None:
    """None where the GPU has no room for the probe: then the memory is the news."""
    try:
        rate = _multiplications_per_second(session.device)
    except torch.OutOfMemoryError:
        return None
    recipe, options = session.recipe, session.options()
    tokens = recipe.calibration.tokens
    sweeps = recipe.quantizer.sweeps if recipe.quantizer.algorithm == "gptq" else 0
    # Weights are read to be measured, to be quantized, and twice for the output metric.
    num_reads = 2 + _num_rounds(session) * _is_measured(session) + 2 * (_metric_tokens(session) > 0)
    total = rotation_multiplications(session, num_reads=num_reads)
    for specs in session.skeleton.linears_by_block:
        weights = sum(spec.num_weights for spec in specs)
        passes = 6 if recipe.quantizer.correction > 0 else 4
        total += passes * tokens * weights
        # Forward twice, and backward to inputs; products of gradients.
        total += (2 + NUM_DRAWS) * _metric_tokens(session) * weights
        total += NUM_DRAWS * _metric_tokens(session) * _pieces_numbers(specs) / 2
        # Forward, and backward to inputs and to weights.
        total += 3 * recipe.quantizer.tune * max(TOKENS_PER_STEP, recipe.calibration.window) * weights
        moments = sum(spec.shape[1] ** 2 for spec in specs)
        factors = sum(spec.shape[1] ** 3 for spec in specs) / 3
        total += 2 * tokens * moments + factors
        for spec in specs:
            num_gptqs = _count_gptqs((session.scheme(8),), sweeps=sweeps)
            if _is_measured(session):
                num_gptqs += _num_rounds(session) * _count_gptqs(options[spec.name], sweeps=sweeps)
            total += num_gptqs * spec.num_weights * spec.shape[1]
            if _shapes(session):  # each part of the rows moves its error into those after it
                total += piece_sizes(spec.shape[0])[0] * spec.num_weights / 2
        if _is_measured(session):
            total += _num_rounds(session) * (2 * tokens * weights + tokens * moments + factors)
    # Element-wise work (scale search, packing) takes about as long again as the products.
    return math.ceil(2 * (total + _measuring_multiplications(session)) / rate) + 5.0


def _count_gptqs(schemes: Sequence[Scheme], *, sweeps: int) -> float:
    """What quantizing a matrix in all of these takes; where groups have two widths, a GPTQ of each tells which."""
    widths = {bits for scheme in schemes for bits, _ in scheme.runs}
    return len(schemes) * (1 + SWEEP_IN_GPTQS * sweeps) + len(widths)


def _is_measured(session: Session) -> bool:
    return session.recipe.budget.bits is None and session.recipe.allocation.method != "uniform"


def _num_rounds(session: Session) -> int:
    """How often the model is measured: once, and again around each plan."""
    allocation = session.recipe.allocation
    return 1 + (allocation.refine if allocation.method == "iqp" else 0)


def _measuring_multiplications(session: Session) -> float:
    """Forwards of the candidates, and for the pairs the head and the products of all with all."""
    if not _is_measured(session):
        return 0.0
    skeleton, recipe = session.skeleton, session.recipe
    probe, sizes = recipe.measurement.tokens, pair_sizes(session)
    blocks = [
        (sum(own), sum(s.num_weights for s in specs))
        for own, specs in zip(sizes, skeleton.linears_by_block, strict=True)
    ]
    if recipe.allocation.method == "local":
        return float(probe * sum(num * weights for num, weights in blocks))
    config = skeleton.model.config.get_text_config()
    num_candidates = sum(num for num, _ in blocks)
    if recipe.allocation.method == "pairs":
        weights = sum(spec.num_weights for spec in skeleton.linears)
        head = (count_pairs(sizes) + num_candidates) * config.vocab_size * config.hidden_size
        return probe * (count_passes(sizes) / len(sizes) * weights + head)
    joined, forwards = 0, 0.0
    for num, weights in blocks:
        joined += num
        forwards += (joined + 2) * weights
    head = num_candidates * config.vocab_size * (config.hidden_size + num_candidates / 2)
    return _num_rounds(session) * probe * (forwards + head)


def _waiting_nbytes(session: Session) -> int:
    """The states of all candidates of the cross-layer measurement."""
    recipe = session.recipe
    if not _is_measured(session) or recipe.allocation.method in ("local", "pairs"):
        return 0
    head, options = session.skeleton.head, session.options()
    num_candidates = sum(len(schemes) for name, schemes in options.items() if head is None or name != head.name)
    heads = 0 if head is None else (1 + len(options[head.name])) * head.num_weights
    return (num_candidates * recipe.measurement.tokens * session.hidden_size + heads) * session.measuring_dtype.itemsize


def _multiplications_per_second(device: torch.device) -> float:
    size, repeats = PROBE_SIZE[device.type], 4
    matrix = torch.ones(size, size, device=device)
    matrix @ matrix  # the first product also starts the library
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    _wait_for(device)
    return repeats * size**3 / max(time.perf_counter() - started, 1e-6)


def _wait_for(device: torch.device) -> None:
    """Products on a GPU are only queued when the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
