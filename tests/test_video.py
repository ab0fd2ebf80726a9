"""Which frames are read, that they are the right ones, odd files, loaders, augmentation."""
import contextlib
import io
import pickle
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import common
from common import BadInput, BadVideo, Clips, centre_crop, clip_loader, read_data, read_frames

RNG = np.random.default_rng


def moving(count=40, height=48, width=64, seed=0):
    """Frames that all differ: noise in blocks, rolled by 2 pixels a frame, uint8 (N, H, W, 3)"""
    still = RNG(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    still = still.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(still, 2 * i, 1) for i in range(count)])


def whole(path):
    """Every frame of a file, decoded in order without any seek -> uint8 (N, 3, H, W)"""
    with av.open(str(path), metadata_errors="replace") as container:
        container.streams.video[0].thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def assert_reads_what_is_there(path, count=None, lost=0):
    """Unsorted, repeated indices give the frames of a decode in order. lost: frames at the end that
    no decoder gives back: the last one stands in."""
    everything, N = whole(path), common.video_index(str(path)).count
    assert len(everything) + lost == N == (count or N)
    indices = [N - 1, 0, *RNG(0).integers(N, size=9), N // 2, N // 2 + 1, N - 1]
    indices = [min(i, N - 1) for i in indices]
    at = torch.tensor(indices).clamp(max=len(everything) - 1)
    assert torch.equal(read_frames(path, indices), everything[at])
    assert torch.equal(read_frames(path, [N - 1])[0], everything[-1])  # at once, from a seek


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 4, 8, 16])
@pytest.mark.parametrize("N", [17, 40, 83, 1000])
def test_tsn_test_frames_are_the_middles_of_segments(N, T):
    expected = [int(i * N / T + (N / T - 1) / 2) for i in range(T)]
    assert common.segment_indices(N, T).tolist() == expected
    assert all(i * N / T - 1 < k < (i + 1) * N / T for i, k in enumerate(expected))


@pytest.mark.parametrize("T", [4, 8, 16])
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_short_clips_repeat_frames(N, T):
    assert common.segment_indices(N, T).tolist() == [i * N // T for i in range(T)]
    drawn = common.segment_indices(N, T, RNG(0)).tolist()
    assert drawn == sorted(drawn)
    assert len(drawn) == T
    assert set(drawn) == set(range(N))  # training leaves none out


@pytest.mark.parametrize(("N", "T"), [(9, 8), (17, 8), (40, 8), (83, 16), (301, 4)])
def test_training_frame_is_drawn_from_all_of_its_segment(N, T):
    drawn = np.stack([common.segment_indices(N, T, RNG(seed)) for seed in range(400)])
    for i, column in enumerate(drawn.T):
        assert set(column) <= set(range(i * N // T, (i + 1) * N // T))
    assert len(np.unique(drawn)) > .98 * N  # every frame has its chance, and segments leave no gap


def test_dense_windows():
    assert common.dense_indices(300, 8).tolist() == [[86 + 16 * i for i in range(8)]]  # the middle
    assert common.dense_indices(300, 16, views=3)[:, 0].tolist() == [0, 86, 172]  # last: 300 - 128
    assert (np.diff(common.dense_indices(300, 16, views=3)) == 8).all()
    assert common.dense_indices(50, 8).tolist() == [[16 * i % 50 for i in range(8)]]
    starts = [common.dense_indices(300, 8, RNG(seed)) for seed in range(99)]
    assert {s.shape for s in starts} == {(1, 8)}
    assert 0 <= min(s[0, 0] for s in starts) < 20 < 150 < max(s[0, 0] for s in starts) <= 172
    assert common.dense_indices(1, 8, RNG(0)).tolist() == [[0] * 8]


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("toy.mp4", "mpeg4", {}), ("b.avi", "mpeg4", {"bf": "2"}), ("b.mp4", "libx264", {"bf": "2"}),
    ("b.mkv", "libx264", {"bf": "3"}), ("b.avi", "libx264", {"bf": "2"}),
    ("open.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12"}),
    ("raw.h264", "libx264", {"bf": "2"}), ("raw.m4v", "mpeg4", {}), ("a.flv", "libx264", {}),
    ("a.wmv", "wmv2", {}), ("a.avi", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ("a.gif", "gif", {"pix_fmt": "rgb8"}), ("a.ts", "libx264", {}),
    # a seek in a program or transport stream lands behind the keyframe
    ("b.ts", "libx264", {"bf": "2"}), ("a.mpg", "mpeg2video", {"bf": "2"})])
def test_any_frame_of_any_container(tmp_path, name, codec, options):
    common.write_video(tmp_path / name, moving(), fps=25, codec=codec, **options)
    assert_reads_what_is_there(tmp_path / name, 40)


@pytest.mark.parametrize("clip", [
    "v_SoccerJuggling_g23_c01.avi", "v_SoccerJuggling_g24_c01.avi", "R6llTwEh07w.mp4",
    "SOX5yA1l24A.mp4", "WUzgd7C1pWA.mp4", "TrumanShow_wave_f_nm_np1_fr_med_26.avi",
    "RATRACE_wave_f_nm_np1_fr_goo_37.avi", "SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi",
    "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi"])
def test_any_frame_of_real_clips(shared, clip):
    # HMDB51: AVI with packed B-frames, whose timestamps tell nothing; one packet more than frames
    # (1 byte, a mark). The last of the four has metadata that are not UTF-8
    assert_reads_what_is_there(shared / "clips" / clip, lost=int("_np" in clip))


def test_any_frame_of_weizmann(shared):
    for path in sorted(shared.glob("weizmann/*/*"))[::15]:
        assert_reads_what_is_there(path)


def test_only_the_groups_that_are_needed_are_decoded(tmp_path, monkeypatch):
    common.write_video(tmp_path / "a.mp4", moving(120))

    @contextlib.contextmanager
    def counting(path):
        with open_video(path) as (container, stream):
            yield SimpleNamespace(seek=container.seek, decode=lambda s: (
                decoded.append(frame) or frame for frame in container.decode(s))), stream

    open_video, index = common.open_video, common.video_index(str(tmp_path / "a.mp4"))
    assert index.keys.tolist() == list(range(0, 120, 12))
    monkeypatch.setattr(common, "open_video", counting)
    for wanted, most in (([0], 1), ([24], 1), ([100], 5), ([0, 100, 101], 7), (range(120), 120)):
        decoded = []
        read_frames(tmp_path / "a.mp4", wanted)
        assert len(decoded) == most


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, -1), (180, 2), (270, 1)])
def test_rotated_clips_are_turned_upright(shared, degrees, turns):
    path = shared / "odd-videos" / "decord" / f"video_{degrees}.mov"
    upright = torch.rot90(whole(path), turns, (2, 3))
    assert torch.equal(read_frames(path, range(3)), upright)
    assert upright.shape[2:] == ((568, 320) if turns % 2 else (320, 568))
    assert min(read_frames(path, [0], side=32).shape[2:]) == 32


def write_packets(path, frames, pts, codec="libx264", bf="2"):
    """Encode frames with these timestamps, in 1/100 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=100, options={"g": "6", "bf": bf})
        stream.height, stream.width = frames.shape[1:3]
        for picture, time in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_variable_frame_rate_counts_frames_not_seconds(tmp_path):
    write_packets(tmp_path / "vfr.mp4", moving(30), RNG(0).integers(1, 60, 30).cumsum())
    assert_reads_what_is_there(tmp_path / "vfr.mp4", 30)


@pytest.mark.parametrize("every", [1, 4])
def test_frames_that_an_avi_dropped_are_not_missing(tmp_path, every):
    # AVI writes an empty chunk in the place of each; its header counts them, the demuxer does not
    # give them out. N must not count them
    times = np.delete(np.arange(40 * every), slice(10, 20)) if every == 1 else np.arange(30) * every
    write_packets(tmp_path / "a.avi", moving(30), times, "mpeg4", "0")
    assert_reads_what_is_there(tmp_path / "a.avi", 30)


def test_frames_that_an_edit_list_hides_do_not_count(tmp_path):
    # a cut without encoding anew, as telephones make it: the file starts at a keyframe before the
    # cut, and its first frames are to be dropped. They must not be counted
    write_packets(tmp_path / "full.mp4", moving(30), range(0, 90, 3))
    with av.open(str(tmp_path / "full.mp4")) as old, av.open(
            str(tmp_path / "cut.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (round(float(time - Fraction(15, 100) / packet.time_base))
                                          for time in (packet.pts, packet.dts))
                packet.stream = stream
                new.mux(packet)
    assert len(whole(tmp_path / "cut.mp4")) == 25
    assert_reads_what_is_there(tmp_path / "cut.mp4", 25)


def test_stream_that_starts_between_keyframes(tmp_path):
    # as a recording of a broadcast does
    common.write_video(tmp_path / "full.mkv", moving(40), codec="mpeg4")
    with av.open(str(tmp_path / "full.mkv")) as old, av.open(str(tmp_path / "a.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in list(old.demux(video=0))[5:-1]:
            packet.stream = stream
            new.mux(packet)
    with contextlib.suppress(BadVideo):  # decoders may or may not make a picture of the first ones
        assert len(read_frames(tmp_path / "a.mkv", [0, 3, 20])) == 3


@pytest.mark.parametrize(("height", "width"), [(2, 2), (48, 64), (64, 48), (50, 90)])
@pytest.mark.parametrize("count", [1, 3])
def test_few_frames_and_few_pixels(tmp_path, count, height, width):
    frames = moving(count, 64, 96)[:, :height, :width]
    common.write_video(tmp_path / "a.mp4", frames, codec="libx264")
    indices = common.segment_indices(common.video_index(str(tmp_path / "a.mp4")).count, 8)
    assert read_frames(tmp_path / "a.mp4", indices).shape == (8, 3, height, width)
    side = read_frames(tmp_path / "a.mp4", indices, side=32)
    assert list(side.shape[2:]) == [round(a * 32 / min(height, width)) for a in (height, width)]
    assert side.dtype == torch.uint8


def test_resizing_keeps_the_picture(tmp_path):
    frames = np.full((3, 128, 96, 3), 60, np.uint8)
    frames[:, :64, :48] = 200
    common.write_video(tmp_path / "a.mp4", frames)
    small = read_frames(tmp_path / "a.mp4", [0, 2], side=24).float()
    assert abs(small[:, :, :14, :10] - 200).max() < 6
    assert abs(small[:, :, 18:] - 60).max() < 6


# ---- odd files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["decord", "mp4parse", "torchcodec"])
def test_odd_videos_are_read_or_named_with_a_reason(shared, folder):
    read, bad = {}, {}
    for path in sorted((shared / "odd-videos" / folder).iterdir()):
        try:
            count = common.video_index(str(path)).count
            read[path.name] = read_frames(path, common.segment_indices(count, 8), side=32)
        except BadVideo as error:
            bad[path.name] = error
    assert all(error.path.endswith(name) and error.reason for name, error in bad.items())
    assert all(video.shape[:2] == (8, 3) for video in read.values())
    wanted = {"decord": "unordered.mov", "mp4parse": "tiny_av1.mp4 hevc_white_frame.mp4 white.mp4 "
              "video_colr_nclx_hdr10_full_range.mp4 bbb_sunflower_QCIF_30fps_mp4v_noaudio_1f.mp4",
              "torchcodec": "av1_video.mkv bt709_full_range.mp4 h264_10bits.mp4 h265_10bits.mp4"}
    assert set(wanted[folder].split()) <= set(read)
    if folder == "mp4parse":
        assert "no video stream" in bad["afconvert-aac-0.5s.mp4"].reason
        assert "no frame" in bad["bipbop_cbcs_video_init.mp4"].reason


def sound(path):
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.rate = 8000
        container.mux(stream.encode(frame))


def cover(path):
    """Sound with a picture on the sleeve, which players call a video stream."""
    with av.open(str(path), "w", format="mp3") as container:
        audio = container.add_stream("mp3", rate=44100)
        picture = container.add_stream("mjpeg", rate=1, width=32, height=32)
        picture.pix_fmt, picture.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        still = av.VideoFrame.from_ndarray(moving(1, 32, 32)[0], format="rgb24")
        for packet in picture.encode(still.reformat(format="yuvj420p")) + picture.encode(None):
            container.mux(packet)
        frame = av.AudioFrame(format="s16p", layout="mono", samples=1152)
        frame.rate = 44100
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def encoded(codec, name, frames=None, cut=1.):
    def write(path):
        complete = path.with_name("whole-" + name)
        common.write_video(complete, moving() if frames is None else frames, codec=codec)
        path.write_bytes(complete.read_bytes()[:int(cut * complete.stat().st_size)])
    return write


def two_sizes(path):
    for i, frames in enumerate((moving(20), moving(20, 64, 96))):
        encoded("libx264", f"{i}.h264", frames)(path.with_name("part"))
        with open(path, "ab") as file:
            file.write(path.with_name("part").read_bytes())


def unknown_codec(path):
    encoded("mpeg4", "x.avi")(path)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"Zq7!"))


BAD_FILES = {  # name: (how it is made, a word of the reason)
    "missing.avi": (lambda path: None, "no such file"),
    "folder.avi": (lambda path: path.mkdir(), "readable"),
    "empty.mp4": (lambda path: path.touch(), "readable"),
    "text.avi": (lambda path: path.write_text("These are no moving pictures.\n" * 50), "readable"),
    "random.mp4": (lambda path: path.write_bytes(RNG(0).bytes(50_000)), "readable"),
    "sound.avi": (sound, "no video stream"),
    "no-index.mp4": (encoded("libx264", "x.mp4", cut=.6), "readable"),  # mp4 has it at the end
    "cut-mpeg4.avi": (encoded("mpeg4", "x.avi", moving(120, 96, 128), .6), "cut off"),
    "cut-h264.avi": (encoded("libx264", "x.avi", moving(120, 96, 128), .6), "."),
    "two-sizes.h264": (two_sizes, "size changes"),
    # such a stream has no codec context
    "unknown-codec.avi": (unknown_codec, "codec"),
    # FFmpeg draws a text that is named so as ANSI art: four frames of letters
    "readme.txt": (lambda path: path.write_text("These are no moving pictures.\n" * 50), "video"),
    # the picture on the sleeve is a video stream of one frame
    "cover.mp3": (cover, "no video stream"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_raise_bad_video_with_a_reason(tmp_path, name):
    make, reason = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(BadVideo, match=reason) as caught:
        read_frames(tmp_path / name, common.segment_indices(
            common.video_index(str(tmp_path / name)).count, 8))
    assert caught.value.reason
    assert caught.value.path == str(tmp_path / name)


def test_frames_before_the_cut_can_be_read(tmp_path):
    encoded("mpeg4", "x.avi", moving(120, 96, 128), .6)(tmp_path / "cut.avi")
    assert common.video_index(str(tmp_path / "cut.avi")).count == 120  # as the header says
    assert torch.equal(read_frames(tmp_path / "cut.avi", range(30)),
                       whole(tmp_path / "whole-x.avi")[:30])


@pytest.mark.parametrize("indices", [
    [40],  # without bounds the search for it never ends
    [-1]])
def test_a_frame_that_no_file_can_have_is_an_error(tmp_path, indices):
    common.write_video(tmp_path / "a.mp4", moving(40))
    with pytest.raises((BadVideo, IndexError, ValueError)):
        read_frames(tmp_path / "a.mp4", indices)


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mp4", "libx264"),
                                             ("a.mkv", "libx264")])
def test_flipped_bytes_never_give_a_traceback(tmp_path, name, codec):
    # some of these lose their first keyframe or their codec: see above
    common.write_video(tmp_path / name, moving(), codec=codec)
    good, rng = (tmp_path / name).read_bytes(), RNG(0)
    for i in range(60):
        data = np.frombuffer(good, np.uint8).copy()
        part = [data, data[:1500], data[-1500:]][i % 3]  # anywhere, the header, the index
        part[rng.integers(len(part), size=8)] = rng.integers(256, size=8)
        path = tmp_path / f"{i}-{name}"
        path.write_bytes(data.tobytes())
        with contextlib.suppress(BadVideo):
            N = common.video_index(str(path)).count
            assert len(read_frames(path, common.segment_indices(N, 8))) == 8


@pytest.mark.parametrize("name", ["ünï 漢字.mp4", "#20[1]&(b)!;c~@.mp4", "100%03d.mp4", "a:b.mp4"])
def test_names_that_ffmpeg_might_read_otherwise(tmp_path, name):
    common.write_video(tmp_path / name, moving(5))
    assert len(read_frames(tmp_path / name, range(5))) == 5


def test_bad_video_crosses_the_border_of_a_process():
    error = pickle.loads(pickle.dumps(BadVideo("a.avi", "cut off")))
    assert (error.path, error.reason) == ("a.avi", "cut off")
    assert isinstance(error, BadVideo)


# ---- loaders -------------------------------------------------------------------------------------


def epochs(clips, count=2, **options):
    """All batches of some epochs as (keys, labels, videos)."""
    loader, out = clip_loader(clips, **options), []
    for loader.batch_sampler.epoch in range(count):
        out += [(b.key, b.label, b.video) for b in loader]
    return out


def same(a, b):
    return len(a) == len(b) and all(
        x[:2] == y[:2] and all(map(torch.equal, x[2], y[2])) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("train", [True, False])
def test_number_of_workers_does_not_change_the_batches(toy, train):
    data = read_data(toy)
    clips = Clips(data.train if train else data.test, 4, 32, train=train, seed=3)
    assert same(epochs(clips, batch=7), epochs(clips, batch=7, workers=2))


def test_two_ranks_see_the_global_batch_of_one(toy):
    clips = Clips(read_data(toy).train, 4, 32, train=True)
    one, *two = (epochs(clips, batch=8, **ranks) for ranks in
                 ({}, {"rank": 0, "world": 2}, {"rank": 1, "world": 2}))
    for batch, *parts in zip(one, *two, strict=True):
        assert len(parts[0][0]) == len(parts[1][0]) == 4
        videos = {}
        for keys, _, read in parts:
            videos |= zip(keys, read, strict=True)
        assert sorted(videos) == sorted(batch[0])
        assert all(map(torch.equal, map(videos.get, batch[0]), batch[2]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_testing_takes_each_clip_once(world):
    # 25 = 3 * 8 + 1: the last batch is smaller, and some rank has nothing to do then
    orders = [common.ClipOrder(25, 8, rank=rank, world=world) for rank in range(world)]
    assert sorted(i for order in orders for batch in order for _, i in batch) == list(range(25))
    assert len(orders[0]) == 4


def test_training_order_is_shuffled_anew_and_takes_whole_batches():
    order, seen = common.ClipOrder(25, 8, train=True, seed=0), []
    for order.epoch in (0, 1, 0):
        seen.append([i for batch in order for _, i in batch])
        assert len(order) == 3
        assert len(set(seen[-1])) == len(seen[-1]) == 24
    assert seen[0] == seen[2] != seen[1]
    assert [i for batch in common.ClipOrder(25, 8, train=True, seed=1) for _, i in batch] != seen[0]


def test_training_frames_change_with_the_epoch_and_test_frames_do_not(toy):
    train, test = (Clips(read_data(toy).train, 4, 32, train=train) for train in (True, False))
    drawn = [train[epoch, 0].video for epoch in range(4)]
    assert torch.equal(drawn[0], train[0, 0].video)
    assert not all(torch.equal(drawn[0], video) for video in drawn)
    assert torch.equal(test[0, 0].video, test[1, 0].video)


def test_dense_views_come_one_after_the_other(toy):
    clips = Clips(read_data(toy).test, 4, 32, "dense", views=3)
    assert clips[0, 0].video.shape == (12, 3, 32, 32)
    training = Clips(read_data(toy).test, 4, 32, "dense", views=3, train=True)
    assert training[0, 0].video.shape == (4, 3, 32, 32)


def with_bad(toy, tmp_path, count, good=8):
    """-> (path, label) of good clips and of so many bad ones"""
    bad = [tmp_path / f"bad{i}.mp4" for i in range(count)]
    for path in bad:
        path.write_text("no video")
    return read_data(toy).train[:good] + [(str(path), 0) for path in bad]


def test_training_replaces_a_bad_clip_and_names_it_once(toy, tmp_path, capsys):
    clips, bad, labels = Clips(with_bad(toy, tmp_path, 1), 4, 32, train=True), {}, set()
    loader = clip_loader(clips, 3)
    for loader.batch_sampler.epoch in range(5):
        for batch in loader:
            common.note_bad(bad, batch, clips)
            for video, label, (_, i), found in zip(*batch, strict=True):
                assert video.shape == (4, 3, 32, 32)
                assert bool(found) == (i == 8)
                labels |= {label} if i == 8 else set()
    assert list(bad) == [str(tmp_path / "bad0.mp4")]
    assert len(labels) > 1  # the label is that of the clip that took its place
    errors = capsys.readouterr().err
    assert errors.count("bad0.mp4") == 1
    assert "readable" in errors


def test_testing_keeps_the_place_of_a_bad_clip(toy, tmp_path, capsys):
    clips, bad = Clips(with_bad(toy, tmp_path, 2), 4, 32), {}
    batches = list(clip_loader(clips, 4, workers=2))
    for batch in batches:
        common.note_bad(bad, batch, clips)
    videos = [video for batch in batches for video in batch.video]
    assert [video is None for video in videos] == [False] * 8 + [True] * 2
    assert len(bad) == 2
    assert capsys.readouterr().err.count("cannot decode") == 2


@pytest.mark.parametrize(("count", "of", "stops"), [
    (10, 12, False), (11, 12, True), (11, 1099, True), (11, 1100, False), (12, 1100, True)])
def test_more_than_ten_and_more_than_one_percent_stop(count, of, stops):
    clips = Clips([("a.avi", 0)] * of, 4, 32)
    batch = common.Sample([None] * count, [0] * count, [(0, 0)] * count,
                          [[(f"{i}.avi", "cut off")] for i in range(count)])
    outcome = pytest.raises(BadInput, match=f"{count} of {of}") if stops else \
        contextlib.nullcontext()
    with contextlib.redirect_stderr(io.StringIO()), outcome:
        common.note_bad({}, batch, clips)


def test_training_stops_where_every_clip_is_bad(toy, tmp_path):
    clips = Clips(with_bad(toy, tmp_path, 3, good=0), 4, 32, train=True)
    batch = next(iter(clip_loader(clips, 3)))
    with pytest.raises(BadInput, match=r"3 of 3.*bad\d.mp4"):
        common.note_bad({}, batch, clips)


# ---- augmentation --------------------------------------------------------------------------------


def noise(T=4, height=40, width=56, seed=0):
    return torch.from_numpy(RNG(seed).integers(0, 256, (T, 3, height, width), np.uint8))


def test_augmentation_is_drawn_once_per_clip():
    still = noise(1).expand(6, -1, -1, -1)
    for seed in range(20):
        out = common.augment([still], 32, [RNG(seed)], [True])
        assert out.shape == (1, 6, 3, 32, 32)
        assert (out == out[:, :1]).all()
        assert 0 <= out.min() < out.max() <= 1


def test_augmentation_follows_its_generator():
    video = noise()
    a, b, c = (common.augment([video], 32, [RNG(seed)], [True]) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    # and a clip's own generator only, whatever stands beside it in the batch
    both = common.augment([noise(seed=1), video], 32, [RNG(5), RNG(0)], [True, True])
    assert torch.equal(both[1], a[0])


@pytest.mark.parametrize("mirror", [True, False])
def test_flips_only_where_they_are_allowed(mirror):
    # left dark, right bright: no colour jitter turns that round
    video = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    video[..., 16:] = 200
    out = torch.cat([common.augment([video], 32, [RNG(seed)], [mirror], scales=(1,))
                     for seed in range(40)]).mean((1, 2, 3))
    flipped = (out[:, :16].mean(1) > out[:, 16:].mean(1)).sum()
    assert 10 < flipped < 30 if mirror else flipped == 0


def test_augmentation_crops_and_colours_as_said():
    sizes, grey, plain = [], 0, noise(1, 64, 64)
    for seed in range(60):
        out = common.augment([plain], 64, [RNG(seed)], [False], scales=(1,))[0, 0]
        grey += bool((out[0] == out[1]).all() and (out[1] == out[2]).all())
        sizes.append(bool(torch.equal(out, plain[0] / 255)))
    assert 4 <= grey <= 22  # p .2
    assert 2 <= sum(sizes) <= 20  # p .2 * .8: neither jitter nor grey


def test_clips_of_different_sizes_give_one_batch():
    videos = [noise(4, 40, 56), noise(4, 64, 40), noise(4, 33, 33)]
    assert common.augment(videos, 32, [RNG(0)] * 3, [True] * 3).shape == (3, 4, 3, 32, 32)
    assert centre_crop(videos, 32).shape == (3, 4, 3, 32, 32)


def test_centre_crop_is_the_middle_in_0_to_1():
    video = noise(2, 36, 48)
    assert torch.equal(centre_crop([video], 32)[0], video[..., 2:34, 8:40] / 255)
    assert centre_crop([video], 32).dtype == torch.float32


def test_mirrors_spares_words_that_tell_left_from_right():
    classes = ["turn left", "clap", "Right hand up", "brightly lit", "leftover", "moving left"]
    assert common.mirrors(classes) == [False, True, False, True, True, False]
    assert common.mirrors(["turn left", "clap"]) == [False, True]
