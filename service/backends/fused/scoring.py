"""Log-probabilities of candidates after one prompt: the prompt once, then all candidates together.

Each candidate sees the prompt through a block table of its own: the prompt's full blocks, shared,
then a copy of the partly filled one that its tokens go on in.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from gptjet.kernels.batch import BLOCK_SIZE
from gptjet.service.backends.fused.runner import ModelRunner, Segment
from gptjet.service.engine.backend import ScoreJob


def score(
    runner: ModelRunner, job: ScoreJob, max_tokens: int
) -> Generator[None, None, tuple[torch.Tensor, ...]]:
    """See Backend.score; a piece of work is at most `max_tokens` tokens.

    Raises ValueError where the job's cached tokens leave nothing of the prompt to compute, or its
    block table has not the length that ScoreJob says.
    """
    prompt, candidates = job.prompt_token_ids, job.candidates
    if not 0 <= job.num_cached_tokens < len(prompt):
        raise ValueError(
            f"{job.num_cached_tokens} of a prompt of {len(prompt)} tokens are cached: at least the "
            f"last one must be computed, for the logits that follow it"
        )
    prompt_table, tables = _block_tables(job)
    whole = Segment(prompt[job.num_cached_tokens :], job.num_cached_tokens, prompt_table, wanted=1)
    first_row: torch.Tensor | None = None
    for piece in _pieces(whole, max_tokens):
        if first_row is not None:
            yield
        first_row = runner.run([piece])
    if first_row is None:
        raise RuntimeError("a prompt without a piece of work")
    partial = len(prompt) // BLOCK_SIZE
    if len(prompt) % BLOCK_SIZE:
        runner.copy_blocks([(prompt_table[partial], table[partial]) for table in tables])
    # The logits after the prompt judge every first token; those after each later one the next.
    first = torch.log_softmax(first_row[0], dim=0)
    found = [[first[candidate[0]].reshape(1)] for candidate in candidates]
    segments = [
        Segment(candidate[:-1], len(prompt), table, wanted=len(candidate) - 1)
        for candidate, table in zip(candidates, tables, strict=True)
    ]
    owners = [index for index, segment in enumerate(segments) if segment.token_ids]
    work = _passes([segments[index] for index in owners], owners, max_tokens, runner.max_segments)
    for segments_now, owners_now in work:
        yield
        rows = runner.run(segments_now)
        targets = [
            token
            for segment, owner in zip(segments_now, owners_now, strict=True)
            for token in _next_tokens(candidates[owner], segment, len(prompt))
        ]
        chosen = rows.gather(1, torch.tensor(targets, device=rows.device).unsqueeze(1)).squeeze(1)
        logprobs = chosen - rows.logsumexp(1)
        sizes = [len(segment.token_ids) for segment in segments_now]
        for owner, part in zip(owners_now, torch.split(logprobs, sizes), strict=True):
            found[owner].append(part)
    return tuple(torch.cat(parts).float() for parts in found)


def _block_tables(job: ScoreJob) -> tuple[list[int], list[list[int]]]:
    """The prompt's block table, and each candidate's: shared full blocks, then its own."""
    length = len(job.prompt_token_ids)
    of_prompt = -(-length // BLOCK_SIZE)
    own = [-(-(length % BLOCK_SIZE + len(c)) // BLOCK_SIZE) for c in job.candidates]
    if len(job.block_table) != of_prompt + sum(own):
        raise ValueError(
            f"a score of {length} + {[len(c) for c in job.candidates]} tokens needs "
            f"{of_prompt + sum(own)} KV blocks, its block table has {len(job.block_table)}"
        )
    shared = list(job.block_table[: length // BLOCK_SIZE])
    tables, first = [], of_prompt
    for count in own:
        tables.append([*shared, *job.block_table[first : first + count]])
        first += count
    return list(job.block_table[:of_prompt]), tables


def _pieces(segment: Segment, max_tokens: int) -> list[Segment]:
    """A prompt cut every `max_tokens` tokens; the logits are wanted of the last piece alone."""
    count = len(segment.token_ids)
    return [
        Segment(
            segment.token_ids[first : first + max_tokens],
            segment.start + first,
            segment.block_table,
            wanted=int(first + max_tokens >= count),
        )
        for first in range(0, count, max_tokens)
    ]


def _passes(
    segments: list[Segment], owners: list[int], max_tokens: int, max_segments: int
) -> list[tuple[list[Segment], list[int]]]:
    """Candidates packed into passes, each with the candidates that its segments belong to."""
    passes: list[tuple[list[Segment], list[int]]] = []
    room = 0
    for owner, segment in zip(owners, segments, strict=True):
        for piece in _pieces(segment, max_tokens):
            size = len(piece.token_ids)
            if size > room or len(passes[-1][0]) == max_segments:
                passes.append(([], []))
                room = max_tokens
            passes[-1][0].append(
                Segment(piece.token_ids, piece.start, piece.block_table, wanted=size)
            )
            passes[-1][1].append(owner)
            room -= size
    return passes


def _next_tokens(
    candidate: tuple[int, ...], segment: Segment, prompt_length: int
) -> tuple[int, ...]:
    """What follows each token of a candidate's segment."""
    first = segment.start - prompt_length + 1
    return candidate[first : first + len(segment.token_ids)]
