import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cascade.corpus import download as module
from cascade.corpus.download import download, download_archive, unpack


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CONTENT = tar_bytes({"top/a.txt": b"a" * 5000, "top/sub/b.txt": b"b"})


@pytest.fixture
def server(monkeypatch):
    """A server of CONTENT that understands Range, hangs up early `short` times and answers `errors` first."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state["requests"].append(self.headers.get("Range"))
            if state["errors"]:
                self.send_error(state["errors"].pop(0))
                return
            first = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state["ranges"] else 0
            body = CONTENT[first:]
            if first and not body:
                self.send_response(416)
                if state["total"]:
                    self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            if state["chunked"]:
                self.send_header("Transfer-Encoding", "chunked")
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if state["short"]:
                state["short"] -= 1
                body = body[: len(body) // 2]
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    state = {"requests": [], "errors": [], "short": 0, "ranges": True, "total": True, "chunked": False,
             "url": f"http://127.0.0.1:{http.server_port}/a"}
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


def test_archive_is_downloaded_and_unpacked_once(server, tmp_path):
    for _ in range(2):
        folder = download_archive(server["url"], tmp_path / "download", "corpus", "--corpus-dir DIR")
        assert (folder / "a.txt").read_bytes() == b"a" * 5000 and (folder / "sub" / "b.txt").read_bytes() == b"b"
    assert folder == tmp_path / "download" / "corpus" and server["requests"] == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path, ranges):
    server.update(short=1, ranges=ranges)
    download(server["url"], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and not (tmp_path / "a.part").exists()
    assert server["requests"] == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server["errors"] = [503]
    download(server["url"], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    server["errors"] = [404]
    with pytest.raises(OSError, match="could not download .*404.*use --corpus-dir DIR"):
        download_archive(server["url"], tmp_path, "corpus", "--corpus-dir DIR")
    assert len(server["requests"]) == 3


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("total", [True, False])
def test_a_whole_part_is_used_and_not_fetched_again(server, tmp_path, ranges, total):
    server.update(ranges=ranges, total=total)
    (tmp_path / "a.part").write_bytes(CONTENT)
    before = (tmp_path / "a.part").stat().st_ino
    download(server["url"], tmp_path / "a", hashlib.md5(CONTENT).hexdigest())
    assert (tmp_path / "a").read_bytes() == CONTENT and (tmp_path / "a").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_that_is_longer_than_the_file_is_kept_aside(server, tmp_path, ranges):
    server["ranges"] = ranges
    (tmp_path / "a.part").write_bytes(b"x" * (len(CONTENT) + 10))
    download(server["url"], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert (tmp_path / "a.part.damaged").read_bytes() == b"x" * (len(CONTENT) + 10)


def test_a_file_with_another_sum_is_one_sentence_and_kept_aside(server, tmp_path):
    (tmp_path / "corpus.tar.part").write_bytes(b"x" * 10)  # of another file
    good = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(ValueError, match=f"corpus.tar was downloaded with the MD5 sum .* instead of {good}: it"):
        download_archive(server["url"], tmp_path, "corpus", "--corpus-dir DIR", good)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.tar.damaged"]
    assert (tmp_path / "corpus.tar.damaged").read_bytes() == b"x" * 10 + CONTENT[10:]
    assert (download_archive(server["url"], tmp_path, "corpus", "--corpus-dir DIR", good) / "a.txt").is_file()


def test_a_stream_of_unknown_length_that_breaks_off_goes_on(server, tmp_path):
    server.update(chunked=True, short=1, ranges=False)
    download(server["url"], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and len(server["requests"]) == 2
    server["short"] = 3
    with pytest.raises(OSError, match="could not download .*IncompleteRead"):
        download_archive(server["url"], tmp_path, "corpus", "--corpus-dir DIR")


def test_no_connection_is_an_error_with_a_remedy(server, tmp_path):
    with pytest.raises(OSError, match="connect and run again, or use --corpus-dir DIR"):
        download_archive("http://127.0.0.1:9/none", tmp_path, "corpus", "--corpus-dir DIR")


@pytest.mark.parametrize("name", ["../evil", "top/../../evil"])
def test_members_outside_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes({"top/a": b"a", name: b"evil"}))
    with pytest.raises(ValueError, match="not a whole, safe tar archive"):
        unpack(tmp_path / "in" / "a.tar", tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "in" / "out").exists()


def test_absolute_members_land_inside_of_the_folder(tmp_path):
    outside = tmp_path / "outside"
    (tmp_path / "a.tar").write_bytes(tar_bytes({"top/a": b"a", str(outside): b"evil"}))
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert not outside.exists() and (tmp_path / "out" / str(outside).lstrip("/")).read_bytes() == b"evil"


@pytest.mark.parametrize("content", [CONTENT[:-30], CONTENT[:60] + b"12345678" + CONTENT[68:], b"<html>sorry</html>"])
def test_a_damaged_archive_is_an_error_and_is_kept_aside(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="it is kept as a.tar.damaged, run again to fetch it anew"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.damaged"]


def test_a_python_without_tar_filters_refuses_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr("tarfile.data_filter", raising=False)
    test_absolute_members_land_inside_of_the_folder(tmp_path)
    for name in ("../evil", "top/../../evil"):
        (tmp_path / "b.tar").write_bytes(tar_bytes({"top/a": b"a", name: b"evil"}))
        with pytest.raises(ValueError, match="not a whole, safe tar archive"):
            unpack(tmp_path / "b.tar", tmp_path / "other")
