"""The whole of `gptjet quantize`: measure, calibrate, write, measure again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.cpu import CpuModel, NativeUnavailableError
from gptjet.service.backends.threads import choose_cpu_threads
from gptjet.service.embedded import EMBEDDED_NAME, build_prompt
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint, resolve_checkpoint
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.layout import WeightType
from gptjet.service.models.fused.recipe import Recipe
from gptjet.service.models.fused.weights import (
    FusedWeights,
    load_fused_weights,
    quantized_weight_type,
)
from gptjet.service.models.memory import available_host_bytes
from gptjet.service.models.tokenizer import TransformersTokenizer, load_tokenizer
from gptjet.service.quantization.calibration import sample_sequences
from gptjet.service.quantization.convert import CalibrationSet, Method, write_quantized
from gptjet.service.quantization.perplexity import (
    Model,
    Perplexity,
    Text,
    heldout_text,
    measure_perplexity,
    read_text,
    split_windows,
)
from gptjet.service.quantization.writer import MAX_SHARD_BYTES, check_output, new_folder

OWN_TEXT = "the checkpoint's own text"
# Of a calibration sequence: long enough for attention to matter, and as the sampled text ends.
_SEQUENCE_TOKENS = 256
# Of dense weights in float32, for the KV cache and the logits beside them.
_SPARE = 1.3
_STORED: dict[str, WeightType] = {"F16": "fp16", "BF16": "bf16"}

Stage = Callable[[str, int], Callable[[int], None]]
"""(what begins now, how much of it there is) -> what to call with each part that is done."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What is asked for.

    method              None: gptq for 4 bits, rtn for 8
    calibration         a text file, None for text that the checkpoint writes itself
    calibration_tokens  about how many tokens of it are used
    text                file the perplexity is measured on, None for the shipped held-out rows
    text_tokens         at most so many tokens of that; None: all
    """

    model: str
    output: Path
    bits: int = 4
    method: Method | None = None
    calibration: Path | None = None
    calibration_tokens: int = 16384
    text: Path | None = None
    text_tokens: int | None = None
    evaluate: bool = True
    force: bool = False
    allow_pickle: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What came of it. `before` and `after` are None where nothing was to be measured."""

    output: Path
    recipe: Recipe
    source_bytes: int
    output_bytes: int
    text: str
    before: Perplexity | None
    after: Perplexity | None

    @property
    def delta(self) -> float | None:
        """Growth of the perplexity as a share: 0.01 is 1 %."""
        if self.before is None or self.after is None:
            return None
        return self.after.value / self.before.value - 1

    def as_dict(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "output": str(self.output),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "text": self.text,
            "perplexity_before": self.before and self.before.value,
            "perplexity_after": self.after and self.after.value,
            "perplexity_delta": self.delta,
            "perplexity_tokens": self.before and self.before.num_tokens,
            "recipe": self.recipe.as_dict(),
        }


def quantize(options: QuantizeOptions, stage: Stage) -> QuantizeReport:
    """Do it. Raises BackendLoadError in one line.

    `options.output` is what it was until the new folder is whole; what fails or interrupts the
    perplexity after that leaves the new one.
    """
    method = options.method or ("gptq" if options.bits == 4 else "rtn")
    if options.bits not in (4, 8):
        raise BackendLoadError(f"bits must be 4 or 8, got {options.bits}")
    if method == "gptq" and options.bits != 4:
        raise BackendLoadError("method gptq is for 4 bits; 8 bits lose nothing that it could save")
    checkpoint = resolve_checkpoint(options.model, allow_pickle=options.allow_pickle)
    if checkpoint.is_quantized:
        raise BackendLoadError(f"{checkpoint.path} is quantised already: give the original")
    check_output(checkpoint, options.output, force=options.force)
    calibration_text = read_text(options.calibration) if options.calibration else None
    text = read_text(options.text) if options.text else heldout_text()
    tokenizer = load_tokenizer(checkpoint.path, local_files_only=True)
    weight_type = _stored_type(checkpoint)
    documents = _documents(text, tokenizer, options.text_tokens)
    before, calibration = None, None
    writes_own_text = method == "gptq" and calibration_text is None
    if options.evaluate or writes_own_text:
        weights = load_fused_weights(checkpoint, weight_type, progress=False)
        model = _open_model(weights)
        if options.evaluate:
            before = _perplexity(model, weights, documents, stage, "perplexity before")
        if writes_own_text:
            calibration = _write_calibration(checkpoint, weights, model, tokenizer, options, stage)
        model.close()
        del model, weights
    weights = load_fused_weights(checkpoint, weight_type, progress=False)
    if calibration_text is not None and method == "gptq":
        ids = _documents(calibration_text, tokenizer, options.calibration_tokens)
        calibration = _calibration_from(calibration_text, ids, weights.geometry)
    on_layer = stage(f"rounding to INT{options.bits}", weights.geometry.num_layers + 1)
    with new_folder(
        options.output,
        check=lambda: check_output(checkpoint, options.output, force=options.force),
    ) as folder:
        recipe = write_quantized(
            checkpoint,
            weights,
            folder,
            bits=options.bits,
            method=method,
            calibration=calibration,
            max_shard_bytes=options.max_shard_bytes,
            on_layer=lambda: on_layer(1),
        )
    del weights
    written = resolve_checkpoint(str(options.output))
    after = None
    if options.evaluate:
        weights = load_fused_weights(written, _written_type(written), progress=False)
        model = _open_model(weights)
        after = _perplexity(model, weights, documents, stage, "perplexity after")
        model.close()
    return QuantizeReport(
        output=options.output,
        recipe=recipe,
        source_bytes=checkpoint.total_bytes,
        output_bytes=written.total_bytes,
        text=text.name,
        before=before,
        after=after,
    )


def _open_model(weights: FusedWeights) -> CpuModel | TorchModel:
    """Our kernels, where they run and the machine holds dense weights in float32, else PyTorch."""
    dense_bytes = int(4 * weights.num_parameters * _SPARE)
    is_quantized = weights.weight_type in ("int8", "int4")
    layers = weights.layers()  # untouched where the kernels cannot be had
    if is_quantized or dense_bytes < available_host_bytes():
        with contextlib.suppress(NativeUnavailableError):
            return CpuModel.pack(
                weights.geometry, weights.head, layers, num_threads=choose_cpu_threads()
            )
    return TorchModel(weights.geometry, weights.head, layers)


def _stored_type(checkpoint: Checkpoint) -> WeightType:
    """The dtype of all the file's tensors, or float32 for a mixture, a pickle, anything else."""
    dtypes = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2}
    return _STORED.get(dtypes.pop(), "fp32") if len(dtypes) == 1 else "fp32"


def _written_type(checkpoint: Checkpoint) -> WeightType:
    weight_type = quantized_weight_type(checkpoint)
    if weight_type is None:
        raise BackendLoadError(f"{checkpoint.path} is not what was just written")
    return weight_type


def _documents(text: Text, tokenizer: TransformersTokenizer, most: int | None) -> list[list[int]]:
    """Token ids of the documents, in order, `most` of them at most."""
    documents: list[list[int]] = []
    left = most
    for document in text.documents:
        ids = tokenizer.encode(document)[:left]
        documents.append(ids)
        if left is not None:
            left -= len(ids)
            if left <= 0:
                break
    return documents


def _perplexity(
    model: Model,
    weights: FusedWeights,
    documents: list[list[int]],
    stage: Stage,
    name: str,
) -> Perplexity:
    return measure_perplexity(
        model,
        weights.geometry,
        documents,
        on_progress=stage(name, sum(map(len, documents))),
    )


def _calibration_from(
    text: Text, documents: list[list[int]], geometry: BlockGeometry
) -> CalibrationSet:
    """Raises BackendLoadError where there is too little text, or a token the model has not."""
    sequences = split_windows(documents, min(_SEQUENCE_TOKENS, geometry.max_context))
    if not sequences:
        raise BackendLoadError(f"{text.name} has fewer than two tokens: nothing to calibrate on")
    largest = max(max(sequence) for sequence in sequences)
    if largest >= geometry.vocab_size:
        raise BackendLoadError(
            f"the tokenizer gives id {largest} and the model has {geometry.vocab_size}: they do "
            f"not belong together"
        )
    return CalibrationSet(text.name, text.sha256, sequences)


def _write_calibration(
    checkpoint: Checkpoint,
    weights: FusedWeights,
    model: Model,
    tokenizer: TransformersTokenizer,
    options: QuantizeOptions,
    stage: Stage,
) -> CalibrationSet:
    """The checkpoint's own text; of the embedded one every other sequence is one of its prompts."""
    starts: list[list[int]] = [[]]
    if checkpoint.name == EMBEDDED_NAME:
        starts.append(tokenizer.encode(build_prompt("").split("\n")[0].rstrip()))
    sequences = sample_sequences(
        model,
        weights.geometry,
        num_tokens=options.calibration_tokens,
        starts=starts,
        end_ids=weights.description.eos_token_ids,
        max_length=_SEQUENCE_TOKENS,
        on_progress=stage("writing calibration text", options.calibration_tokens),
    )
    digest = hashlib.sha256(repr(sequences).encode()).hexdigest()
    return CalibrationSet(OWN_TEXT, digest, sequences)
