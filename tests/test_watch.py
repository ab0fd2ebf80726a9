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
from unittest.mock import Mock, patch

import av
import numpy as np
import pytest
import torch

import common
import deit_video
import spatial_kd
import tinyclip_swap
from common import MOTIONS, SCENES, build_action_clip, centre_crop, read_frames
from tinyclip_swap import class_scores, embed_classes, main, parse, read_stream, side

LABELS, CPU, RNG = list(MOTIONS), torch.device("cpu"), np.random.default_rng
CHOICE = r"([a-z ]+) ([01]\.\d\d)"
LINE = re.compile(rf" *(\d+\.\d) s  ([a-z ]+?) *  {CHOICE}, {CHOICE}, {CHOICE}  (\d+\.\d) frames/s"
                  r", latency p50 (\d+\.\d) p95 (\d+\.\d) ms")
FLAGS = ("--labels", ", ".join(LABELS), "--large", "toy-large:random", "--stall", "1")
WAV = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\0\0\0"


def account(code, text, seconds=0.):
    """What came of a run, from what it printed or BadInput's line, with its counts of frames."""
    found = re.search(r"^RESULT tinyclip_swap watch=\S+ read=(\d+) shown=(\d+) skipped=(\d+) "
                      r"dropped=(\d+) p50_ms=\d+\.\d p95_ms=\d+\.\d$", text, re.M)
    assert bool(found) == (code < 2)
    counts = list(map(int, found.groups())) if found else [0] * 4
    assert counts[0] == sum(counts[1:])
    assert not found or "{} read, {} shown, {} skipped, {} dropped".format(*counts) in text
    return SimpleNamespace(code=code, text=text, seconds=seconds, counts=counts, read=counts[0],
                           shown=counts[1])


@pytest.fixture
def look(out, capsys):
    """look(source, flag, ...) watches it in this process, at its own pace if clock"""
    def run(source, *flags, clock=False):
        torch.manual_seed(0)
        code, text, began = 0, "", time.perf_counter()
        flags = ("--watch", source, "--out", out, *FLAGS, *["--no-drop"][clock:], *flags)
        try:
            main([str(flag) for flag in flags])
        except (SystemExit, common.BadInput) as stop:
            code, text = getattr(stop, "code", 2), str(stop)
        seconds, printed = time.perf_counter() - began, capsys.readouterr().out
        assert seconds < 20
        return account(code, text if code == 2 else printed, seconds)
    return run


@pytest.fixture
def steps(monkeypatch):
    """steps() -> the probabilities of all steps, (N, K), but for the one that warms up."""
    said, step = [], tinyclip_swap.stream_step
    monkeypatch.setattr(tinyclip_swap, "stream_step",
                        lambda *given: said.append(step(*given)) or said[-1])
    return lambda: torch.stack(said[1:])


def join(path, actions, seed=0):
    rng = RNG(seed)
    truths = [common.toy_truth(rng, action, str(rng.choice(SCENES))) for action in actions]
    common.write_video(path, np.concatenate([common.toy_clip(truth)[0] for truth in truths]))
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return join(tmp_path_factory.mktemp("three") / "three.mp4", LABELS[::2])  # 48 frames, 2 s


def noise(count, height=48, width=64):
    return RNG(0).integers(0, 256, (count, height, width, 3), np.uint8)


def write(path, frames, codec="libx264", pix_fmt="yuv420p", times=(), base=24, sound=0):
    """Frames one after the other or at these times, in 1/base s; with so many seconds of sound."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:  # index in front
        stream = container.add_stream(codec, rate=24, options={"g": "12", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.codec_context.time_base = Fraction(1, base)
        if sound:
            audio = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            silence = av.AudioFrame(format="s16", layout="mono", samples=8000 * sound)
            silence.rate = 8000
            container.mux(audio.encode(silence))
        for t, picture in zip(times or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode(path):
    """-> frames (N, H, W, 3), and their times"""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [f.time for f in frames]


@torch.no_grad()
def offline(model, path, count, T, stride):
    """The same of the last T sampled frames as a clip; the first stands for those before it."""
    text, windows = embed_classes(model, LABELS, CPU), [
        [stride * max(0, k) for k in range(last - T + 1, last + 1)] for last in range(count)]
    return torch.cat([class_scores(model.encode_video(centre_crop(
        [read_frames(path, window, side(model))], model.size)), text) for window in windows])


def test_label_follows_within_a_window(plain, out, tmp_path, look, steps):
    order = [i % 6 for i in RNG(0).permutation(24)]
    look(join(tmp_path / "joined.mp4", [LABELS[i] for i in order], 1), "--fps", 12, "--checkpoint",
         out / "tinyclip_swap" / "toy-s1-seed0" / "large-last.pt")
    right = steps().argmax(1).view(24, 8) == torch.tensor(order)[:, None]
    assert right[:, 7].float().mean() >= .9
    assert right[:, 0].float().mean() < .5  # seven of its frames are of the clip before


@pytest.fixture(scope="module")
def checkpoints(plain, out, toy, tmp_path_factory):
    """{name: (file, its backbone, T)}"""
    folder = tmp_path_factory.mktemp("checkpoints")
    flags = ("--data", toy, "--epochs", 1, "--workers", 0, "--out", folder, "--student")
    spatial_kd.main([*map(str, flags), "toy-large:random", "--labeller", "toy-small:random",
                     "--arms", "spatial"])
    with patch.object(deit_video, "median_ms", return_value=1.):
        deit_video.main([*map(str, flags), "toy-small:random", "--teacher", "toy-large:random",
                         "--arms", "gt", "--frames", "4"])
    model, official = build_action_clip("toy-small:random"), folder / "official.pt"
    torch.save({f"{name}_state_dict": {f"module.{key}": value for key, value in part.items()}
                for name, part in (("model", model.clip.state_dict()),
                                   ("fusion_model", model.fusion.state_dict()))}, official)
    trained = out / "tinyclip_swap" / "toy-s1-seed0" / "large-last.pt"
    spatial, token = (next(folder.rglob(f"{arm}-last.pt")) for arm in ("spatial", "gt"))
    return {"trained": (trained, "toy-large", 8), "spatial_kd": (spatial, "toy-large", 8),
            "deit_video": (token, "toy-small", 4), "official": (official, "toy-small", 5),
            "no checkpoint": (None, "toy-large", 6)}


@pytest.mark.parametrize("name", ["trained", "trained, not prepacked", "spatial_kd", "deit_video",
                                  "official", "no checkpoint"])
def test_stream_says_what_the_offline_model_says(
        checkpoints, cache, three, look, steps, name, monkeypatch):
    if "," in name:
        monkeypatch.setattr(tinyclip_swap, "prepack", lambda model: None)
    file, backbone, T = checkpoints[name.partition(",")[0]]
    flags = ("--checkpoint", file) if file else ()
    if name in ("official", "no checkpoint"):  # the others say it themselves
        flags += ("--large", backbone, "--frames", T)
    assert look(three, "--fps", 12, *flags).shown == 24
    model = build_action_clip(f"{backbone}:{file}" if file else backbone, cache=cache).eval()
    assert (model.fusion.token is not None) == (name == "deit_video")
    if name == "no checkpoint":
        model.encode_video = lambda video: model.encode_frames(video).mean(1)
    torch.testing.assert_close(steps(), offline(model, three, 24, T, 2), rtol=0, atol=1e-5)


def test_a_frame_is_embedded_once_and_texts_too(three, look, monkeypatch):
    calls, names = [], ("encode_frames", "encode_text")
    for name, own in [(name, getattr(common.ActionCLIP, name)) for name in names]:
        monkeypatch.setattr(common.ActionCLIP, name, lambda self, x, name=name, own=own: (
            calls.append((name, *x.shape)), own(self, x))[1])
    assert look(three, "--fps", 12).shown == 24
    assert calls == [("encode_text", 16, 6, 20)] + [("encode_frames", 1, 1, 3, 32, 32)] * (1 + 24)


@pytest.mark.parametrize(("name", "codec", "count"), [
    ("a.mp4", "mpeg4", 49), ("a.mp4", "mpeg4", 1), ("a.ts", "mpeg2video", 49),
    ("a.mkv", "mpeg4", 49), ("a.m4v", "mpeg4", 49), ("a.h264", "libx264", 49)])  # ms; no times
@pytest.mark.parametrize("fps", [.7, 10, 24, 60])
def test_sampled_and_skipped_frames_add_up(tmp_path, look, name, codec, count, fps):
    shown = len({int(Fraction(i, 24) * Fraction(str(fps))) for i in range(count)})
    done = look(write(tmp_path / name, noise(count, 16, 16), codec), "--fps", fps)
    assert done.counts == [count, shown, count - shown, 0]


def test_slow_networks_drop_frames_and_keep_up(tmp_path, look, monkeypatch):
    behind, offered, offer = [], [0], tinyclip_swap.Reader.offer

    def slow(model, ring, frame, text):
        behind.append(abs(offered[-1] - float(frame.mean())))
        time.sleep(.4)
        return torch.ones(6) / 6

    ramp = np.linspace(0, 240, 48).astype(np.uint8)[:, None, None, None]
    monkeypatch.setattr(tinyclip_swap, "stream_step", slow)
    monkeypatch.setattr(tinyclip_swap.Reader, "offer", lambda self, item: (
        offered.append(item[2].mean() / 255), offer(self, item)))
    path = write(tmp_path / "a.mp4", ramp.repeat(64, 1).repeat(64, 2).repeat(3, 3))
    done = look(path, "--fps", 12, clock=True)
    assert (done.code, done.read, done.counts[2]) == (0, 48, 24)
    assert 12 <= done.counts[3] <= 22
    assert 1.9 < done.seconds < 7  # 24 steps would take 9.6
    assert max(np.median(behind), behind[-1]) < .03  # it is the newest; the last comes through


def test_ctrl_c_in_a_step(three, look, tmp_path, monkeypatch):
    monkeypatch.setattr(tinyclip_swap, "stream_step", Mock(
        side_effect=[torch.ones(6) / 6] * 4 + [KeyboardInterrupt]))  # the first one warms up
    done = look(three, "--fps", 12, "--save", tmp_path / "out.mp4")
    assert (done.code, done.shown) == (0, 4)
    assert re.search(r"^Ctrl-C, at 0\.2 s: ", done.text, re.M)
    assert done.read - len(decode(tmp_path / "out.mp4")[0]) in (0, 1)


def test_ctrl_c_waits_for_a_frame_that_is_being_written(three, look, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.setattr(tinyclip_swap, "save_frame", lambda *given, own=tinyclip_swap.save_frame: (
        time.sleep(.5), monkeypatch.undo(), signal.pthread_kill(
            threading.main_thread().ident, signal.SIGINT), time.sleep(1.5), own(*given)))
    done = look(three, "--save", tmp_path / "out.mp4", clock=True)
    assert (done.code, done.read, len(decode(tmp_path / "out.mp4")[0])) == (0, 1, 1)


@pytest.mark.parametrize("clock", [False, True])
def test_a_steady_line_a_second(tmp_path, look, clock):
    done = look(join(tmp_path / "a.mp4", LABELS[:5]), "--fps", 12, clock=clock)  # 3.3 s
    rows = [LINE.fullmatch(line).groups() for line in done.text.splitlines()[2:-2]]
    assert [int(float(t)) for t, *_ in rows] == [1, 2, 3, 3]  # and the last frame
    assert clock or [t for t, *_ in rows] == ["1.0", "2.0", "3.0", "3.2"]
    for _, label, first, *row in rows:
        *p, rate, p50, p95 = map(float, [row[i] for i in (0, 2, 4, 5, 6, 7)])
        assert 1 >= p[0] >= p[1] >= p[2] >= 0
        assert len({first, row[1], row[3]} & {*LABELS}) == 3
        assert label == (first if p[0] >= .5 else "none of these") or p[0] == .5
        assert 0 < rate < (30 if clock else 1e5)
        assert 0 <= p50 <= p95


def test_a_wait_for_the_clock_is_no_stall(tmp_path, look):
    done = look(write(tmp_path / "slow.mp4", noise(2), "mpeg4", times=[0, 72]), clock=True)
    assert (done.code, done.shown, "no frame" in done.text) == (0, 2, False)


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


@pytest.fixture(scope="module")
def processes(out, tmp_path_factory):
    """Three, started at once, and the folder they write to."""
    started, folder = [], tmp_path_factory.mktemp("processes")
    data = write(folder / "a.mkv", noise(36, 16, 16), "mpeg4").read_bytes()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    for part, *flags in (
            (b"", "lavfi:testsrc=size=96x64:rate=24:duration=99", "--save", "out.mp4"),
            (data, "-", "--no-drop"), (data[:len(data) // 2], "-", "--no-drop")):
        end, start = os.pipe()
        os.write(start, part)
        started.append(subprocess.Popen(
            [sys.executable, tinyclip_swap.__file__, "--out", out, *FLAGS, "--watch", *flags],
            stdin=end, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder))
        os.close(end)
        if len(started) < 3:
            os.close(start)
    return started, folder


@pytest.mark.usefixtures("processes")  # they start while these tests wait
@pytest.mark.parametrize(("how", "code", "text"), [
    ("whole", 0, "end of the stream, at 1.2 s: 36 read"), ("cut", 1, r"^it breaks off \("),
    ("stall", 1, r"^no frame for \d+ s \(--stall\), at 0\.\d s"),
    ("never", 2, r"no frame for \d+ s \(--stall\)$"), ("404", 2, r"no readable video \(HTTPNot")])
def test_addresses(server, look, how, code, text):
    done = look(f"{server}/{how}")
    assert done.code == code
    assert re.search(text, done.text, re.M)


@pytest.mark.parametrize(("make", "text"), [
    (lambda path: None, "no such file"), (lambda path: path.write_bytes(WAV), "no video stream"),
    (lambda path: path.write_text("no video" * 99), "no readable video"),
    (os.mkfifo, r"no frame for \d+ s \(--stall\)")])  # a named pipe that nobody writes to
def test_nothing_to_watch_is_a_mistake_and_harms_no_file(tmp_path, look, make, text):
    make(tmp_path / "a.avi")
    (tmp_path / "out.mp4").write_text("kept")
    done = look(tmp_path / "a.avi", "--save", tmp_path / "out.mp4")
    assert re.fullmatch(rf"--watch {tmp_path}/a.avi: .*{text}.*", done.text)
    assert (tmp_path / "out.mp4").read_text() == "kept"


@pytest.mark.parametrize(("name", "codec", "code"), [
    ("a.avi", "mpeg4", 1), ("a.avi", "libx264", 1), ("a.mkv", "libx264", 1),
    ("a.mp4", "libx264", 1), ("a.ts", "libx264", 0)])  # .ts: nothing in it says how long it was
def test_files_that_are_cut_off(tmp_path, look, name, codec, code):
    path = write(tmp_path / name, noise(72, 96, 128), codec)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    done = look(path, "--save", tmp_path / "out.mp4")
    assert 10 < done.read == len(decode(tmp_path / "out.mp4")[0]) < 50
    assert done.code == code
    assert not code or re.search(r"^it breaks off \(", done.text, re.M)


def test_whole_files_do_not_look_cut_off(tmp_path, look):
    common.write_video(tmp_path / "slow.mkv", noise(3), Fraction(1, 3))
    write(tmp_path / "sound.mkv", noise(48), sound=5)
    write(tmp_path / "gaps.avi", noise(30), "mpeg4", times=[*range(10), *range(20, 40)])
    assert [path.name for path in tmp_path.iterdir() if look(path).code] == []


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mp4"])
def test_damage_in_the_middle_is_got_over(tmp_path, look, name):
    path = write(tmp_path / name, noise(72, 96, 128), "mpeg4" if name == "a.mp4" else "libx264")
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    for at in (.3, .4, .5):
        data[int(at * len(data)):][:1500] = RNG(0).integers(0, 256, 1500)
    path.write_bytes(data.tobytes())
    done = look(path)
    assert done.code == 0
    assert re.search(r"^end of the stream, at 2\.[789] s", done.text, re.M)
    assert 30 < done.read <= 72
    assert name != "a.mp4" or re.search(r"; \d+ damaged packets$", done.text, re.M)


def test_another_frame_size_and_other_timestamps_on_the_way(tmp_path, look):
    (path := tmp_path / "all.ts").write_bytes(b"".join(
        write(tmp_path / "a.ts", noise(36, *size)).read_bytes()
        for size in ((64, 96), (96, 48), (96, 48))))
    times = [t for t, _ in read_stream(str(path))]
    assert np.allclose(times, np.arange(108) / 24, atol=.001)
    done = look(path, "--fps", 12, "--save", tmp_path / "out.mp4")
    assert (done.code, done.shown) == (0, 54)
    assert "    1.5 s  the frame size changes from (96, 64) to (48, 96)\n" in done.text
    film, saved = decode(tmp_path / "out.mp4")
    assert film.shape == (108, 64, 96, 3)
    assert np.allclose(saved, times, atol=.0011)


def test_processes_that_are_interrupted_end_and_stall(processes):
    started, folder = processes
    [started[0].stdout.readline() for _ in range(3)]  # up to the line of the first second
    started[0].send_signal(signal.SIGINT)
    done = [account(process.wait(120), process.stdout.read()) for process in started]
    assert [run.code for run in done] == [0, 0, 1]
    assert re.search(r"^Ctrl-C, at \d+\.\d s: ", done[0].text, re.M)
    assert done[0].read - len(decode(folder / "out.mp4")[0]) in (0, 1)
    assert re.search(r"^end of the stream, at 1\.2 s: 36 read", done[1].text, re.M)
    assert re.search(r"^no frame for \d+ s \(--stall\), at ", done[2].text, re.M)


def test_a_device_and_a_pipe_with_nothing_in_it(look):
    assert look("lavfi:testsrc=duration=1:rate=30", "--fps", 60).shown == 30
    end, start = os.pipe()
    os.close(start)
    assert re.match("--watch pipe:.*: no readable video", look(f"pipe:{end}").text)


def test_below_the_threshold_it_is_none_of_these(tmp_path, look, monkeypatch):
    drawn, said = [], ([1, 0, 0], [.9, .1, 0], [.2, .4, .4], [.1, .5, .4], [.49, .3, .21])
    monkeypatch.setattr(tinyclip_swap, "stream_step", Mock(side_effect=map(torch.tensor, said)))
    monkeypatch.setattr(tinyclip_swap, "save_frame", lambda *given: drawn.append(given[-1]))
    done = look(write(tmp_path / "a.mp4", noise(4)), "--fps", 24, "--labels", "a, b, c", "--save",
                tmp_path / "out.mp4")
    assert drawn == ["a", "none of these", "b", "none of these"]
    assert " s  none of these  a 0.49, b 0.30, c 0.21  " in done.text


@pytest.mark.parametrize(("words", "labels"), [
    ("waving,running", ["waving", "running"]), (" a dog  jumping ,b", ["a dog  jumping", "b"]),
    ("b,a , b,, a,c ,", ["b", "a", "c"]), ("ünï, 跑", ["ünï", "跑"])])
def test_labels_are_any_words(words, labels):
    assert parse(["--watch", "a.mp4", "--labels", words]).labels == labels


@pytest.mark.parametrize("flags", [
    "--watch a", "--watch a --labels=", "--watch a --labels one", "--watch a --labels one,one",
    "--watch a --labels ,", "--labels a,b", "--checkpoint a.pt", "--save a.mp4",
    *(f"--watch a --labels a,b --{flag}" for flag in ("fps 0", "stall 0", "threshold 1.1"))])
def test_flags_that_cannot_be(flags):
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 2


@pytest.mark.parametrize(("name", "text"), [
    ("a.mp4", "would write over"), ("link.mp4", "would write over"),
    ("hard.mp4", "would write over"), ("gone/out.mp4", "folder is missing"),
    ("out.xyz", "cannot be written"), ("out", "cannot be written")])
def test_save_where_it_must_not_or_cannot(tmp_path, look, name, text):
    path = write(tmp_path / "a.mp4", noise(4))
    (tmp_path / "link.mp4").symlink_to(path)
    os.link(path, tmp_path / "hard.mp4")
    (tmp_path / "out.xyz").write_text("kept")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    done = look(path, "--save", tmp_path / name)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert re.match(rf"--save {tmp_path}/{name} .*{text}", done.text)


def assert_film_of(source, path, times):
    """Same frames and times; the label is drawn at the top; below, the picture is the source."""
    film, saved = decode(path)
    assert np.allclose(saved, times, atol=.0011)
    assert film.shape == (len(source), *(a // 2 * 2 for a in source.shape[1:3]), 3)
    off = abs(film - source[:, :film.shape[1], :film.shape[2]].astype(int)).mean(-1)
    high = 15 * max(1, film.shape[1] // 160)
    assert off[:, high + 2:].mean((1, 2)).max() < 10 < 30 < off[:, :high].mean((1, 2)).min()
    assert (((film[..., 1] > 120) & (film[..., 0] < 100))[:, :high].sum((1, 2)) > 40).all()  # green


@pytest.mark.parametrize("pixels", [161, 341])
def test_film_has_all_frames_their_times_and_the_label(tmp_path, look, pixels):
    clip = common.toy_clip(common.toy_truth(RNG(0), "growing", "plain ground"), 20, pixels)[0]
    clip, times = clip[:, :, 20:], [0, *map(int, RNG(0).integers(10, 90, 19).cumsum())]
    path = write(tmp_path / "odd.mkv", clip, "ffv1", "bgr0", times, 1000)
    assert look(path, "--fps", 12, "--save", tmp_path / "out.mp4").read == 20
    assert_film_of(clip, tmp_path / "out.mp4", [t / 1000 for t in times])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_film_of_a_rotated_source_is_upright(shared, tmp_path, look, degrees):
    path = shared / "odd-videos" / "decord" / f"video_{degrees}.mov"
    look(path, "--save", tmp_path / "out.mp4")
    upright = read_frames(path, range(3)).permute(0, 2, 3, 1).numpy()
    assert_film_of(upright, tmp_path / "out.mp4", [t for t, _ in read_stream(str(path))])
