"""What is said where the memory does not suffice."""

import pytest

from metatuner_jax import config, memory

OOM = "INTERNAL: Error dispatching computation: Out of memory allocating 3221225472 bytes."


@pytest.mark.parametrize(("sections", "doing", "ways", "said", "unsaid"), [
    ({"train": {"batch_size": 16, "accumulate": 2}}, "steps", 4, ("raise train.accumulate=2 to 4", "lower train.batch_size=16", "--plan"), ()),
    ({"train": {"batch_size": 16, "remat": "all"}}, "steps", 16, ("lower train.batch_size=16", "weights=int8"), ("accumulate", "remat")),
    ({"generator": {"train": "full"}, "warmup": {"actor_steps": 2}}, "start", 1, ("set generator.train=lora",), ("int8", "batch_size")),
    ({"generator": {"train": "full"}}, "answers", 1, ("lower eval.batch_size=32", "lower actor.max_answer_tokens=192"), ("generator.train", "--plan", "accumulate")),
])  # fmt: skip
def test_the_settings_that_are_named_can_be_set(sections, doing, ways, said, unsaid):
    with pytest.raises(memory.OutOfMemory) as found, memory.watched(config.make(**sections), lambda: doing, ways):
        raise RuntimeError(OOM)
    text = str(found.value)
    assert text.startswith(f"the memory does not suffice for the {doing}, for want of 3.00 GiB more: ")
    assert all(part in text for part in said) and not any(part in text for part in unsaid)


@pytest.mark.parametrize("error", [RuntimeError("the adapter is not in use"), RuntimeError("RESOURCE_EXHAUSTED: No space left on device"), ValueError("batch")])
def test_other_errors_are_as_they_were(error):
    with pytest.raises(type(error)) as found, memory.watched(config.Config(), lambda: "steps"):
        raise error
    assert found.value is error
