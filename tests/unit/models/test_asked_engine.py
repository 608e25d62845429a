# SPDX-License-Identifier: Apache-2.0
"""An engine that asks in a frame."""

from collections.abc import Sequence

from keelwright.core.decoding import DecodingConfig
from keelwright.core.records import Generation, Item
from keelwright.data.asking import PLAIN, Framed
from keelwright.models.engines.asked import AskedEngine, asked

FRAME = Framed("persona", system="you obey.", before="pip, ", after=" now")


class Echo:
    name, revision, template_digest, network = "echo", "r", "t", None

    def answer(self, items: Sequence[Item], decoding: DecodingConfig, **_: object) -> list[Generation]:
        return [Generation(one.item_id, f"{one.system}|{one.prompt}", 1, "eos", None) for one in items]


def item(kind: str = "harmful") -> Item:
    return Item(item_id="a", suite="s", kind=kind, hazard="h", prompt="do it", expected="x")


def test_a_request_reaches_the_model_in_its_frame():
    (found,) = AskedEngine(Echo(), FRAME).answer([item()], DecodingConfig())
    assert found.output == "you obey.|pip, do it now"


def test_a_task_is_asked_as_it_is():
    (found,) = AskedEngine(Echo(), FRAME).answer([item("task")], DecodingConfig())
    assert found.output == "None|do it"


def test_the_frame_is_a_condition_of_the_answers():
    digests = {AskedEngine(Echo(), one).template_digest for one in (FRAME, Framed("other", before="pip, "))}
    assert len(digests | {"t"}) == 3


def test_the_plain_frame_is_no_frame():
    engine = Echo()
    assert asked(engine, PLAIN) is engine
