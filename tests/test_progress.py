"""What a run says while it works."""

import io
import threading
import time

from metatuner_jax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(stream, **settings):
    shown = progress.Progress(stream, **settings)
    with shown.task("training", 4, first=1) as advance:
        for _ in range(3):
            advance(1, "loss 1.25, 33 tokens/s")
    shown.line("done")
    return stream.getvalue()


def test_a_terminal_gets_a_bar_with_loss_speed_and_time():
    text = work(Terminal())
    assert "training:  50%" in text and "2/4 [00:0" in text and "loss 1.25, 33 tokens/s]" in text and text.endswith("done\n")


def test_what_takes_long_to_begin_is_said():
    stream, threads = io.StringIO(), threading.active_count()
    shown = progress.Progress(stream, every_s=0.05)
    with shown.task("answering", 4) as advance:
        wait_until(lambda: stream.getvalue().count("\n") >= 2)
        advance(4)
    assert stream.getvalue().startswith("  answering 0/4, 0:00 so far\n")
    before = stream.getvalue()
    with shown.wait("loading my-model"):
        wait_until(lambda: stream.getvalue() != before)
    assert stream.getvalue().removeprefix(before).startswith("  loading my-model, 0:00 so far\n")
    assert threading.active_count() == threads


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_elsewhere_plain_lines_come_now_and_then():
    lines = work(io.StringIO(), every_s=0).split("\n")
    said = "loss 1.25, 33 tokens/s"
    assert lines == [f"  training 2/4, {said}", f"  training 3/4, {said}, 0:00 left", "done", ""]  # how long the first took tells nothing of the rest
    assert work(io.StringIO()) == "done\n"
