"""One more token on a sequence: the text that it makes certain, and whether it is the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjet.service.engine.request import FinishReason

if TYPE_CHECKING:
    from gptjet.service.engine.sequence import Sequence


def append_token(sequence: Sequence, token_id: int, eos_token_ids: tuple[int, ...]) -> str:
    """Append a sampled token; returns the text that is now certain, and sets finish_reason."""
    params = sequence.request.sampling_params
    sequence.output_token_ids.append(token_id)
    if sequence.lookup is not None:
        sequence.lookup.add(token_id)
    text = ""
    is_eos = token_id in eos_token_ids and not params.ignore_eos
    if is_eos or token_id in params.stop_token_ids:
        sequence.finish_reason = FinishReason.STOP_TOKEN
        sequence.stop_match = token_id
    else:
        text = sequence.detokenizer.push(token_id)
        if sequence.detokenizer.stop_match is not None:
            sequence.finish_reason = FinishReason.STOP_STRING
            sequence.stop_match = sequence.detokenizer.stop_match
        elif len(sequence.output_token_ids) >= params.max_new_tokens:
            sequence.finish_reason = FinishReason.LENGTH
    if sequence.finish_reason in (FinishReason.LENGTH, FinishReason.STOP_TOKEN):
        # What was held back can no longer grow. The U+FFFD of an unfinished character may
        # still complete a stop string that holds one.
        text += sequence.detokenizer.flush()
        if sequence.detokenizer.stop_match is not None:
            sequence.finish_reason = FinishReason.STOP_STRING
            sequence.stop_match = sequence.detokenizer.stop_match
    return text
