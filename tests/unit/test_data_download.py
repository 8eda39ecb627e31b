"""Downloading: resumed where it broke off, checked, unpacked inside the folder; clear words otherwise."""

import dataclasses
import hashlib
import http.server
import io
import re
import tarfile
import threading

import pytest
import requests
from torchvision.datasets import Flowers102

from ratlip.data import download as module
from ratlip.data.download import SOURCES, ResumingDownloader, download, instructions, missing, unpack
from ratlip.data.layout import Remote
from ratlip.errors import DataError

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, with Range unless told otherwise; breaks off after `breaks[0]` bytes, then [1] ..."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, asked = self.server, re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        server.ranges.append(self.headers.get("Range"))
        start = int(asked[1]) if asked and server.understands_range else 0
        if server.status != 200:
            self.send_response(server.status)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks:
            self.wfile.write(body[: server.breaks.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.content, server.breaks, server.ranges = CONTENT, [], []
        server.understands_range, server.status = True, 200
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, tmp_path, **options):
    """Run the downloader alone; the bytes that came."""
    target = tmp_path / "target"
    fetcher = ResumingDownloader(tmp_path / "file.part", progress=False, **options)
    fetcher(f"{server.address}/file", str(target), None)
    assert not (tmp_path / "file.part").exists()
    return target.read_bytes()


def make_archive(*names, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(CONTENT)
            tar.addfile(entry, io.BytesIO(CONTENT))
        if link:
            entry = tarfile.TarInfo(link[0])
            entry.type, entry.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(entry)
    return buffer.getvalue()


@pytest.fixture
def publish(server, monkeypatch):
    """A function that makes a file of the server the one that `download("birds", ...)` fetches."""

    def publish(name="birds.tgz", gives="CUB_200_2011", content=None, size=512_000):
        checksum = hashlib.sha256(server.content if content is None else content).hexdigest()
        remote = Remote(f"{server.address}/{name}", f"sha256:{checksum}", gives, size)
        monkeypatch.setitem(SOURCES, "birds", dataclasses.replace(SOURCES["birds"], fetched=(remote,)))

    return publish


# ------------------------------------------------------------------------------------------------- transfer


def test_whole_file(server, tmp_path):
    assert fetch(server, tmp_path) == CONTENT
    assert server.ranges == [None]


def test_broken_connections_are_resumed(server, tmp_path):
    server.breaks = [200_000, 0, 100_000]
    assert fetch(server, tmp_path) == CONTENT
    starts = [int(asked[6:-1]) if asked else 0 for asked in server.ranges]
    assert starts[0] == 0 and len(starts) == 4 and starts == sorted(starts) and 100_000 < starts[1] <= 200_000


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:300_000])
    assert fetch(server, tmp_path) == CONTENT
    assert server.ranges == ["bytes=300000-"]


def test_server_without_ranges_begins_again(server, tmp_path):
    server.understands_range, server.breaks = False, [200_000]
    assert fetch(server, tmp_path) == CONTENT


def test_part_that_is_complete_or_too_long(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path) == CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert fetch(server, tmp_path) == CONTENT


def test_gives_up_when_nothing_more_comes_and_keeps_the_part(server, tmp_path):
    server.breaks = [200_000, 0, 0, 0, 0]
    with pytest.raises(requests.RequestException):
        fetch(server, tmp_path, attempts=3)
    assert 0 < (tmp_path / "file.part").stat().st_size <= 200_000
    assert len(server.ranges) == 4


# ------------------------------------------------------------------------------------------------- download


def test_download_fetches_checks_and_unpacks(server, publish, tmp_path):
    server.content = make_archive("attributes.txt", "CUB_200_2011/images.txt", "CUB_200_2011/images/a/b.jpg")
    server.breaks = [1000]
    publish()
    lacking = download("birds", tmp_path / "root", progress=False)
    assert (tmp_path / "root" / "CUB_200_2011" / "images" / "a" / "b.jpg").read_bytes() == CONTENT
    assert [item.name for item in (tmp_path / "root").iterdir()] == ["CUB_200_2011"]
    assert lacking == ["text", "train/filenames.pickle or trainvalclasses.txt"]
    requests_made = len(server.ranges)
    download("birds", tmp_path / "root", progress=False)
    assert len(server.ranges) == requests_made


def test_archive_put_there_by_hand_is_used(server, publish, tmp_path):
    content = make_archive("CUB_200_2011/images.txt")
    (tmp_path / "birds.tgz").write_bytes(content)
    publish(content=content)
    download("birds", tmp_path, progress=False, keep_archives=True)
    assert not server.ranges and (tmp_path / "birds.tgz").exists()
    assert (tmp_path / "CUB_200_2011" / "images.txt").exists()


def test_plain_file_stays_as_it_is(publish, tmp_path):
    publish("labels.mat", "labels.mat")
    download("birds", tmp_path, progress=False)
    assert (tmp_path / "labels.mat").read_bytes() == CONTENT


def test_wrong_checksum(publish, tmp_path):
    publish(content=b"other")
    with pytest.raises(DataError, match="has not the checksum sha256.*removed"):
        download("birds", tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_server_error(server, publish, tmp_path):
    server.status = 404
    publish()
    with pytest.raises(DataError, match="answered 404"):
        download("birds", tmp_path, progress=False)


def test_offline(server, publish, tmp_path):
    publish()
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError) as caught:
        download("birds", tmp_path, progress=False)
    message = str(caught.value)
    assert "127.0.0.1 cannot be reached" in message and "birds.tgz elsewhere" in message
    assert "\n" not in message


# -------------------------------------------------------------------------------------------------- unpacking


@pytest.mark.parametrize("kind", ["upward", "absolute", "link"])
def test_archives_cannot_write_outside(tmp_path, kind):
    archive = {
        "upward": lambda: make_archive("CUB/a", "../outside"),
        "absolute": lambda: make_archive("CUB/a", f"{tmp_path}/outside"),
        "link": lambda: make_archive("CUB/a", link=("CUB/link", "../../outside")),
    }[kind]()
    (tmp_path / "archive.tgz").write_bytes(archive)
    root = tmp_path / "one" / "root"
    if kind == "absolute":  # the filter makes the name relative, and goes on
        unpack(tmp_path / "archive.tgz", root, "CUB")
    else:
        with pytest.raises(DataError, match="cannot be unpacked"):
            unpack(tmp_path / "archive.tgz", root, "CUB")
        assert not (root / "CUB").exists()
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("content", [b"no archive", make_archive("CUB/a")[:-100], make_archive("other/a")])
def test_damaged_or_other_archives(tmp_path, content):
    (tmp_path / "archive.tgz").write_bytes(content)
    with pytest.raises(DataError, match="archive.tgz: (cannot be unpacked|holds no CUB)"):
        unpack(tmp_path / "archive.tgz", tmp_path / "root", "CUB")
    assert not list((tmp_path / "root").iterdir())


# ------------------------------------------------------------------------------------- what is said beforehand


def test_sizes_and_licence_are_said_before_anything_is_fetched(server, publish, ratlip, tmp_path):
    server.status = 404  # nothing comes, so what is said stands before it
    publish()
    status, out, _ = ratlip("download", "birds", "--to", tmp_path, "-q")
    assert status == 2 and server.ranges == [None]
    assert "birds.tgz: 512 kB, from 127.0.0.1" in out and "Flickr" in out and "meanwhile: 1.02 MB" in out


def test_what_is_here_is_said_and_gone_on_with(server, publish, ratlip, tmp_path):
    publish("labels.mat", "labels.mat")
    (tmp_path / "labels.mat.part").write_bytes(CONTENT[:300_000])
    status, out, _ = ratlip("download", "birds", "--to", tmp_path, "-q")
    assert status == 0 and "labels.mat: 512 kB, 300 kB are here: it goes on from there" in out
    assert "meanwhile: 212 kB" in out and server.ranges == ["bytes=300000-"]
    status, out, _ = ratlip("download", "birds", "--to", tmp_path, "-q")
    assert "labels.mat: 512 kB, not needed: labels.mat is here" in out and "meanwhile" not in out
    assert len(server.ranges) == 1


def test_too_small_a_disk_is_noticed_before(server, publish, tmp_path):
    publish(size=10**18)
    with pytest.raises(DataError, match=r"2e\+09 GB are needed there, .* are free"):
        module.announced("birds", tmp_path / "not" / "there")
    assert not server.ranges and not (tmp_path / "not").exists()


@pytest.mark.parametrize("dataset, said", [("birds", "1.15 GB"), ("flowers", "345 MB"), ("faces", "all by hand")])
def test_the_sets_say_their_sizes_and_licences(monkeypatch, tmp_path, dataset, said):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**13}))
    lines = module.announced(dataset, tmp_path)
    assert "research" in lines[0] and said in "\n".join(lines[1:])


# ---------------------------------------------------------------------------------------------- what is known


def test_flower_checksums_are_those_of_torchvision():
    known = {remote.url.rsplit("/", 1)[-1]: remote.checksum for remote in SOURCES["flowers"].fetched}
    for name, md5 in (Flowers102._file_dict["image"], Flowers102._file_dict["label"]):
        assert known[name] == f"md5:{md5}"
    assert all(remote.url.startswith(Flowers102._download_url_prefix) for remote in SOURCES["flowers"].fetched)


@pytest.mark.parametrize("dataset", ["birds", "flowers", "faces"])
def test_instructions_show_sources_and_the_folder(dataset):
    text = instructions(dataset)
    assert "https://" in text and f"  {dataset}/\n" in text
    for remote in SOURCES[dataset].fetched:
        assert remote.url in text


def test_faces_are_all_by_hand(tmp_path):
    lacking = download("faces", tmp_path / "root")
    assert [item.split(" or ")[0] for item in lacking] == [
        "img_align_celeba",
        "list_attr_celeba.txt",
        "identity_CelebA.txt",
    ]
    assert not (tmp_path / "root").exists()


def test_unknown_dataset(tmp_path):
    for call in (instructions, lambda name: missing(name, tmp_path), lambda name: download(name, tmp_path)):
        with pytest.raises(DataError, match="'coco' is not known; choose one of birds, flowers, faces"):
            call("coco")
