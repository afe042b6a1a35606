"""What a run says while it works."""

import io

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


def test_elsewhere_plain_lines_come_now_and_then():
    lines = work(io.StringIO(), every_s=0).split("\n")
    assert lines[0] == "  training 2/4, loss 1.25, 33 tokens/s, 0:00 left" and lines[-2] == "done" and len(lines) == 4
    assert work(io.StringIO()) == "done\n"
