"""Plans, reports and handshakes: golden bytes, and that nothing malformed gets through."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.errors import MetadataError
from kvconnect.protocol import Handshake, LoadError, Move, PackedMoves, Plan, Report
from kvconnect.protocol.messages import GroupHandshake, pack_ints, unpack_ints

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "messages.json").read_text())
INT32 = st.integers(-(2**31), 2**31 - 1)
MOVES = st.lists(st.builds(Move, st.binary(min_size=32, max_size=32), INT32, INT32, INT32, INT32, INT32))

PLAN = Plan(
    step=42,
    request_ids=("r1",),
    saves=PackedMoves.pack([Move(b"a" * 32, 0, 3, 5, 0, 7), Move(b"b" * 32, 1, 4, 6, 0, 8)]),
)
REPORT = Report(
    step=42,
    rank=1,
    load_errors=(LoadError("r1", 0, pack_ints([5])),),
    failed_saves=pack_ints([5]),
    error="bad",
    reads=pack_ints([0, 32, 1500]),
    step_us=2500,
)
HANDSHAKE = Handshake(rank=0, num_slots=1024, groups=(GroupHandshake(16, 0, 2, 8192, 0xDEADBEEF),))


@pytest.mark.parametrize(("name", "message"), [("plan", PLAN), ("report", REPORT), ("handshake", HANDSHAKE)])
def test_message_equals_golden_bytes_both_ways(name: str, message: Plan | Report | Handshake) -> None:
    golden = bytes.fromhex(VECTORS[name])
    assert message.encode() == golden
    assert type(message).decode(golden) == message


@given(MOVES)
def test_moves_come_back_as_they_were(moves: list[Move]) -> None:
    packed = PackedMoves.pack(moves)
    assert packed.unpack() == moves
    assert len(packed) == len(moves)


@given(st.lists(INT32))
def test_ints_come_back_as_they_were(values: list[int]) -> None:
    assert unpack_ints(pack_ints(values)) == values


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a kvconnect plan"),
        (b"KVP", "not a kvconnect plan"),
        (b"\x80\x04\x95", "not a kvconnect plan"),  # what a pickle starts with
        (REPORT.encode(), "expected a plan"),
        (b"KVP\x02" + PLAN.encode()[4:], "version 2; this kvconnect speaks version 1"),
        (PLAN.encode()[:-1], "cannot be decoded"),
        (PLAN.encode() + b"\x00", "cannot be decoded"),
        (b"KVP\x01\x91\xa1x", "cannot be decoded"),
    ],
)
def test_malformed_plan_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(MetadataError, match=why):
        Plan.decode(data)


@pytest.mark.parametrize(
    "packed", [PackedMoves(b"a" * 31, b""), PackedMoves(b"a" * 32, b"\0" * 19), PackedMoves(b"", b"\0" * 4)]
)
def test_columns_of_unequal_length_are_refused(packed: PackedMoves) -> None:
    with pytest.raises(MetadataError, match="moves with"):
        packed.unpack()


def test_any_byte_string_decodes_or_is_a_metadata_error() -> None:
    rng = random.Random(3)
    good = PLAN.encode()
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            plan = Plan.decode(bytes(data))
            for moves in (plan.saves, plan.loads, plan.promotes, plan.demotes, plan.drops, plan.fails):
                moves.unpack()
        except MetadataError:
            pass
