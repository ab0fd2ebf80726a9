"""--watch of tinyclip_swap.py: frame by frame it says what the offline model says of the same
frames; every frame is accounted for; whatever breaks ends in a line, an exit code and in time."""
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch

import common
import tinyclip_swap
from tinyclip_swap import class_scores, main, parse

LABELS = list(common.MOTIONS)
CHOICE = r"([a-z ]+) ([01]\.\d\d)"
LINE = re.compile(rf" *(\d+\.\d) s  ([a-z ]+?) +\d+\.\d ms  {CHOICE}, {CHOICE}, {CHOICE}")
FLAGS = ("--labels", ", ".join(LABELS), "--large", "toy-small:random")


def account(code, text, seconds=0.):
    """What came of a run, from what it printed or BadInput's line, with its counts of frames."""
    found = re.search(r"^(.*)\nRESULT tinyclip_swap watch=\S+ read=(\d+) shown=(\d+) skipped=(\d+) "
                      r"dropped=(\d+) p50_ms=\d+\.\d p95_ms=\d+\.\d$", text, re.M)
    assert bool(found) == (code < 2)
    end, *counts = found.groups() if found else (text, 0, 0, 0, 0)
    read, shown, skipped, dropped = map(int, counts)
    assert read == shown + skipped + dropped
    return SimpleNamespace(code=code, text=text, seconds=seconds, end=end, read=read, shown=shown,
                           dropped=dropped)


@pytest.fixture
def look(out, capsys, monkeypatch):
    """look(source, flag, ...) watches it in this process, at its own pace if clock"""
    monkeypatch.setattr(tinyclip_swap, "STALL", 1)

    def run(source, *flags, clock=False):
        torch.manual_seed(0)
        code, text, began = 0, "", time.perf_counter()
        flags = ("--watch", source, "--out", out, *FLAGS, *["--no-drop"][clock:], *flags)
        try:
            main([str(flag) for flag in flags])
        except (SystemExit, common.BadInput) as stop:
            code, text = getattr(stop, "code", 2), str(stop)
        seconds, printed = time.perf_counter() - began, capsys.readouterr().out
        return account(code, text if code == 2 else printed, seconds)
    return run


def noise(count, height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def write(path, frames, codec="libx264", pix_fmt="yuv420p", times=(), base=24):
    """Frames one after the other, or at these times in 1/base s."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:  # index in front
        stream = container.add_stream(codec, rate=24, options={"g": "12", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.codec_context.time_base = Fraction(1, base)
        for t, picture in zip(times or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# ---- what it says


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A video of three actions, 48 frames in 2 s."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("three") / "three.mp4"
    truths = [common.toy_truth(rng, action, "checks") for action in LABELS[::2]]
    common.write_video(path, np.concatenate([common.toy_clip(truth) for truth in truths]))
    return path


@pytest.mark.parametrize("name", ["trained", "token", "no checkpoint"])
def test_a_stream_says_what_the_offline_model_says(plain, three, look, tmp_path, monkeypatch, name):
    """Of the last T sampled frames as a clip; the first stands for those before it."""
    said, embedded, step, T = [], [], tinyclip_swap.stream_step, {"trained": 4}.get(name, 5)
    monkeypatch.setattr(tinyclip_swap, "stream_step",
                        lambda *given: said.append(step(*given)) or said[-1])
    encode = common.ActionCLIP.encode_frames
    monkeypatch.setattr(common.ActionCLIP, "encode_frames",
                        lambda self, x: embedded.append(x.shape[1]) or encode(self, x))
    torch.manual_seed(0)
    model, flags = common.build_action_clip("toy-small:random", 0), ("--frames", 5)
    if name == "token":
        model, flags = common.build_action_clip("toy-small:random", token=True), ()
        torch.save({**model.about(5), "model_state_dict": model.clip.state_dict(),
                    "fusion_model_state_dict": model.fusion.state_dict()}, tmp_path / "token.pt")
    if name != "no checkpoint":
        file = {"trained": plain[1], "token": tmp_path / "token.pt"}[name]
        model = common.build_action_clip("toy-large", checkpoint=file)
        flags = ("--checkpoint", file)
    assert look(three, "--fps", 6, *flags).shown == 12
    assert embedded == [1] * 12  # each frame once
    text, offline = model.embed_classes(LABELS), []
    for last in range(12):
        window = [4 * max(0, k) for k in range(last - T + 1, last + 1)]
        pixels = common.centre_crop([common.read_frames(three, window, model.side)], model.size)
        with torch.no_grad():
            offline.append(class_scores(model.encode_video(pixels), text)[0])
    torch.testing.assert_close(torch.stack(said), torch.stack(offline), rtol=0, atol=1e-5)


def test_a_line_a_second_with_the_three_best_and_none_of_these_below_one_half(
        tmp_path, look, monkeypatch):
    said = [[.49, .3, .21, 0, 0, 0], [0, .5, .3, .2, 0, 0]] * 30
    monkeypatch.setattr(tinyclip_swap, "stream_step", Mock(side_effect=map(torch.tensor, said)))
    done = look(write(tmp_path / "a.mp4", noise(60, 16, 16), "mpeg4"), "--fps", 24)
    rows = [LINE.fullmatch(line).groups() for line in done.text.splitlines()[1:-2]]
    assert [row[0] for row in rows] == ["1.0", "2.0", "2.5"]
    assert rows[0][1:] == ("none of these", LABELS[0], "0.49", LABELS[1], "0.30", LABELS[2], "0.21")
    assert rows[2][1:4] == (LABELS[1], LABELS[1], "0.50")


# ---- which frames


@pytest.mark.parametrize(("name", "codec"), [
    ("a.mkv", "mpeg4"), ("a.ts", "mpeg2video"), ("a.h264", "libx264")])  # in ms; none in the last
def test_sampled_and_skipped_frames_add_up(tmp_path, look, name, codec):
    path = write(tmp_path / name, noise(49, 16, 16), codec)
    for fps, shown in ((.7, 2), (10, 21), (60, 49)):
        done = look(path, "--fps", fps)
        assert (done.end, done.read, done.shown) == ("end of the stream", 49, shown)
        assert done.dropped == 0


def test_slow_networks_drop_frames_and_keep_up(tmp_path, look, monkeypatch):
    seen = []

    def slow(model, ring, frame, text):
        seen.append(time.perf_counter() - frame.float().mean().item() / 160)
        time.sleep(.3)
        return torch.ones(6) / 6

    ramp = np.linspace(0, 240, 36, dtype=np.uint8)[:, None, None, None]  # 160 a second
    monkeypatch.setattr(tinyclip_swap, "stream_step", slow)
    path = write(tmp_path / "a.mp4", ramp.repeat(64, 1).repeat(64, 2).repeat(3, 3))
    done = look(path, "--fps", 12, clock=True)
    assert (done.code, done.read) == (0, 36)
    assert 8 <= done.dropped <= 14  # of 18 that were sampled
    assert 1.4 < done.seconds < 4  # 18 steps would take 5.4
    assert max(seen) - min(seen) < .4  # it does not fall behind


def test_a_slow_source_is_shown_as_it_comes(three, look, monkeypatch):
    frames = list(common.read_stream(str(three)))[:6]

    def slow(source):
        for t, frame in frames:
            yield t, frame
            time.sleep(.15)

    monkeypatch.setattr(common, "read_stream", slow)
    assert look("camera", "--fps", 24, clock=True).shown == 6


# ---- how it ends


def test_ctrl_c_in_a_step(three, look, monkeypatch):
    monkeypatch.setattr(tinyclip_swap, "stream_step", Mock(
        side_effect=[torch.ones(6) / 6] * 4 + [KeyboardInterrupt]))
    done = look(three, "--fps", 12)
    assert (done.code, done.end, done.shown) == (0, "Ctrl-C", 4)
    assert done.read == 8


def test_standard_input_of_a_process_that_is_interrupted(tmp_path, out):
    """It has half of a file and waits for more."""
    data = write(tmp_path / "a.ts", noise(96, 16, 16), "mpeg2video").read_bytes()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = subprocess.Popen(
        [sys.executable, tinyclip_swap.__file__, "--watch", "-",
         "--no-drop", "--out", out, *FLAGS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdin.write(data[:len(data) // 2])
    process.stdin.flush()
    printed = process.stdout.readline() + process.stdout.readline()  # to that of the first second
    process.send_signal(signal.SIGINT)
    printed += process.stdout.read()
    done = account(process.wait(60), printed.decode())
    assert (done.code, done.end) == (0, "Ctrl-C")
    assert 24 <= done.read < 50


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server of /whole, /cut in the middle, /stall there, /never, /404."""
    data = write(tmp_path_factory.mktemp("served") / "a.mkv", noise(36, 96, 128)).read_bytes()
    end = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            how = self.path[1:]
            if how != "never":
                self.send_response(404 if how == "404" else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:len(data) // (1 if how == "whole" else 2)])
            if how in ("stall", "never"):
                end.wait(60)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        end.set()
        served.shutdown()


@pytest.mark.parametrize(("how", "code", "end"), [
    ("whole", 0, "end of the stream"), ("cut", 1, r"no readable video \(\w+\)"),
    ("stall", 1, "no frame for 1 s"), ("never", 2, ".*: no frame for 1 s"),
    ("404", 2, r".*: no readable video \(HTTPNot\w+\)")])
def test_addresses(server, look, how, code, end):
    done = look(f"{server}/{how}")
    assert done.code == code
    assert re.fullmatch(end, done.end)
    assert done.seconds < 10


@pytest.mark.parametrize(("make", "text"), [
    (lambda path: None, "no such file"), (os.mkfifo, "no frame for 1 s"),  # nobody writes to it
    (lambda path: path.write_text("no video" * 99), "no readable video")])
def test_nothing_to_watch_is_a_mistake(tmp_path, look, make, text):
    make(tmp_path / "a.avi")
    done = look(tmp_path / "a.avi")
    assert re.fullmatch(rf"--watch {tmp_path}/a.avi: .*{text}.*", done.text)


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mp4", "libx264")])
def test_a_file_that_is_cut_off_exits_with_one(tmp_path, look, name, codec):
    path = write(tmp_path / name, noise(96, 48, 64), codec)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    done = look(path)
    assert 20 < done.read < 60
    assert done.code == 1


def test_odd_files_do_not_look_cut_off(tmp_path, look):
    """One frame; few a second; frames left out; two in the same ms; damage in the middle."""
    write(tmp_path / "one.mp4", noise(1))
    common.write_video(tmp_path / "slow.mkv", noise(3), Fraction(1, 3))
    write(tmp_path / "gaps.avi", noise(30), "mpeg4", times=[*range(10), *range(20, 40)])
    damaged = bytearray(write(tmp_path / "damaged.ts", noise(72, 96, 128)).read_bytes())
    damaged[len(damaged) // 2:][:1500] = bytes(noise(1).flat[:1500])
    (tmp_path / "damaged.ts").write_bytes(damaged)
    write(tmp_path / "pause.mp4", noise(4), times=[0, 1, 500, 501])
    with open(tmp_path / "pipe.avi", "wb") as file:  # declares 2^30 frames
        file.seekable = lambda: False
        with av.open(file, "w", "avi") as container:
            stream = container.add_stream("mpeg4", rate=24, width=64, height=48)
            for picture in noise(30):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    write(tmp_path / "burst.ts", noise(4), times=[0, 3750, 3760, 7500], base=90_000)
    for path in list(tmp_path.iterdir()):
        assert look(path).code == 0, path


def test_the_frame_size_and_the_timestamps_may_change_on_the_way(tmp_path, look):
    parts = [write(tmp_path / "a.ts", noise(36, *size)).read_bytes()
             for size in ((64, 96), (96, 48), (96, 48))]
    (tmp_path / "all.ts").write_bytes(b"".join(parts))
    done = look(tmp_path / "all.ts", "--fps", 12)
    assert (done.code, done.read, done.shown) == (0, 108, 54)
    seconds = [t for t, _ in common.read_stream(str(tmp_path / "all.ts"))]
    assert np.allclose(seconds, np.arange(108) / 24, atol=.0011)


# ---- flags


def test_labels_are_any_words():
    for words, labels in (("waving,running", ["waving", "running"]), ("ünï, 跑", ["ünï", "跑"]),
                          (" a dog  jumping ,b,, a,b ,", ["a dog  jumping", "b", "a"])):
        assert parse(["--watch", "a.mp4", "--labels", words]).labels == labels


@pytest.mark.parametrize("flags", [
    "--watch a", "--watch a --labels one,one", "--watch a.mp4 --labels a,b --fps 0"])
def test_flags_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 2
    assert "--labels" in capsys.readouterr().err
