"""The model zoo, against a server on this machine: nothing here needs a network."""

import hashlib
import http.server
import logging
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.file_io import PathManager
from tiny_nuclei_model import RECIPE, build_tiny_model, one_thread

from mask2former import model_zoo
from mask2former.checkpoint import load_weights
from mask2former.errors import UserError
from mask2former.model_zoo import document, download, table
from mask2former.model_zoo.__main__ import main

NAME = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep"
ADDRESS = f"mask2former://{NAME}"
CONTENT = bytes(range(256)) * 4000


class Server:
    """Serves one file as the test says, and keeps what it was asked for.

    Attributes:
        content: the file.
        cuts: for each of the next answers, after how many bytes of its body the connection is cut; None: not at all.
        ranges: whether parts of the file can be asked for.
        begin: where the parts begin that it sends; None: as asked.
        length: whether answers say how long they are.
        statuses: errors, one for each of the next answers.
        location: where every request is sent on to.
        delay: seconds before each answer.
        asked: the ``Range`` of each request, None for all of the file.
    """

    def __init__(self) -> None:
        self.content = CONTENT
        self.cuts: list[int | None] = []
        self.statuses: list[int] = []
        self.ranges = self.length = True
        self.begin: int | None = None
        self.location: str | None = None
        self.delay = 0.0
        self.asked: list[str | None] = []
        answer = self._answer

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, content: bytes | None = None) -> str:
        """Address of a file whose name has the hash of ``content``."""
        prefix = hashlib.md5(self.content if content is None else content).hexdigest()[:6]
        return f"http://127.0.0.1:{self._server.server_port}/some/model_final_{prefix}.pkl"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        wanted = request.headers["Range"]
        self.asked.append(wanted)
        time.sleep(self.delay)
        begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        begin = self.begin if wanted and self.begin is not None else begin
        if self.location or self.statuses:
            request.send_response(302 if self.location else self.statuses.pop(0))
            request.send_header("Location", self.location or "")
            request.end_headers()
            return
        if begin >= len(self.content):
            request.send_response(416)
            request.end_headers()
            return
        request.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            request.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        if self.length:
            request.send_header("Content-Length", str(len(self.content) - begin))
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        request.wfile.write(self.content[begin:][:cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.001)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def publish(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Let the COCO panoptic R50 be what the server has; returns where it will be on the disk."""

    def publish() -> Path:
        entries = [replace(entry, url=server.url()) if entry.name == NAME else entry for entry in table.entries()]
        monkeypatch.setattr(table, "entries", lambda: entries)
        return cache / "mask2former" / NAME / server.url().rpartition("/")[2]

    return publish


def fetch(server: Server, path: Path, content: bytes = CONTENT, **options: Any) -> None:
    url = server.url(content)
    download.download(url, path, url[-10:-4], **{"timeout": 5, "tries": 2, **options})


def part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def error_of(call: Any, *args: Any, **kwargs: Any) -> str:
    """The message, one line, of the user's mistake."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize("length", [True, False])
def test_a_file_comes_whole_with_progress(
    server: Server, tmp_path: Path, length: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server.length = length
    path = tmp_path / "new" / "file.pkl"
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert not part_of(path).exists()
    assert server.asked == [None]
    assert "file.pkl" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    path.write_bytes(b"checked when it came")
    fetch(server, path)
    assert path.read_bytes() == b"checked when it came"
    assert server.asked == []


def test_a_wrong_hash_is_named_and_the_file_removed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    message = error_of(fetch, server, path, b"other content")
    assert f"starts with {hashlib.md5(b'other content').hexdigest()[:6]} of" in message
    assert f"got {hashlib.md5(CONTENT).hexdigest()}" in message
    assert not path.exists() and not part_of(path).exists()
    assert len(server.asked) == 1  # the same file would come again


def test_a_cut_connection_is_continued(server: Server, tmp_path: Path) -> None:
    server.cuts = [400_000, 200_000, 100]
    fetch(server, tmp_path / "file.pkl")
    assert (tmp_path / "file.pkl").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=600000-", "bytes=600100-"]


def test_a_server_that_ignores_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = [400_000], False
    fetch(server, tmp_path / "file.pkl")
    assert (tmp_path / "file.pkl").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-"]


def test_a_server_that_sends_another_part(server: Server, tmp_path: Path) -> None:
    server.cuts, server.begin = [400_000], 5
    assert "another part of the file" in error_of(fetch, server, tmp_path / "file.pkl")
    server.begin = 0
    fetch(server, tmp_path / "file.pkl")
    assert (tmp_path / "file.pkl").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=400000-", "bytes=400000-"]


def test_a_server_that_always_cuts_is_given_up(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = [400_000] * 20, False
    message = error_of(fetch, server, tmp_path / "file.pkl", tries=3)
    assert "cut after 400,000 of 1,024,000 bytes" in message and "400,000 bytes are kept" in message
    assert len(server.asked) == 1 + 3
    assert part_of(tmp_path / "file.pkl").read_bytes() == CONTENT[:400_000]


def test_the_next_call_continues(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    part_of(path).write_bytes(CONTENT[:1000])
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("size", [1000, len(CONTENT), len(CONTENT) + 5])
def test_a_beginning_that_does_not_fit_is_thrown_away(server: Server, tmp_path: Path, size: int) -> None:
    path = tmp_path / "file.pkl"
    part_of(path).write_bytes(b"x" * size)
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [f"bytes={size}-", None]


def test_all_is_there_but_the_name(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    part_of(path).write_bytes(CONTENT)
    fetch(server, path)
    assert path.read_bytes() == CONTENT


def test_ctrl_c_keeps_what_came(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receive, path = download._chunks, tmp_path / "file.pkl"

    def interrupted(response: Any) -> Iterator[bytes]:
        yield next(receive(response))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "_chunks", interrupted)
        fetch(server, path)
    assert not path.exists()
    assert part_of(path).read_bytes() == CONTENT[: download.CHUNK]
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={download.CHUNK}-"]


def test_a_missing_file_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    assert "answers 404 Not Found" in error_of(fetch, server, tmp_path / "file.pkl")
    assert len(server.asked) == 1


def test_a_busy_server_is_tried_again(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.statuses = [503, 429]
    with caplog.at_level(logging.WARNING):
        fetch(server, tmp_path / "file.pkl", tries=3)
    assert "503 Service Unavailable; trying again" in caplog.text
    server.statuses = [500, 500]
    assert "answers 500" in error_of(fetch, server, tmp_path / "other.pkl", tries=2)


def test_no_network(tmp_path: Path, server: Server) -> None:
    url = server.url()
    server.close()
    assert "connection refused" in error_of(download.download, url, tmp_path / "file.pkl", "abcdef", tries=2)


def test_a_server_that_says_nothing(tmp_path: Path, server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.pkl"
        message = error_of(download.download, url, tmp_path / "file.pkl", "abcdef", tries=2, timeout=0.05)
    assert "timed out" in message


@pytest.mark.parametrize("scheme", ["ftp", "file"])
def test_http_alone(server: Server, tmp_path: Path, scheme: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    path = tmp_path / "file.pkl"
    assert "http" in error_of(download.download, f"{scheme}://{secret}", path, "abcdef")
    server.location = f"{scheme}://{secret}"
    assert {"ftp": "unknown url type: ftp", "file": "answers 302"}[scheme] in error_of(fetch, server, path)
    assert not path.exists()


def test_a_folder_that_can_not_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert "can't be written" in error_of(fetch, server, tmp_path / "file" / "file.pkl")


def test_at_once_download_once(server: Server, tmp_path: Path) -> None:
    """Threads that each open the lock's file wait for each other as processes do."""
    server.delay = 0.1
    path = tmp_path / "file.pkl"
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(fetch, server, path) for _ in range(4)]:
            future.result()
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]


# ------------------------------------------------------------------------------------------------- table


def test_the_table_has_every_published_model() -> None:
    entries = table.entries()
    assert len(entries) == 59 == len(set(model_zoo.names()))
    assert sum(entry.is_video for entry in entries) == 12
    for entry in entries:
        assert re.fullmatch(r"https://\S+/model_final_[0-9a-f]{6}\.pkl", entry.url)
        assert entry.url.split("/")[-2] == entry.name.split("/")[-1]
        assert entry.hash_prefix == entry.url[-10:-4]
        assert entry.figures and all(0 < float(figure) < 100 for figure in entry.figures.values())
    entry = table.find(NAME)
    assert entry.figures == {"PQ": "51.9", "AP": "41.7", "mIoU": "61.7"} and entry.training == {"epochs": "50"}
    assert model_zoo.url(NAME).endswith("/maskformer2_R50_bs16_50ep/model_final_94dc52.pkl")


def test_every_model_of_pictures_has_its_recipe(repository: Path) -> None:
    for name in model_zoo.names():
        if not table.find(name).is_video:
            path = model_zoo.config_file(name)
            assert path.is_file() and path.is_relative_to(repository / "configs")


def test_an_installed_package_has_the_recipes(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="needs setuptools to build the package")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    built, source = tmp_path / "mask2former" / "model_zoo" / "configs", repository / "configs"
    recipes = sorted(path.relative_to(source) for path in source.rglob("*.yaml"))
    assert len(recipes) > 57
    for recipe in recipes:
        assert (built / recipe).read_bytes() == (source / recipe).read_bytes()
    assert (built.parent / "model_zoo.json").is_file()


def test_the_recipe_that_the_published_table_misnames() -> None:
    entry = table.find("mapillary-vistas/semantic-segmentation/maskformer_R50_bs16_300k")
    assert table.find("mapillary-vistas/semantic-segmentation/maskformer2_R50_bs16_300k") is entry
    assert entry.config_file.name == "maskformer2_R50_bs16_300k.yaml"


@pytest.mark.parametrize("name", [NAME, ADDRESS, f"{NAME}.yaml", f"{ADDRESS}/"])
def test_ways_to_write_a_name(name: str) -> None:
    assert table.find(name).name == NAME


def test_unknown_names() -> None:
    message = error_of(model_zoo.get, "coco/panoptic-segmentation/maskformer2_R50")
    assert "no model 'coco/panoptic-segmentation/maskformer2_R50': did you mean" in message and NAME in message
    assert "MODEL_ZOO.md" in error_of(model_zoo.url, "?")
    assert "no model 'nothing'" in error_of(PathManager.get_local_path, "mask2former://nothing")


def test_models_of_videos_say_that_they_are_not_here_yet() -> None:
    assert "videos" in error_of(model_zoo.get, "youtubevis_2019/video_maskformer2_R50_bs16_8ep")


def test_the_document_is_up_to_date(repository: Path) -> None:
    text = (repository / "MODEL_ZOO.md").read_text(encoding="utf-8")
    assert text == document.document(), "make it again: python -m mask2former.model_zoo > MODEL_ZOO.md"
    assert "CC-BY-NC 4.0" in text
    for entry in table.entries():
        (row,) = (line for line in text.splitlines() if f"`mask2former://{entry.name}`" in line)
        assert entry.url in row and entry.backbone in row
        assert all(f"| {figure} |" in row for figure in entry.figures.values())
    for link in re.findall(r"\((configs/\S+)\)", text):
        assert (repository / link).is_file()


# ------------------------------------------------------------------------------------------------ models


def test_an_address_as_a_path(server: Server, publish: Callable[[], Path]) -> None:
    path = publish()
    assert PathManager.get_local_path(ADDRESS) == str(path)
    assert path.read_bytes() == CONTENT
    server.close()  # the second time needs no server
    with PathManager.open(ADDRESS, "rb") as file:
        assert file.read() == CONTENT


def test_force_downloads_again(server: Server, publish: Callable[[], Path]) -> None:
    path = publish()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    assert PathManager.get_local_path(ADDRESS) == str(path) and server.asked == []
    PathManager.get_local_path(ADDRESS, force=True)
    assert path.read_bytes() == CONTENT


@pytest.fixture
def tiny(server: Server, publish: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In place of the COCO panoptic R50 the zoo has a tiny model; where its weights will be."""
    weights = {name: value.numpy() for name, value in build_tiny_model().state_dict().items()}
    server.content = pickle.dumps({"model": weights, "__author__": "test"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr(table.Entry, "config_file", recipe)
    return publish()


def test_an_address_as_the_weights_of_a_model(tiny: Path) -> None:
    model = build_tiny_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, ADDRESS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


def test_get_gives_a_predictor(tiny: Path) -> None:
    with one_thread():
        predictor = model_zoo.get(NAME, device="cpu", confidence_threshold=0.25)
        outputs = predictor(torch.zeros(3, 40, 48, dtype=torch.uint8))
    assert predictor.weights == str(tiny)
    assert outputs["sem_seg"].shape[-2:] == (40, 48)


def test_weights_that_can_not_be_had(server: Server, publish: Callable[[], Path]) -> None:
    publish()
    server.statuses = [404]
    assert "404" in error_of(load_weights, build_tiny_model(), ADDRESS)


def test_the_command_downloads_and_says_where(
    publish: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = publish()
    monkeypatch.setattr(sys, "argv", ["model_zoo", NAME])
    main()
    assert capsys.readouterr().out == f"{path}\n"
    monkeypatch.setattr(sys, "argv", ["model_zoo"])
    main()
    assert capsys.readouterr().out == document.document()
