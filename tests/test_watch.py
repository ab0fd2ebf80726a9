"""--watch of tinyclip_swap.py: on a stream it says what the offline model says of the same frames;
it keeps up; whatever breaks ends with a line, an exit code and in time."""
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
from tinyclip_swap import class_probabilities, main, parse

LABELS = list(common.MOTIONS)
CHOICE = r"([a-z ]+) ([01]\.\d\d)"
LINE = re.compile(rf" *(\d+\.\d) s  ([a-z -]+?) +\d+\.\d ms  {CHOICE}, {CHOICE}, {CHOICE}")
FLAGS = ("--labels", ", ".join(LABELS), "--large", "toy-small:random")


def num_frames(printed):
    """How many frames were classified, as RESULT says"""
    result = re.fullmatch(r"RESULT tinyclip_swap watch=\S+ frames=(\d+) p50_ms=\d+\.\d "
                          r"p95_ms=\d+\.\d", printed.splitlines()[-1])
    return int(result[1])


@pytest.fixture
def watch(out, capsys, monkeypatch):
    """watch(source, flag, ...) -> what was printed, how many frames were classified, the error if
    there was one. At full speed, unless paced."""
    monkeypatch.setattr(common, "STALL_TIMEOUT", 1)

    def run(source, *flags, paced=False):
        torch.manual_seed(0)
        error, start_time = "", time.perf_counter()
        flags = ("--watch", source, "--out", out, *FLAGS, *["--no-drop"][paced:], *flags)
        try:
            main([str(flag) for flag in flags])
        except common.BadInput as mistake:
            error = str(mistake)
        seconds, printed = time.perf_counter() - start_time, capsys.readouterr().out
        return SimpleNamespace(printed=printed, error=error, frames=num_frames(printed),
                               seconds=seconds)
    return run


def noise(count, height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def write(path, frames, codec="libx264", pix_fmt="yuv420p", times=(), base=24):
    """Write frames one after the other, or at these times in 1/base s."""
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
def three_actions(tmp_path_factory):
    """A video of three actions, 48 frames in 2 s"""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("three") / "three.mp4"
    videos = []
    for action in LABELS[::2]:
        videos.append(common.render_video(common.sample_toy_attributes(rng, action, "checks")))
    common.write_video(path, np.concatenate(videos))
    return path


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "zero-shot"])
def test_stream_equals_the_offline_model(plain, three_actions, watch, monkeypatch, checkpoint):
    """The last T sampled frames are a video; the first stands for those before it."""
    probabilities, encoded = [], []
    step, encode = tinyclip_swap.stream_step, common.ActionCLIP.encode_frames
    monkeypatch.setattr(tinyclip_swap, "stream_step",
                        lambda *args: probabilities.append(step(*args)) or probabilities[-1])
    monkeypatch.setattr(common.ActionCLIP, "encode_frames",
                        lambda self, x: encoded.append(x.shape[1]) or encode(self, x))
    torch.manual_seed(0)
    if checkpoint:
        T, flags = 4, ("--eval-only", plain[1])
        model = common.build_actionclip("toy-large", checkpoint=plain[1])
    else:
        T, flags = 5, ("--frames", 5)
        model = common.build_actionclip("toy-small:random", common.MeanHead)
    assert watch(three_actions, "--fps", 6, *flags).frames == 12
    assert encoded == [1] * 12  # each frame once
    text, offline = model.encode_classes(LABELS), []
    for last in range(12):
        indices = [4 * max(0, k) for k in range(last - T + 1, last + 1)]
        frames = common.read_frames(three_actions, indices, model.resize_to)
        with torch.no_grad():
            v = model.encode_video(common.center_crop([frames], model.crop_size))
        offline.append(class_probabilities(v, text)[0])
    torch.testing.assert_close(torch.stack(probabilities), torch.stack(offline), rtol=0, atol=1e-5)


def test_one_line_per_second_with_the_three_best_labels(tmp_path, watch, monkeypatch):
    """And no label below the threshold; the last line is printed once."""
    p = [[.49, .3, .21, 0, 0, 0], [0, .5, .3, .2, 0, 0]] * 60
    monkeypatch.setattr(tinyclip_swap, "stream_step", Mock(side_effect=map(torch.tensor, p)))
    done = watch(write(tmp_path / "a.mp4", noise(60, 16, 16), "mpeg4"), "--fps", 24)
    rows = [LINE.fullmatch(line).groups() for line in done.printed.splitlines()[2:-1]]
    assert [row[0] for row in rows] == ["1.0", "2.0", "2.5"]
    assert rows[0][1:] == ("-", LABELS[0], "0.49", LABELS[1], "0.30", LABELS[2], "0.21")
    assert rows[2][1:4] == (LABELS[1], LABELS[1], "0.50")
    done = watch(tmp_path / "a.mp4", "--fps", 24, "--threshold", .49)
    assert LINE.fullmatch(done.printed.splitlines()[2])[2] == LABELS[0]


def test_a_checkpoint_has_labels_and_a_toy_network_knows_toy_videos(
        plain, moves, three_actions, capsys):
    note = "NOTE toy-large is a toy network: its labels for a real video mean little"
    for video, notes in ((moves / "test" / "0000.mp4", []), (three_actions, [note])):
        main(["--watch", str(video), "--no-drop", "--eval-only", str(plain[1])])
        *first, header = capsys.readouterr().out.splitlines()[:len(notes) + 1]
        assert first == notes
        assert header.endswith("labels: moving down, moving left, moving right, moving up")


# ---- which frames


@pytest.mark.parametrize(("name", "codec"), [
    ("a.mkv", "mpeg4"), ("a.ts", "mpeg2video"), ("a.h264", "libx264")])  # in ms; none in the last
def test_fps_is_the_number_of_frames_per_second(tmp_path, watch, name, codec):
    path = write(tmp_path / name, noise(49, 16, 16), codec)
    for fps, frames in ((.7, 2), (10, 21), (60, 49)):
        done = watch(path, "--fps", fps)
        assert (done.error, done.frames) == ("", frames)


def test_slow_networks_drop_frames_and_keep_up(tmp_path, watch, monkeypatch):
    lags = []

    def slow(model, embeddings, frame, text):
        lags.append(time.perf_counter() - frame.float().mean().item() / 160)
        time.sleep(.3)
        return torch.ones(6) / 6

    ramp = np.linspace(0, 240, 36, dtype=np.uint8)[:, None, None, None]  # 160 per second
    monkeypatch.setattr(tinyclip_swap, "stream_step", slow)
    path = write(tmp_path / "a.mp4", ramp.repeat(64, 1).repeat(64, 2).repeat(3, 3))
    done = watch(path, "--fps", 12, paced=True)
    assert done.error == ""
    assert 8 <= 18 - done.frames <= 14  # dropped, of 18 that were sampled
    assert 1.4 < done.seconds < 4  # 18 steps would take 5.4
    assert max(lags) - min(lags) < .4  # it does not fall behind


def test_slow_source_loses_no_frame(three_actions, watch, monkeypatch):
    frames = list(common.live_frames(str(three_actions), fps=24, drop=False))[:6]

    def slow(source):
        for item in frames:
            yield item
            time.sleep(.15)

    monkeypatch.setattr(common, "_timed_frames", slow)
    assert watch("camera", "--fps", 24, paced=True).frames == 6


# ---- how it ends


def test_ctrl_c_in_a_step(three_actions, watch, monkeypatch):
    monkeypatch.setattr(tinyclip_swap, "stream_step", Mock(
        side_effect=[torch.ones(6) / 6] * 4 + [KeyboardInterrupt]))
    done = watch(three_actions, "--fps", 12)
    assert (done.error, done.frames) == ("", 4)
    assert "\ninterrupted\n" in done.printed


def test_standard_input_of_a_process_that_is_interrupted(tmp_path, out):
    """It has half of a file and waits for more."""
    data = write(tmp_path / "a.ts", noise(96, 16, 16), "mpeg2video").read_bytes()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = subprocess.Popen(
        [sys.executable, tinyclip_swap.__file__, "--watch", "-", "--no-drop", "--out", out, *FLAGS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdin.write(data[:len(data) // 2])
    process.stdin.flush()
    printed = b"".join(process.stdout.readline() for _ in range(3))  # to that of the first second
    process.send_signal(signal.SIGINT)
    printed = (printed + process.stdout.read()).decode()
    assert process.wait(60) == 0
    assert "\ninterrupted\n" in printed
    assert 5 <= num_frames(printed) < 10


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server of /whole, /cut in the middle, /stall there, /never, /404"""
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


@pytest.mark.parametrize(("how", "some_frames", "error"), [
    ("whole", True, ""), ("cut", True, r".*not a readable video \(\w+\)"),
    ("stall", True, ".*: no frame came for 1 s"), ("never", False, ".*: no frame came for 1 s"),
    ("404", False, r".*not a readable video \(HTTPNot\w+\)")])
def test_addresses(server, watch, how, some_frames, error):
    done = watch(f"{server}/{how}")
    assert re.fullmatch(error, done.error)
    assert (done.frames > 0) == some_frames
    assert done.seconds < 10


@pytest.mark.parametrize(("make", "text"), [
    (lambda path: None, "no such file"), (os.mkfifo, "no frame came for 1 s"),  # nobody writes
    (lambda path: path.write_text("no video" * 99), "not a readable video")])
def test_nothing_to_watch_is_an_error(tmp_path, watch, make, text):
    make(tmp_path / "a.avi")
    done = watch(tmp_path / "a.avi")
    assert re.fullmatch(rf"--watch {tmp_path}/a.avi: .*{text}.*", done.error)


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mp4", "libx264")])
def test_truncated_file_is_an_error_after_its_last_frame(tmp_path, watch, name, codec):
    path = write(tmp_path / name, noise(96, 48, 64), codec)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    done = watch(path, "--fps", 24)
    assert 20 < done.frames < 60
    assert done.error


def test_odd_files_do_not_look_truncated(tmp_path, watch):
    """One frame; few per second; frames left out; two in the same ms; damage in the middle."""
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
        done = watch(path)
        assert (done.error, done.frames > 0) == ("", True), path


def test_frame_size_and_timestamps_may_change(tmp_path, watch):
    videos = [write(tmp_path / "a.ts", noise(36, *size)).read_bytes()
              for size in ((64, 96), (96, 48), (96, 48))]
    (tmp_path / "all.ts").write_bytes(b"".join(videos))
    done = watch(tmp_path / "all.ts", "--fps", 12)
    assert (done.error, done.frames) == ("", 54)
    frames = common.live_frames(str(tmp_path / "all.ts"), fps=24, drop=False)
    assert np.allclose([t for t, _ in frames], np.arange(108) / 24, atol=.0011)


def test_a_number_is_no_camera():
    with pytest.raises(common.BadVideo, match="write /dev/video2 for a camera"):
        next(common.live_frames("2"))


# ---- flags


def test_labels_are_any_words():
    for words, labels in (("waving,running", ["waving", "running"]), ("ünï, 跑", ["ünï", "跑"]),
                          (" a dog  jumping ,b,, a,b ,", ["a dog  jumping", "b", "a"])):
        assert parse(["--watch", "a.mp4", "--labels", words]).labels == labels


@pytest.mark.parametrize("flags", ["--watch a", "--watch a --labels ,", "--watch="])
def test_watch_needs_labels(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 2
    assert "--labels" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--labels", "one,one"), ("--eval-only", "toy-small:random")])
def test_watch_needs_two_labels(flags, out):
    with pytest.raises(common.BadInput, match="needs two labels or more"):
        main(["--watch", "a.mp4", "--large", "toy-small:random", "--out", str(out), *flags])
