"""From the message of Score to the engine's ScoreRequest, its texts tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptjet.service.engine.errors import FieldViolation, InvalidRequestError
from gptjet.service.engine.score import ScoreRequest, new_score_request, refuse_many_candidates

if TYPE_CHECKING:
    from gptjet.proto.v1 import text_generation_pb2 as pb
    from gptjet.service.rpc.text import TextCodec


async def score_request_from_pb(
    message: pb.ScoreRequest,
    codec: TextCodec,
    max_context: int,
    *,
    request_id: str,
    arrival_ns: int,
    deadline_ns: int | None,
    trace: object = None,
) -> ScoreRequest:
    """Tokenize every text, each by itself; what is given as ids stays as it is.

    Raises InvalidRequestError for what is refused before it is tokenized or copied: too many
    candidates, and what is longer than a context. The rest is the engine's to check.
    """
    refuse_many_candidates(len(message.candidates))
    texts: dict[str, str] = {}
    ids: dict[str, tuple[int, ...]] = {}
    if message.WhichOneof("prompt") == "token_ids":
        ids["prompt"] = bounded_ids("prompt", message.token_ids.ids, max_context)
    else:
        texts["prompt"] = message.text
    names = []
    for index, candidate in enumerate(message.candidates):
        name = f"candidates[{index}]"
        if candidate.WhichOneof("continuation") == "token_ids":
            ids[name] = bounded_ids(name, candidate.token_ids.ids, max_context)
        else:
            name += ".text"
            texts[name] = candidate.text
        names.append(name)
    calibration = message.WhichOneof("calibration_prompt")
    if calibration == "calibration_token_ids":
        given = message.calibration_token_ids.ids
        ids[calibration] = bounded_ids("calibration_prompt", given, max_context)
    elif calibration is not None:
        texts[calibration] = message.calibration_text
    encoded = await codec.encode_prompts(texts)
    ids |= dict(zip(texts, encoded, strict=True))
    return new_score_request(
        ids["prompt"],
        tuple(ids[name] for name in names),
        calibration_token_ids=None if calibration is None else ids[calibration],
        request_id=request_id,
        arrival_ns=arrival_ns,
        deadline_ns=deadline_ns,
        trace=trace,
    )


def bounded_ids(field: str, ids: Sequence[int], max_context: int) -> tuple[int, ...]:
    """A prompt or a candidate given as ids; more than a context is refused before it is copied."""
    if len(ids) > max_context:
        raise InvalidRequestError(
            FieldViolation(
                field,
                f"must leave room for one token in the context of {max_context}, "
                f"got {len(ids)} tokens",
            )
        )
    return tuple(ids)
