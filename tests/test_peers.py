"""What an error says of the other ranks."""

from __future__ import annotations

import pytest

from trainer.peers import lost_contact

OF_GLOO = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:32713",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv operation",
    "Application timeout caused pair closure",  # in a gradient's collective, once another one has timed out
]


@pytest.mark.parametrize("text", OF_GLOO)
def test_an_error_of_gloo_is_put_down_to_another_rank(text: str):
    assert lost_contact(RuntimeError(text))


def test_an_error_of_this_rank_is_its_own():
    assert not lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"))
    assert not lost_contact(ValueError("gloo/transport"))
