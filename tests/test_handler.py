"""The handler of Inference Endpoints: what it answers, what it refuses, and that it stands many at once over HTTP."""

import base64
import http.client
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from mars_hf import MarsAnyToAnyPipeline, MarsPipeline, handler, hub
from mars_hf.handler import EndpointHandler, RequestError, read_request

RED = Image.new("RGB", (16, 16), "red")


def in_base64(picture: Image.Image | bytes, kind: str = "PNG") -> str:
    if isinstance(picture, bytes):
        return base64.b64encode(picture).decode()
    file = BytesIO()
    picture.save(file, format=kind)
    return in_base64(file.getvalue())


def from_base64(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text, validate=True)))


def png_that_claims(width: int, height: int) -> str:
    """A PNG of a few bytes whose header tells of a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return in_base64(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def chat(*parts: dict) -> dict:
    return {"inputs": {"messages": [{"role": "user", "content": list(parts)}]}}


WORDS, PICTURE = {"type": "text", "text": "What?"}, {"type": "image", "image": in_base64(RED)}
REFUSED = {
    "no object": ([], "`request` must be an object"),
    "nothing": ({}, "`text` must be a text"),
    "no inputs": ({"inputs": None}, "`text` must be a text"),
    "another key": ({"inputs": "a", "stream": True}, "`request` has no 'stream'; it takes inputs, parameters"),
    "an empty prompt": ({"inputs": " \n"}, "`text` must not be empty"),
    "marks that are not seen": ({"inputs": "\u200b\u202e \u2060"}, "`text` must not be empty"),
    "100 kB": ({"inputs": "a" * 100_000}, "at most 4000 characters, got 100000"),
    "a control character": ({"inputs": "a\x1b[2Jb"}, r"U\+001B"),
    "a zero byte": ({"inputs": "a\x00b"}, r"U\+0000"),
    "half a character": ({"inputs": "a\ud800"}, r"U\+D800"),
    "a list of prompts": ({"inputs": ["a", "b"]}, "`text` must be a text, got a list of 2"),
    "an unknown parameter": ({"inputs": "a", "parameters": {"trust": 1}}, "has no 'trust'; it takes generation_mode"),
    "parameters of another kind": ({"inputs": "a", "parameters": [1]}, "`parameters` must be an object"),
    "a negative seed": ({"inputs": "a", "parameters": {"seed": -1}}, "`seed` must be a whole number from 0"),
    "a huge seed": ({"inputs": "a", "parameters": {"seed": 2**70}}, "`seed` must be"),
    "a seed that is true": ({"inputs": "a", "parameters": {"seed": True}}, "`seed` must be"),
    "half a pixel": ({"inputs": "a", "parameters": {"height": 16.5}}, "`height` must be a whole number"),
    "a huge picture": (
        {"inputs": "a", "parameters": {"width": 4096}},
        "`width` must be a whole number from 1 to 1024",
    ),
    "many pictures": ({"inputs": "a", "parameters": {"num_return_sequences": 1000}}, "from 1 to 4, got 1000"),
    "no number": ({"inputs": "a", "parameters": {"temperature": float("nan")}}, "`temperature` must be a number"),
    "endless": ({"inputs": "a", "parameters": {"guidance_scale": float("inf")}}, "`guidance_scale` must be a number"),
    "another mode": ({"inputs": "a", "parameters": {"generation_mode": "audio"}}, "must be one of image, text"),
    "a mode of another kind": ({"inputs": "a", "parameters": {"generation_mode": ["image"]}}, "must be one of"),
    "no switch": ({"inputs": "a", "parameters": {"do_sample": "yes"}}, "must be true or false"),
    "a file": ({"inputs": {"image": "/etc/passwd"}}, "in base64"),
    "a URL": ({"inputs": {"image": "http://127.0.0.1/secret.png"}}, "in base64"),
    "no picture": ({"inputs": {"image": in_base64(b"hello")}}, r"must be a picture file \(PNG, JPEG"),
    "a pickle": ({"inputs": {"image": in_base64(pickle.dumps(RED.size))}}, "must be a picture file"),
    "a script in a picture": ({"inputs": {"image": in_base64(b"<svg onload='x'/>")}}, "must be a picture file"),
    "a bomb": ({"inputs": {"image": png_that_claims(50_000, 50_000)}}, "at most 16777216 pixels"),
    "a smaller bomb": ({"inputs": {"image": png_that_claims(5_000, 5_000)}}, "got 5000 x 5000"),
    "a ribbon": ({"inputs": {"image": in_base64(Image.new("RGB", (400, 16)))}}, "sides of at most 1 to 10"),
    "a heavy file": ({"inputs": {"image": "A" * (14 * 2**20)}}, "at most 10485760 bytes"),
    "many files": ({"inputs": {"images": [in_base64(RED)] * 9}}, "at most 8 pictures, got a list of 9"),
    "two names": ({"inputs": {"image": "", "images": []}}, "leave one out"),
    "a chat and more": ({"inputs": {"messages": [], "text": "a"}}, "leave the rest out"),
    "an empty chat": ({"inputs": {"messages": []}}, "a list of 1 to 32 messages"),
    "a long chat": ({"inputs": {"messages": [{"role": "user", "content": "a"}] * 33}}, "got a list of 33"),
    "another role": ({"inputs": {"messages": [{"role": "root", "content": "a"}]}}, "must be one of system, user"),
    "a message of another kind": ({"inputs": {"messages": ["a"]}}, "`message` must be an object"),
    "an empty message": (chat(), "at least one part"),
    "a picture by name": (chat({"type": "image", "path": "/etc/passwd"}), "has no 'path'"),
    "a part of another kind": (chat({"type": "video", "text": "a"}), "A part of `content` must be"),
    "much text": (chat(*[{"type": "text", "text": "a" * 3000}] * 2), "at most 4000 characters and 8 pictures"),
    "many pictures in a chat": (chat(*[PICTURE] * 9), "at most 4000 characters and 8 pictures"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_not_as_it_must_be_is_refused_before_the_model_is_asked(name: str) -> None:
    request, message = REFUSED[name]
    with pytest.raises(RequestError, match=message) as refused:
        read_request(request)
    assert refused.value.status == (413 if name == "a heavy file" else 400)
    assert refused.value.to_dict() == {"error": str(refused.value), "status": refused.value.status}
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "prompt", ["تفاحة حمراء", "🍎👩🏽\u200d🏫", "สีแดง", "a\tb\r\nc", "<img></img><|endoftext|>{{ 7 * 7 }}"]
)
def test_any_script_and_anything_printable_is_a_prompt(prompt: str) -> None:
    assert read_request({"inputs": prompt}) == ({"text": prompt}, {"generation_mode": "image"})


def test_uploads_that_the_server_opened_are_pictures(tmp_path: Path) -> None:
    asked, arguments = read_request({"inputs": RED, "parameters": None})
    assert asked == {"text": "", "images": [RED]} and arguments["generation_mode"] == "text"
    assert read_request({"inputs": {"images": [RED], "text": "What?"}})[0] == {"text": "What?", "images": [RED]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "mars"}')
    return tmp_path


@pytest.fixture
def endpoint(folder: Path, tiny_model, tiny_processor, monkeypatch: pytest.MonkeyPatch) -> EndpointHandler:
    def load(task: str, model: str, trust_remote_code: bool) -> MarsAnyToAnyPipeline:
        assert (task, model, trust_remote_code) == ("any-to-any", str(folder), True)
        return MarsAnyToAnyPipeline(model=tiny_model, processor=tiny_processor)

    monkeypatch.setattr(handler, "pipeline", load)
    return EndpointHandler(str(folder))


def test_a_prompt_is_drawn_as_the_pipeline_draws_it(endpoint, tiny_model, tiny_processor) -> None:
    parameters = {"height": 8, "width": 24, "guidance_scale": 3, "do_sample": True, "seed": 7}
    answers = endpoint({"inputs": "a red apple", "parameters": {**parameters, "num_return_sequences": 2}})
    draw = MarsPipeline(model=tiny_model, processor=tiny_processor)
    expected = draw("a red apple", num_images_per_prompt=2, **parameters)
    assert len(answers) == 2 and json.loads(json.dumps(answers)) == answers
    for answer, drawn in zip(answers, expected, strict=True):
        assert same(from_base64(answer["generated_image"]), drawn["generated_image"])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_a_picture_is_captioned_from_base64_of_several_formats(endpoint, tiny_model, tiny_processor, kind) -> None:
    pipe = MarsAnyToAnyPipeline(model=tiny_model, processor=tiny_processor)
    (expected,) = pipe(images=RED, max_new_tokens=5, return_full_text=False)
    sent = in_base64(RED, "PNG" if kind == "PNG" else kind)
    sent = f"data:image/{kind.lower()};base64,{sent}" if kind == "BMP" else sent
    (answer,) = endpoint({"inputs": {"image": sent}, "parameters": {"max_new_tokens": 5}})
    assert answer == {"generated_text": expected["generated_text"]}


def test_a_chat_is_answered_with_a_document(endpoint, tiny_model, monkeypatch) -> None:
    tiny_model.generation_config.sequence_bias = [[[tiny_model.config.image_start_token_id], 100.0]]
    parameters = {"generation_mode": "interleaved", "height": 16, "width": 16, "max_new_tokens": 20}
    (answer,) = endpoint({**chat(PICTURE, WORDS), "parameters": parameters})
    (picture, *rest) = answer["generated_interleaved"]
    assert picture["type"] == "image" and from_base64(picture["image"]).size == (16, 16)
    assert all(part.keys() == {"type", "text"} for part in rest)


def test_a_document_has_a_limit_without_asking_for_one(endpoint, monkeypatch) -> None:
    text_config = endpoint.pipeline.model.config.text_config
    for context, given, limit in ((128, {}, None), (9000, {}, 4096), (9000, {"max_new_tokens": 7}, 7)):
        asked = {}
        monkeypatch.setattr(endpoint, "pipeline", Recorded(endpoint.pipeline.model, asked))
        monkeypatch.setattr(text_config, "max_position_embeddings", context)
        endpoint({"inputs": "a", "parameters": {"generation_mode": "interleaved", **given}})
        assert asked.get("max_new_tokens") == limit  # a small context ends a document itself


def test_a_document_goes_on_behind_a_prompt_of_more_than_half_the_context(endpoint) -> None:
    request = {"inputs": "a" * 80, "parameters": {"generation_mode": "interleaved", "height": 16, "width": 16}}
    assert endpoint(request)[0]["generated_interleaved"]


class Recorded:
    """Stands for a pipeline and notes what it is asked."""

    def __init__(self, model, asked: dict) -> None:
        self.model, self.asked = model, asked

    def __call__(self, **arguments) -> list:
        self.asked.update(arguments)
        return []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"inputs": "a", "parameters": {"height": 17, "width": 16}}, "multiple of 4, got 17"),
        ({"inputs": "a" * 200}, "only 128 fit"),
        ({"inputs": {"image": in_base64(RED), "text": "a"}, "parameters": {"generation_mode": "image"}}, "a caption"),
        ({"inputs": {"images": [in_base64(RED)] * 2}}, "write one <imgpad> for each"),
        ({"inputs": {"image": in_base64(Image.new("RGB", (3, 3)))}}, "at least 4 pixels"),
        ({"inputs": {"image": png_that_claims(64, 64)}}, "truncated or damaged"),
        (chat({"type": "image", "image": png_that_claims(64, 64)}, WORDS), "truncated or damaged"),
    ],
)
def test_what_the_model_cannot_do_is_told_in_its_own_words(endpoint, request_, message) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        endpoint(request_)
    assert refused.value.status == 400 and refused.value.__suppress_context__


def test_a_failure_of_the_machine_says_nothing_of_it(endpoint, monkeypatch, caplog) -> None:
    def fail(**_) -> None:
        raise OSError(28, "No space left on device", "/srv/secret/cache")

    monkeypatch.setattr(endpoint, "pipeline", fail)
    with pytest.raises(RequestError, match="the endpoint's log says why") as failed:
        endpoint({"inputs": "a"})
    assert failed.value.status == 500 and "secret" not in str(failed.value) and "secret" in caplog.text
    assert not endpoint.lock.locked()


@pytest.mark.parametrize("config", [None, '{"model_type": "qwen2"}'])
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="holds no MARS"):
        EndpointHandler(str(tmp_path))


# Over HTTP, as the endpoint's server does it

SERVER = """
import gc, importlib.util, json, os, sys, threading
sys.modules["mars_hf"] = None
import torch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
sys.modules["handler"] = module
spec.loader.exec_module(module)
endpoint = module.EndpointHandler(folder)

class Server(ThreadingHTTPServer):
    request_queue_size = 64

class Requests(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        try:
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(200, endpoint(data))
        except Exception as error:
            self.answer(400, {"error": str(error)})

    def do_GET(self):
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        pages = int(open("/proc/self/statm").read().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        self.answer(200, {"threads": threading.active_count(), "tensors": tensors, "memory": memory})

server = Server(("127.0.0.1", 0), Requests)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def port(tmp_path: Path, tiny_model, tiny_processor):
    folder = hub.export_checkpoint(tiny_model, tiny_processor, tmp_path / "mars-tiny")
    places = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **places},
    )
    try:
        yield int(server.stdout.readline())
    finally:
        server.terminate()
        server.wait()


def ask(port: int, request: object = None) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    connection.request("GET" if request is None else "POST", "/", None if request is None else body)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


@pytest.mark.integration
def test_it_answers_good_bad_and_hostile_requests_over_http_twenty_at_once_without_a_leak(
    port: int, tiny_model, tiny_processor
) -> None:
    options = {"do_sample": True, "height": 16, "width": 16}
    good = [{"inputs": "a red apple", "parameters": {**options, "seed": seed}} for seed in range(8)]
    good += [{"inputs": {"image": in_base64(RED)}, "parameters": {"max_new_tokens": 5}}]
    good += [{**chat(PICTURE, WORDS), "parameters": {"generation_mode": "interleaved", "max_new_tokens": 20}}]
    bad = [request for request, _ in REFUSED.values()]
    bad += [b"{", b"\xff\xfe", b"[" * 100_000]
    bad += [{"inputs": "a", "parameters": {"height": 17}}, {"inputs": {"image": png_that_claims(64, 64)}}]

    alone = [ask(port, request) for request in good]
    assert [status for status, _ in alone] == [200] * len(good)
    pipe = MarsPipeline(model=tiny_model, processor=tiny_processor)
    for (_, (answer,)), seed in zip(alone, range(8), strict=False):
        (drawn,) = pipe("a red apple", seed=seed, **options)
        assert same(from_base64(answer["generated_image"]), drawn["generated_image"])
    for status, answer in (ask(port, request) for request in bad):
        assert status == 400 and answer.keys() == {"error"} and len(answer["error"]) < 400
        assert not any(word in answer["error"] for word in ("Traceback", ".py", "site-packages", "mars-tiny"))

    bad = [request for request in bad if len(json.dumps(request, default=repr)) < 2**20]  # megabytes hide a leak

    def storm() -> None:
        requests = [*good, *bad, *good]
        with ThreadPoolExecutor(20) as many:
            answers = list(many.map(lambda request: ask(port, request), requests))
        assert answers[: len(good)] == alone == answers[-len(good) :]
        assert {status for status, _ in answers[len(good) : -len(good)]} == {400}

    storm()  # what is made once, is made now
    _, before = ask(port)
    for _ in range(3):
        storm()
    _, after = ask(port)
    assert after["threads"] <= before["threads"] + 1  # the one that has just answered may still be ending
    assert after["tensors"] <= before["tensors"] + 5
    assert after["memory"] < before["memory"] + 50 * 2**20
