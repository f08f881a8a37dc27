"""Messages to the engine's types."""

from __future__ import annotations

import math
import struct
from dataclasses import fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.engine.errors import InvalidRequestError
from gptjet.service.engine.request import SamplingParams
from gptjet.service.rpc.convert import sampling_params_from_pb, shortest_decimal


def test_empty_message_gives_the_engines_defaults() -> None:
    assert sampling_params_from_pb(pb.SamplingParams()) == SamplingParams()


def test_every_field_arrives() -> None:
    params = SamplingParams(
        max_new_tokens=2,
        min_new_tokens=1,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.3,
        repetition_penalty=1.2,
        presence_penalty=-0.4,
        frequency_penalty=0.6,
        no_repeat_ngram_size=3,
        prompt_lookup_tokens=4,
        seed=2**64 - 1,
        n=2,
        stop=("a", "b"),
        stop_token_ids=(4,),
        ignore_eos=True,
        logprobs=0,
        echo=True,
        logit_bias={3: -1.5},
    )
    default = SamplingParams()
    names = [field.name for field in fields(SamplingParams)]
    assert set(names) == set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    assert all(getattr(params, name) != getattr(default, name) for name in names)
    message = pb.SamplingParams(**{name: getattr(params, name) for name in names})
    assert sampling_params_from_pb(message) == params


@pytest.mark.parametrize(
    ("message", "field", "limit"),
    [
        (pb.SamplingParams(stop=[""] * 17), "stop", "16"),
        (pb.SamplingParams(stop_token_ids=[1] * 65), "stop_token_ids", "64"),
        (
            pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 0.0)),
            "logit_bias",
            "1024",
        ),
    ],
)
def test_long_list_is_one_violation(message: pb.SamplingParams, field: str, limit: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sampling_params_from_pb(message)
    (violation,) = caught.value.violations
    assert violation.field == f"sampling_params.{field}"
    assert f"at most {limit}" in violation.description


@given(st.floats(width=32))
@example(1.0381887477706186e-05)  # needs nine digits
@example(3.4028234663852886e38)  # the largest, which fewer digits round up past it
def test_shortest_decimal_is_the_same_float32(value: float) -> None:
    result = shortest_decimal(value)
    if math.isnan(value):
        assert math.isnan(result)
    else:
        assert struct.pack("<f", result) == struct.pack("<f", value)


@given(st.integers(-99999, 99999), st.integers(0, 5))
def test_shortest_decimal_gives_back_what_was_written(digits: int, places: int) -> None:
    written = digits / 10**places
    (arrived,) = struct.unpack("<f", struct.pack("<f", written))
    assert shortest_decimal(arrived) == written
