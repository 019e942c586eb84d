"""Previews while pictures are drawn: what they show, how often, and how a drawing is stopped."""

import threading

import pytest
import torch
from transformers.generation import BaseStreamer

from mars_hf import ImageIteratorStreamer, ImageStreamer
from mars_hf.image_processing_mars import decode_codes
from mars_hf.streaming_mars import fill_missing


@pytest.fixture
def model(make_model):
    return make_model()


def draw(model, streamer, rows=1, **kwargs):
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])[:rows]
    options = {"generation_mode": "image", "height": 16, "width": 16, "do_sample": False, "streamer": streamer}
    return model.generate(ids, **{**options, **kwargs})


def test_missing_codes_come_from_the_row_above():
    codes = torch.tensor([[1, 2, 3], [4, 0, 0], [0, 0, 0]])
    assert fill_missing(codes, codes > 0).tolist() == [[1, 2, 3], [4, 2, 3], [4, 2, 3]]
    first_row = torch.tensor([[1, 0], [0, 0]])
    assert fill_missing(first_row, first_row > 0).tolist() == [[1, 1], [1, 1]]
    scattered = torch.tensor([[0, 5], [6, 0]])
    assert fill_missing(scattered, scattered > 0).tolist() == [[5, 5], [6, 5]]


@pytest.mark.parametrize("k", [1, 3])
def test_previews_show_what_is_drawn_and_come_as_often_as_asked(model, k):
    seen = []
    streamer = ImageStreamer(model.vqgan, seen.append, every=2)
    drawn = draw(model, streamer, rows=2, codes_per_step=k)
    assert torch.equal(drawn, draw(model, None, rows=2, codes_per_step=k))
    assert [preview.num_codes for preview in seen] == [[8, 8]]  # 4 x 4 codes; the end is no preview
    halves = drawn[:, 3 + k : 3 + k + 8].view(2, 2, 4) - model.config.image_token_offset
    expected = decode_codes(model.vqgan, [torch.cat([half, half[1:], half[1:]]) for half in halves])
    assert all(torch.equal(shown, pixels) for shown, pixels in zip(seen[0].pixels, expected, strict=True))


def test_a_callback_that_says_false_cancels_and_the_beginning_comes_back(model):
    whole = draw(model, None)
    cancelled = draw(model, ImageStreamer(model.vqgan, lambda preview: False))
    assert torch.equal(cancelled[0, : 3 + 1 + 4], whole[0, : 3 + 1 + 4])  # the first of four rows
    assert not (cancelled == model.config.image_end_token_id).any()
    assert model.decode_image_tokens(cancelled) == []
    codes = cancelled[0, 4:8] - model.config.image_token_offset
    assert torch.equal(draw(model, None, initial_codes=[codes]), whole)  # and can be gone on with


def test_a_callback_that_raises_ends_the_drawing_and_reaches_the_caller(model):
    def fail(preview):
        raise KeyError("mine")

    streamer = ImageStreamer(model.vqgan, fail)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(KeyError, match="mine"):
        draw(model, streamer)
    assert len(calls) == 1 + 4  # the prompt and one row of codes


def test_an_iterator_gives_previews_from_another_thread_and_ends(model):
    streamer = ImageIteratorStreamer(model.vqgan, timeout=60)
    result = {}
    thread = threading.Thread(target=lambda: result.update(drawn=draw(model, streamer)))
    thread.start()
    previews = [preview.num_codes for preview in streamer]
    thread.join()
    assert previews == [[4], [8], [12]] and torch.equal(result["drawn"], draw(model, None))


def test_an_iterator_ends_when_the_drawing_is_refused_in_its_middle(model, monkeypatch):
    streamer = ImageIteratorStreamer(model.vqgan, timeout=60)
    monkeypatch.setattr(model, "_code_scores", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(model, streamer)
    assert list(streamer) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"generation_mode": "text", "height": None, "width": None}, "shows pictures, but this call writes text"),
        ({"height": 17}, "multiple of 4, got 17"),
        ({"generation_mode": "picture"}, "`generation_mode` must be one of"),
        ({"num_beams": 2}, "beam"),
    ],
)
def test_an_iterator_ends_when_a_call_is_refused(model, wrong, message):
    streamer = ImageIteratorStreamer(model.vqgan, timeout=60)
    with pytest.raises(ValueError, match=message):
        draw(model, streamer, **wrong)
    assert list(streamer) == []
    draw(model, streamer)
    assert len(list(streamer)) == 3  # one end, not two: it can be used again


def test_a_streamer_on_a_beam_search_is_refused(model):
    with pytest.raises(ValueError, match="beam"):
        draw(model, ImageStreamer(model.vqgan, None), num_beams=2)


def test_no_row_between_two_previews_is_refused(model):
    with pytest.raises(ValueError, match="1 or more rows of codes, got 0"):
        ImageStreamer(model.vqgan, None, every=0)


def test_a_progress_bar_counts_codes(model, capsys):
    draw(model, ImageStreamer(model.vqgan, None, progress=True))
    assert "16/16" in capsys.readouterr().err


# ---- documents


@pytest.fixture
def writer(make_model):
    """A model that begins pictures often."""
    model = make_model()
    with torch.no_grad():
        model.vision_head.weight[model.config.image_start_token_id - model.config.image_token_offset] *= 4
    return model


def write(model, streamer, rows=2, **kwargs):
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])[:rows]
    sizes = torch.tensor([[[8, 12], [8, 8]], [[12, 8], [8, 16]]])[:rows]
    options = {"generation_mode": "interleaved", "do_sample": False, "image_sizes": sizes, "max_new_tokens": 40}
    return model.generate(ids, streamer=streamer, **{**options, **kwargs})


class Listener(BaseStreamer):
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("k", [1, 3])
def test_the_tokens_of_a_document_are_heard_as_they_come(writer, k):
    listener = Listener()
    written = write(writer, listener, rows=1, codes_per_step=k)
    assert torch.cat([value.flatten() for value in listener.heard]).tolist() == written[0].tolist()
    assert listener.ended and len(listener.heard) > 1


@pytest.mark.parametrize("k", [1, 3])
def test_previews_of_a_document_show_each_rows_latest_picture(writer, k):
    seen = []
    written = write(writer, ImageStreamer(writer.vqgan, seen.append), codes_per_step=k)
    assert torch.equal(written, write(writer, None, codes_per_step=k))
    pictures = writer.collect_image_codes(written, torch.tensor([[[8, 12], [8, 8]], [[12, 8], [8, 16]]]))
    shown = {(row, number) for preview in seen for row, number in enumerate(preview.picture)}
    assert {(0, 0), (1, 0)} <= shown and len(shown) > 2  # first and later pictures of both rows
    for preview in seen:
        for row, pixels in enumerate(preview.pixels):
            number, count = preview.picture[row], preview.num_codes[row]
            assert (pixels is None) == (count == 0) and count <= preview.total_codes[row]
            if pixels is not None and number < len(pictures[row]):
                codes = pictures[row][number]
                assert preview.total_codes[row] == codes.numel()
                known = torch.arange(codes.numel()).view(codes.shape) < count
                expected = decode_codes(writer.vqgan, [fill_missing(codes, known)])[0]
                assert torch.allclose(pixels, expected, atol=1e-5)


def test_a_document_is_cancelled_in_a_picture_and_marked_by_its_missing_end(writer):
    cancelled = write(writer, ImageStreamer(writer.vqgan, lambda preview: False))[1:]
    whole = write(writer, None)[1:]
    assert cancelled.shape[1] < whole.shape[1] and torch.equal(cancelled, whole[:, : cancelled.shape[1]])
    assert cancelled[0, -1] >= writer.config.image_token_offset
    assert writer.collect_image_codes(cancelled, [[[12, 8]]]) == [[]]
